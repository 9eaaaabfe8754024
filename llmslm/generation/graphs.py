"""CUDA graphs: work that is launched once by the host and replayed as a whole."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
        """Run on these inputs."""
        if self.device.type != "cuda":
            return self.function(*inputs)
        graph, buffers, output = self.prepare(*inputs)
        for buffer, value in zip(buffers, inputs, strict=True):
            buffer.copy_(value)
        graph.replay()
        return output

    @torch.no_grad()
    def prepare(self, *inputs: Tensor) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]:
        """Capture for inputs of these shapes, if that has not been done; this runs the function."""
        key = tuple((tuple(value.shape), value.dtype) for value in inputs)
        if key not in self._graphs:
            while len(self._graphs) >= self.keep:
                self._graphs.pop(next(iter(self._graphs)))
            self._graphs[key] = self._capture(inputs)
        return self._graphs[key]

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]:
        buffers = tuple(value.clone() for value in inputs)
        # Libraries set up their workspaces, and kernels are compiled, on a first run outside the capture.
        side = _warm_up_stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.function(*buffers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                output = self.function(*buffers)
        except BaseException:
            _undo(stream, self.pool)
            raise
        return graph, buffers, output


def _undo(stream: torch.cuda.Stream, pool: Any) -> None:
    """What torch leaves as it was during a capture that fails: current stream and, before 2.12, pool."""
    torch.cuda.set_stream(stream)
    if pool is not None:
        with contextlib.suppress(RuntimeError):  # no pool is in use
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)


@functools.cache
def _warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace, 32 MiB on Hopper, for each stream that it has run on."""
    return torch.cuda.Stream(device)
