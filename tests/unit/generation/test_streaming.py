"""Pieces of a stream are whole characters and add up to the text that decoding all at once gives."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmslm.generation.streaming import TextStream
from tests.unit.data.test_codec import byte_tokenizer

TEXT = "  def f(x):\n    return 'naïve 東京 🙂👩‍👩‍👧' # ünïcödé  \n\n"


def metaspace_tokenizer():
    """Words with a mark for the space before them, as SentencePiece has."""
    words = ["▁a", "▁longer", "▁word", "s", "▁東京", "▁", "."]
    vocabulary = {"</s>": 0} | {word: i for i, word in enumerate(words, start=1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def stream(tokenizer, ids, sizes=1):
    pieces = []
    text = TextStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), pieces.append)
    while ids:
        text.feed(ids[:sizes])
        ids = ids[sizes:]
    text.finish()
    return pieces


@pytest.mark.parametrize("sizes", [1, 3, 50])
def test_multi_byte_characters_come_whole(sizes):
    tokenizer = byte_tokenizer()
    ids = [*tokenizer(TEXT, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    pieces = stream(tokenizer, ids, sizes)
    assert "".join(pieces) == TEXT.strip()
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > len(ids) / sizes / 4


def test_any_tokens_add_up_to_their_text():
    rng = random.Random(0)
    for tokenizer in (byte_tokenizer(), metaspace_tokenizer()):
        for _ in range(200):
            ids = rng.choices(range(len(tokenizer)), k=12)
            assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_bytes_that_never_become_a_character_are_shown_in_the_end():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a東", add_special_tokens=False).input_ids[:-1]
    assert "".join(stream(tokenizer, ids)) == "a\ufffd"
