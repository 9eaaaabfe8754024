"""CUDA graphs: work that is launched once by the host and replayed as a whole."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 8192
"""Of the prompts of a batch, on both sides together, for which a graph pays: above it the device computes longer than
the host launches."""


class Captured:
    """A function over fixed buffers, captured once for each set of input shapes and replayed from then on.

    On other devices than CUDA the function is simply called. What a replay returns is overwritten by later replays of
    graphs of the same pool: use or copy it before.

    Args:
        function: takes and returns tensors; must not look at their values from the host.
        device: where the tensors lie.
        pool: memory shared with other graphs that never run at the same time, from `torch.cuda.graph_pool_handle()`.
        generators: of random numbers that the function draws.
        keep: number of graphs kept; the oldest goes first.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        *,
        pool: Any = None,
        generators: tuple[torch.Generator, ...] = (),
        keep: int = 8,
    ) -> None:
        self.device = device
        self.function, self.pool, self.generators, self.keep = function, pool, generators, keep
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]] = {}

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        """Run on these inputs, which may lie elsewhere: they are copied."""
        if self.device.type != "cuda":
            return self.function(*inputs)
        graph, buffers, output = self.prepare(*inputs)
        for buffer, value in zip(buffers, inputs, strict=True):
            buffer.copy_(value, non_blocking=True)  # in turn with the graph; from the host no copy waits for another
        graph.replay()
        return output

    def knows(self, *inputs: Tensor) -> bool:
        """Say whether there is a graph for inputs of these shapes, which then needs no further memory."""
        return _key(inputs) in self._graphs

    @torch.no_grad()
    def prepare(self, *inputs: Tensor) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]:
        """Capture for inputs of these shapes, if that has not been done; this runs the function."""
        key = _key(inputs)
        if key not in self._graphs:
            while len(self._graphs) >= self.keep:
                self._graphs.pop(next(iter(self._graphs)))
            self._graphs[key] = self._capture(inputs)
        return self._graphs[key]

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]:
        with torch.inference_mode(False):  # later calls may come from outside of it
            buffers = tuple(torch.empty_like(value, device=self.device).copy_(value) for value in inputs)
        function = functools.partial(self.function, *buffers)
        graph, output = capture(function, self.device, pool=self.pool, generators=self.generators)
        return graph, buffers, output


def _key(inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tuple((tuple(value.shape), value.dtype) for value in inputs)


def capture(
    function: Callable[[], Any],
    device: torch.device,
    *,
    pool: Any = None,
    generators: tuple[torch.Generator, ...] = (),
    others_go_on: bool = False,
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run a function once and capture it; return the graph, and what the function returns, which replays write.

    Args:
        function: must not look at tensors' values from the host.
        device: CUDA's.
        pool: see `Captured`.
        generators: of random numbers that the function draws, beside the device's own.
        others_go_on: whether other threads use the device meanwhile: they may, but what they do is not looked at.
    """
    # Libraries set up their workspaces, and kernels are compiled, on a first run outside the capture.
    side = _warm_up_stream(device)
    side.wait_stream(torch.cuda.current_stream())
    # What it draws at random is drawn again by the first replay.
    with torch.random.fork_rng([device]), torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    stream, mode = torch.cuda.current_stream(), "thread_local" if others_go_on else "global"
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode=mode):
            output = function()
    except BaseException:
        _undo(stream, pool, (torch.cuda.default_generators[stream.device_index], *generators))
        raise
    return graph, output


def _undo(stream: torch.cuda.Stream, pool: Any, generators: tuple[torch.Generator, ...]) -> None:
    """What torch leaves as it was during a capture that fails: current stream, generators and, before 2.12, pool."""
    torch.cuda.set_stream(stream)
    with contextlib.suppress(RuntimeError):  # no pool is in use
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)  # which the graph's end would have done
    for generator in generators:  # a copy of its state does not wait for a capture's end
        generator.graphsafe_set_state(generator.clone_state())


@functools.cache
def _warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace, 32 MiB on Hopper, for each stream that it has run on."""
    return torch.cuda.Stream(device)
