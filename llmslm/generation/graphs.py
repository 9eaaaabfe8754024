"""CUDA graphs: work that is launched once by the host and replayed as a whole."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 8192
"""Of the prompts of a batch, on both sides together, for which a graph pays: above it the device computes longer than
the host launches."""
_ALIGNED = 16  # elements: where an input begins, kernels read as if it were alone


class Turns:
    """Keeps calls that share buffers in turn, also where they are launched on different streams.

    A call may return while the last of what it launched still runs: on one stream the next one's work waits by itself.

    Args:
        device: where the buffers lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: torch.cuda.Stream | None = None

    def take(self) -> None:
        """Begin a call, before anything of it is launched."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None and stream != self._last:
            stream.wait_stream(self._last)
        self._last = stream


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
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Places, Any]] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        """Run on these inputs, which may lie elsewhere: they are copied."""
        if self.device.type != "cuda":
            with torch.no_grad():
                return self.function(*inputs)
        graph, places, output = self._ready(inputs)
        if inputs:
            places.fill(inputs)
        graph.replay()
        return output

    def knows(self, *inputs: Tensor) -> bool:
        """Say whether there is a graph for inputs of these shapes, which then needs no further memory."""
        return _key(inputs) in self._graphs

    def prepare(self, *inputs: Tensor) -> None:
        """Capture for inputs of these shapes, if that has not been done; this runs the function."""
        self._ready(inputs)

    def _ready(self, inputs: tuple[Tensor, ...]) -> "tuple[torch.cuda.CUDAGraph, Places, Any]":
        key = _key(inputs)
        found = self._graphs.get(key)
        if found is None:
            while len(self._graphs) >= self.keep:
                self._graphs.pop(next(iter(self._graphs)))
            found = self._graphs[key] = self._capture(inputs)
        return found

    @torch.no_grad()
    def _capture(self, inputs: tuple[Tensor, ...]) -> "tuple[torch.cuda.CUDAGraph, Places, Any]":
        places = Places(inputs, self.device)
        places.fill(inputs)
        function = functools.partial(self.function, *places.tensors)
        graph, output = capture(function, self.device, pool=self.pool, generators=self.generators)
        return graph, places, output


def _key(inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tuple([(value.shape, value.dtype) for value in inputs])


class Places:
    """Where a graph reads its inputs.

    Those that come from the host are small, and each copy takes the host longer than the device: those of one dtype lie
    one behind another, here as there, and are copied as one.

    Args:
        inputs: like those to come; what lies on the host is expected to come from there again, but need not.
        device: where the graph reads.
    """

    def __init__(self, inputs: Sequence[Tensor], device: torch.device) -> None:
        numbers: dict[torch.dtype, list[int]] = {}
        for number, value in enumerate(inputs):
            if value.is_cpu:
                numbers.setdefault(value.dtype, []).append(number)
        with torch.inference_mode(False):  # later calls may come from outside of it
            self._shared = [_Shared(inputs, of_dtype, device) for of_dtype in numbers.values() if len(of_dtype) > 1]
            places = {number: place for shared in self._shared for number, place in shared.places()}
            self._single = [number for number in range(len(inputs)) if number not in places]
            places |= {number: torch.empty_like(inputs[number], device=device) for number in self._single}
        self.tensors = [places[number] for number in range(len(inputs))]

    @torch.no_grad()
    def fill(self, inputs: Sequence[Tensor]) -> None:
        """Copy inputs of the same shapes; what runs after it on the device's stream reads them."""
        single = self._single
        for shared in self._shared:
            if not shared.fill(inputs):
                single = single + shared.numbers
        for number in single:  # in turn with the graph; from the host no copy waits for another
            self.tensors[number].copy_(inputs[number], non_blocking=True)


class _Shared:
    """Inputs of one dtype that lie one behind another.

    The host's side is not pinned: such a copy has read it before it returns, so the next call may write there at once.
    """

    def __init__(self, inputs: Sequence[Tensor], numbers: list[int], device: torch.device) -> None:
        self.numbers, self._shapes = numbers, [inputs[number].shape for number in numbers]
        room = [-(-shape.numel() // _ALIGNED) * _ALIGNED for shape in self._shapes]
        self._begins = [sum(room[:place]) for place in range(len(room))]
        self.here = torch.zeros(sum(room), dtype=inputs[numbers[0]].dtype)
        self.there = torch.zeros_like(self.here, device=device)
        self._parts = self._views(self.here)

    def places(self) -> Iterator[tuple[int, Tensor]]:
        """Say where on the device the inputs lie, each with its number."""
        return zip(self.numbers, self._views(self.there), strict=True)

    def _views(self, buffer: Tensor) -> list[Tensor]:
        pairs = zip(self._begins, self._shapes, strict=True)
        return [buffer[begin : begin + shape.numel()].view(shape) for begin, shape in pairs]

    def fill(self, inputs: Sequence[Tensor]) -> bool:
        """Copy the host's inputs; or else say that not all of them are."""
        values = [inputs[number] for number in self.numbers]
        if not all(value.is_cpu for value in values):
            return False
        torch._foreach_copy_(self._parts, values)
        self.there.copy_(self.here, non_blocking=True)
        return True


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
