"""A training step's forward and backward as one CUDA graph.

A small model's step is a thousand kernels of some microseconds each: the host takes longer to launch them, one by one,
than the device to run them. A graph is launched in one call.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmslm.generation.graphs import capture

Batch = Mapping[str, Tensor]
Result = tuple[Tensor, tuple[Tensor | None, ...]]
"""A loss, and the gradient of each parameter, None where it has none."""
MOST_OF_COPIES = 100_000_000
"""Trained weights of a model with copies on several devices (DDP) up to which a graph serves.

DDP averages gradients while the backward runs, but a graph's come all at once: those of so many are 0.4 GB, which takes
NVLink 2 ms and a network of 50 GB/s 16 ms, where the launches of a small model's step take 20 to 40.
"""
_MOST = 4  # shapes; packed rows have one or two


class GraphedLoss:
    """The loss of batches of a few shapes, and its gradients, by a graph for each shape.

    A graph is captured where a shape comes for the second time; the way to an earlier loss must not be kept then.
    Batches of rare shapes are computed as ever, and so are all from where capturing fails. On other devices than CUDA
    nothing is captured; a replay then computes.

    Args:
        compute: from a batch to its loss, a scalar; must not look at tensors' values from the host.
        parameters: those that require a gradient are trained; they must stay where they are in memory.
    """

    def __init__(self, compute: Callable[[Batch], Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self._compute, self._parameters = compute, [p for p in parameters if p.requires_grad]
        self._device = self._parameters[0].device
        self._graphs: dict[Any, _Graph] = {}
        self._seen: set[Any] = set()
        self._most = _MOST
        self._pool: Any = None
        self._gradients: tuple[Tensor | None, ...] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss of a batch, whose backward must come before the next batch."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(batch.items()))
        if shapes in self._seen and shapes not in self._graphs and len(self._graphs) < self._most:
            self._capture(shapes, batch)
        self._seen.add(shapes)
        graph = self._graphs.get(shapes)
        if graph is None:
            return self._loss(batch)
        loss: Tensor = _Replayed.apply(graph, batch, *self._parameters)
        return loss

    def _capture(self, shapes: Any, batch: Batch) -> None:
        inputs = {name: tensor.clone() for name, tensor in batch.items()}

        def both() -> Result:
            with torch.enable_grad():
                loss = self._loss(inputs)
            with torch.autocast(self._device.type, enabled=False):  # as in any backward
                gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            return loss.detach(), self._in_one_place(gradients)

        if self._device.type != "cuda":
            self._graphs[shapes] = _Graph(inputs, both)
            return
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            # The loader's thread pins memory meanwhile.
            graph, result = capture(both, self._device, pool=self._pool, others_go_on=True)
        except Exception as error:
            self._most, self._pool, self._gradients = 0, None, None
            self._graphs.clear()
            torch.cuda.empty_cache()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"training steps are launched kernel by kernel: {reason}", UserWarning, stacklevel=3)
            return

        def replay() -> Result:
            graph.replay()
            return result

        self._gradients = result[1]
        self._graphs[shapes] = _Graph(inputs, replay)

    def _in_one_place(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Put a further graph's gradients where those of the first one lie."""
        if self._gradients is None:
            return gradients
        pairs = zip(self._gradients, gradients, strict=True)
        kept, new = zip(*[(old, one) for old, one in pairs if old is not None and one is not None], strict=True)
        torch._foreach_copy_(list(kept), list(new))
        return self._gradients

    def _loss(self, batch: Batch) -> Tensor:
        kind = self._device.type
        # A graph must not hold on to casts that a cache made before it.
        with torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        ):
            return self._compute(batch)


class _Graph(NamedTuple):
    """What a replay reads, and the replay; it overwrites the results of replays before, of any shape."""

    inputs: Batch
    replay: Callable[[], Result]


class _Replayed(torch.autograd.Function):
    """Forward computes the gradients, too; backward scales them and hands them over."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, batch: Batch, *_: nn.Parameter) -> Tensor:
        for name, tensor in batch.items():
            graph.inputs[name].copy_(tensor)
        loss, ctx.gradients = graph.replay()
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = iter(torch._foreach_mul([g for g in ctx.gradients if g is not None], scale))
        return None, None, *(None if gradient is None else next(scaled) for gradient in ctx.gradients)
