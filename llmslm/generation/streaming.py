"""Tokens as they come: when the first one is known, and text of whole characters that in the end is the same."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class FirstToken(StoppingCriteria):
    """Lets `generate()` call back once, after the first token; never stops it.

    Args:
        callback: what is called.
    """

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def __call__(self, input_ids: Tensor, _scores: Any, **_kwargs: Any) -> Tensor:
        """Say of each row of (batch, length) ids that it goes on."""
        if self._callback is not None:
            if input_ids.is_cuda:  # asked for, but not there yet
                torch.cuda.synchronize(input_ids.device)
            self._callback()
            self._callback = None
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class TextStream:
    """Turns tokens into pieces of text.

    A piece is held back while its last character lacks bytes, and white space until something follows it: texts have
    none at their ends.

    Args:
        decode: ids to text.
        emit: gets each piece.
    """

    def __init__(self, decode: Callable[[list[int]], str], emit: Callable[[str], None]) -> None:
        self._decode, self._emit = decode, emit
        self._ids: list[int] = []
        self._begin = self._shown = 0
        self._space: str | None = None  # white space that waits; None before the first character

    def feed(self, ids: list[int]) -> None:
        """Take new tokens."""
        self._ids += ids
        self._advance(incomplete_too=False)

    def finish(self) -> None:
        """Give out what was held back, if it is more than white space."""
        self._advance(incomplete_too=True)

    def _advance(self, *, incomplete_too: bool) -> None:
        """Decode from the tokens shown last: what a text begins with depends on whether something stands before it."""
        known = self._decode(self._ids[self._begin : self._shown])
        text = self._decode(self._ids[self._begin :])
        if text.endswith("\ufffd") and not incomplete_too:
            return
        self._show(text[len(known) :])
        if self._decode(self._ids[self._shown :]).strip():
            self._begin = self._shown
        self._shown = len(self._ids)

    def _show(self, text: str) -> None:
        if self._space is None:
            text = text.lstrip()
        kept = text.rstrip()
        if kept:
            self._emit((self._space or "") + kept)
            self._space = ""
        if self._space is not None:
            self._space += text[len(kept) :]
