"""Which tokens of one tokenizer overlap those of another, by the characters of the text that they stand for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from tokenizers import Encoding

_EPSILON = 1e-6


@dataclass(frozen=True)
class TokenSpans:
    """Where the tokens of one text lie in it.

    starts, ends: of the text's own tokens, in characters; ordered intervals, none empty, none sharing anything.
    leading, trailing: numbers of special tokens before and after them.
    """

    starts: np.ndarray
    ends: np.ndarray
    leading: int
    trailing: int

    @classmethod
    def of(cls, encoding: Encoding, shift: int = 0) -> Self:
        """Read a fast tokenizer's encoding of a text that begins `shift` characters into the whole one."""
        first, last = _text_tokens(encoding)
        intervals = np.array(disjoint(encoding.offsets[first:last]), dtype=np.float64).reshape(-1, 2) + shift
        return cls(intervals[:, 0], intervals[:, 1], first, len(encoding.ids) - last)


def disjoint(offsets: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
    """Turn tokens' offsets into ordered intervals of which none is empty and no two share anything.

    Tokens that share characters (the bytes of an emoji, a ligature taken apart) get equal parts of them; a token that
    has none (a trimmed space) gets what lies between its neighbours, or a part of a neighbour.
    """
    groups: list[tuple[int, int, int]] = []
    for start, end in _filled(offsets):
        members = 1
        while groups and start < groups[-1][1]:
            low, high, count = groups.pop()
            start, end, members = min(low, start), max(high, end), members + count
        groups.append((start, end, members))
    return [(low + (high - low) * i / n, low + (high - low) * (i + 1) / n) for low, high, n in groups for i in range(n)]


def spans(tokens: TokenSpans, states: TokenSpans) -> np.ndarray:
    """Return (tokens, 2): for each token the states [start, stop) that overlap it, at least one.

    A token that overlaps none (spaces that the other tokenizer drops) takes the nearest; special tokens take those at
    the same end of the text, counted from it.
    """
    inner = _inner_spans(tokens, states) + states.leading
    count = states.leading + len(states.starts) + states.trailing
    before = [min(i, max(states.leading - 1, 0)) for i in range(tokens.leading)]
    after = [count - 1 - min(i, max(states.trailing - 1, 0)) for i in range(tokens.trailing)][::-1]
    return np.concatenate([_single(before), inner, _single(after)]).clip(0, count)


def kept_text(text: str, encoding: Encoding, cut: Literal["left", "right"]) -> tuple[str, int]:
    """Return the part of a text that a cut encoding of it still covers, and where that part begins."""
    first, last = _text_tokens(encoding)
    kept = [span for span in encoding.offsets[first:last] if span[1] > span[0]]
    if not kept:
        return text, 0
    begin = min(start for start, _ in kept) if cut == "left" else 0
    end = max(stop for _, stop in kept) if cut == "right" else len(text)
    return text[begin:end], begin


def _text_tokens(encoding: Encoding) -> tuple[int, int]:
    """Return where the text's tokens begin and end: what the tokenizer adds stands outside."""
    of_text = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    return (of_text[0], of_text[-1] + 1) if of_text else (len(encoding.ids), len(encoding.ids))


def _filled(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Give a span to tokens that have none."""
    filled: list[tuple[int, int]] = []
    previous: tuple[int, int] | None = None
    for place, (start, end) in enumerate(offsets):
        if start < end:
            previous = (start, end)
            filled.append(previous)
            continue
        following = next((span for span in offsets[place + 1 :] if span[0] < span[1]), None)
        reached = previous[1] if previous else 0
        if following is not None and reached < following[0]:
            filled.append((reached, following[0]))
        else:
            filled.append(previous or following or (0, 1))
    return filled


def _inner_spans(tokens: TokenSpans, states: TokenSpans) -> np.ndarray:
    if not len(states.starts):
        return _single([0] * len(tokens.starts)) - states.leading
    start = np.searchsorted(states.ends, tokens.starts + _EPSILON, side="right")
    stop = np.searchsorted(states.starts, tokens.ends - _EPSILON, side="left")
    last = len(states.starts) - 1
    before, after = (start - 1).clip(0, last), start.clip(0, last)
    nearer = np.where(tokens.starts - states.ends[before] <= states.starts[after] - tokens.ends, before, after)
    nearer = np.where(start == 0, 0, np.where(start > last, last, nearer))
    overlap = stop > start
    return np.stack([np.where(overlap, start, nearer), np.where(overlap, stop, nearer + 1)], axis=1)


def _single(indices: Sequence[int]) -> np.ndarray:
    values = np.array(indices, dtype=np.int64)
    return np.stack([values, values + 1], axis=1)
