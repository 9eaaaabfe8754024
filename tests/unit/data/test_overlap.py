"""Two tokenizers over random Unicode: every token is covered, by what it overlaps, and in its own by itself."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmslm.data.overlap import TokenSpans, disjoint, kept_text, spans
from tests.unit.data.tokenizers import bytes_of, pieces, words

KINDS = {
    "bytes": bytes_of,
    "bytes with ends": functools.partial(bytes_of, 290, "<s> $A </s>"),
    "bytes with spaces": functools.partial(bytes_of, 400, "<s> $A", trim=False),
    "words": words,
    "pieces": pieces,
}
PIECES = [
    "the ",
    "Straße",
    "ﬁ",
    "  ",
    "     ",
    "\t",
    "\n",
    "🙂",
    "👩‍👩‍👧",
    "🇮🇹",
    "東京",
    "です。",
    "é",
    "e\u0301",
    "a\u0323\u0307",
    "\u0301",
    "\u200d",
    "İ",
    "한국",
    "x",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), min_size=1, max_size=12).map("".join)


@functools.cache
def tokenizer(kind):
    return KINDS[kind]()


def encode(kind, text):
    return tokenizer(kind)([text]).encodings[0]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_a_tokenizer_with_itself_is_the_identity(kind, text):
    encoding = encode(kind, text)
    expected = [[i, i + 1] for i in range(len(encoding.ids))]
    assert spans(TokenSpans.of(encoding), TokenSpans.of(encoding)).tolist() == expected


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(KINDS, 2)))
@settings(max_examples=25, deadline=None)
@given(text=texts)
def test_every_token_is_covered_in_order(one, other, text):
    tokens, states = encode(one, text), encode(other, text)
    if not states.ids:
        return  # nothing to give: the codec refuses such a prompt
    found = spans(TokenSpans.of(tokens), TokenSpans.of(states))
    assert found.shape == (len(tokens.ids), 2)
    assert (found[:, 0] >= 0).all()
    assert (found[:, 0] < found[:, 1]).all()
    assert (found[:, 1] <= len(states.ids)).all()
    inner = found[[i for i, special in enumerate(tokens.special_tokens_mask) if not special]]
    assert (np.diff(inner, axis=0) >= 0).all()


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(KINDS, 2)))
@settings(max_examples=25, deadline=None)
@given(text=texts)
def test_a_token_is_covered_by_exactly_what_shares_characters_with_it(one, other, text):
    tokens, states = encode(one, text), encode(other, text)
    if _shares(tokens) or _shares(states):
        return  # parts of characters have no offsets of their own to hold the answer against
    found = spans(TokenSpans.of(tokens), TokenSpans.of(states))
    for token, (start, stop) in zip(tokens.offsets, found.tolist(), strict=True):
        expected = [i for i, state in enumerate(states.offsets) if max(token[0], state[0]) < min(token[1], state[1])]
        assert not expected or list(range(start, stop)) == expected


def _shares(encoding):
    inner = [o for o, special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True) if not special]
    return any(start == end for start, end in inner) or any(a[1] > b[0] for a, b in itertools.pairwise(inner))


def test_known_answers():
    encoder, slm = encode("words", "the dog  sleeps"), encode("bytes with ends", "the dog  sleeps")
    found = spans(TokenSpans.of(slm), TokenSpans.of(encoder))
    covered = [(token, encoder.tokens[a:b]) for token, (a, b) in zip(slm.tokens, found.tolist(), strict=True)]
    # The two spaces, which the words' tokenizer drops, take the nearest word each.
    assert covered[:5] == [("<s>", ["<s>"]), ("the", ["the"]), ("Ġdog", ["dog"]), ("Ġ", ["dog"]), ("Ġ", ["sleeps"])]
    assert covered[-1] == ("</s>", ["</s>"])


def test_shared_and_missing_characters_are_divided():
    assert disjoint([(0, 1), (0, 1), (1, 2)]) == [(0, 0.5), (0.5, 1), (1, 2)]
    assert disjoint([(0, 2), (2, 2), (4, 6)]) == [(0, 2), (2, 4), (4, 6)]
    assert disjoint([(0, 2), (2, 2), (2, 4)]) == [(0, 1), (1, 2), (2, 4)]
    assert disjoint([(3, 3), (3, 3)]) == [(0, 0.5), (0.5, 1)]
    assert disjoint([(0, 1), (2, 3), (1, 2)]) == [(0, 1), (1, 2), (2, 3)]
    assert disjoint([]) == []


def test_what_is_left_of_a_cut_text():
    made, text = words(), "the quick brown dog and  the lazy dog"
    for side, expected in (("right", ("the quick brown", 0)), ("left", ("the lazy dog", 25))):
        made.truncation_side = side
        encoding = made([text], truncation=True, max_length=2 + len(made.tokenize(expected[0]))).encodings[0]
        assert kept_text(text, encoding, side) == expected
