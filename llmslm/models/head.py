"""Logits of chosen positions alone: on a large vocabulary, those that nobody asks for are most of a step's work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


@contextmanager
def logits_at(model: PreTrainedModel, rows: Tensor, columns: Tensor, length: int) -> Iterator[None]:
    """Within it, the model's forward returns logits (1, n, vocabulary), of n positions alone.

    The language-model head is shown the states of these positions only; whatever a model does to states before its
    head, or to logits after it, stays as it is.

    Args:
        model: its `get_output_embeddings()` is a module that maps states (batch, len, width) to logits.
        rows: (n,), the row of each position.
        columns: (n,), its column in a sequence of `length`.
        length: of the columns' sequence; where the head sees more (a prefix in front), the columns count from its end.
    """

    def choose(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = inputs[0]
        positions = rows * states.shape[1] + columns + (states.shape[1] - length)
        return (states.flatten(0, 1).index_select(0, positions).unsqueeze(0),)

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
