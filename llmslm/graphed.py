"""A training step's forward and backward as one CUDA graph.

A small model's step is a thousand kernels of some microseconds each: the host takes longer to launch them, one by one,
than the device to run them. A graph is launched in one call.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmslm.generation.graphs import capture

Batch = Mapping[str, Tensor]


class GraphedLoss:
    """The loss of batches of one shape, and its gradients, by one graph.

    It is captured where two batches of the same shape follow each other, in place of an earlier one. A batch of another
    shape is computed as ever, and so are all if capturing fails. On other devices than CUDA nothing is captured; a
    replay then computes.

    Args:
        compute: from a batch to its loss, a scalar; must not look at tensors' values from the host.
        parameters: those that require a gradient are trained; they must stay where they are in memory.
    """

    def __init__(self, compute: Callable[[Batch], Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self._compute, self.parameters = compute, [p for p in parameters if p.requires_grad]
        self._device = self.parameters[0].device
        self._captures = True
        self._last: Any = None
        self._inputs: Batch = {}
        self._replay: Callable[[], Any] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss of a batch, whose backward must come before the next batch."""
        shapes, last = _shapes(batch), self._last
        self._last = shapes
        if shapes == last and self._captures and not self._is_for(batch):
            self._capture(batch)
        if not self._is_for(batch):
            return self._loss(batch)
        loss: Tensor = _Replayed.apply(self, batch, *self.parameters)
        return loss

    def run(self, batch: Batch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return the loss and the gradient of each parameter, None where it has none; the next run overwrites them."""
        assert self._replay is not None
        for name, tensor in batch.items():
            self._inputs[name].copy_(tensor)
        result: tuple[Tensor, tuple[Tensor | None, ...]] = self._replay()
        return result

    def _is_for(self, batch: Batch) -> bool:
        return self._replay is not None and _shapes(self._inputs) == _shapes(batch)

    def _capture(self, batch: Batch) -> None:
        self._replay = None  # the memory of the graph before, for the next one
        self._inputs = {name: tensor.clone() for name, tensor in batch.items()}
        if self._device.type != "cuda":
            self._replay = self._both
            return
        try:
            # The loader's thread pins memory meanwhile.
            graph, result = capture(self._both, self._device, others_go_on=True)
        except Exception as error:
            self._captures = False
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"training steps are launched kernel by kernel: {reason}", UserWarning, stacklevel=2)
            return

        def replay() -> Any:
            graph.replay()
            return result

        self._replay = replay

    def _both(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        with torch.enable_grad():
            loss = self._loss(self._inputs)
        return loss.detach(), torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def _loss(self, batch: Batch) -> Tensor:
        kind = self._device.type
        # A graph must not hold on to casts that a cache made before it.
        with torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        ):
            return self._compute(batch)


def _shapes(batch: Batch) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()}


class _Replayed(torch.autograd.Function):
    """Forward computes the gradients, too; backward scales them and hands them over."""

    @staticmethod
    def forward(ctx: Any, graphed: GraphedLoss, batch: Batch, *_: nn.Parameter) -> Tensor:
        loss, ctx.gradients = graphed.run(batch)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = iter(torch._foreach_mul([g for g in ctx.gradients if g is not None], scale))
        return None, None, *(None if gradient is None else next(scaled) for gradient in ctx.gradients)
