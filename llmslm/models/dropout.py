"""Residual dropout for architectures without one: small data needs it, and Llama's were made for large."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmslm.errors import UserError
from llmslm.models.blocks import blocks


def add_dropout(model: PreTrainedModel, rate: float) -> int:
    """Drop from what each attention and each feed-forward layer adds to the residual stream, while training.

    Nothing is added to the weights, so what is saved is the architecture as transformers knows it.

    Args:
        model: a language model whose blocks have no dropout layers.
        rate: share of values that become 0.

    Returns:
        The number of layers.

    Raises:
        UserError: if the rate is none, or the architecture has its own dropout, which its config sets.
    """
    if not 0 < rate < 1:
        raise UserError(f"model.dropout is {rate}; expected more than 0 and less than 1")
    if any(isinstance(module, nn.Dropout) for module in model.modules()):
        raise UserError(
            f"{model.config.model_type} has dropout of its own: set it in the model's config instead of model.dropout"
        )
    branches = [part for block in blocks(model) for part in block.children() if _is_branch(part)]
    for branch in branches:
        branch.register_forward_hook(_Drop(rate))
    return len(branches)


def _is_branch(part: nn.Module) -> bool:
    """Whether a block's part is attention or feed-forward: norms have no matrices."""
    return any(parameter.dim() > 1 for parameter in part.parameters())


class _Drop:
    """A forward hook; a class, since a compiled block is guarded by what its hooks are."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        dropped: Tensor = nn.functional.dropout(states, self.rate, module.training)
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped
