"""Text from tokens as they come: only whole characters, and in the end the same text as decoding all at once."""

from collections.abc import Callable


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
