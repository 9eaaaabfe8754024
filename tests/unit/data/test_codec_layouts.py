"""The codec with two tokenizers: what stands on the slm's prompt positions in each layout."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llmslm.data.codec import IGNORED, Codec, TextFormat
from llmslm.errors import UserError
from llmslm.generation.state import padded_batch
from llmslm.models.alignment import HIDES_PROMPT
from tests.unit.data.tokenizers import bytes_of, pieces, words

TEXTS = ["the dog sleeps", "naïve 東京  🙂 fox"]


def make(layout, encoder_tokenizer="words", is_encoder_decoder=False, **text_format):
    encoder = words() if encoder_tokenizer == "words" else encoder_tokenizer
    return Codec(
        bytes_of(template="<s> $A"),
        encoder,
        text_format=TextFormat(**text_format),
        is_encoder_decoder=is_encoder_decoder,
        decoder_start_token_id=0,
        has_encoder=True,
        prompt_layout=layout,
    )


@pytest.mark.parametrize("layout", ["own", "offsets"])
def test_each_side_reads_its_own_tokens(layout):
    codec = make(layout)
    batch = codec.collate(codec.encode(TEXTS, ["a", "b"]))
    for row, text in enumerate(TEXTS):
        own, theirs = codec.slm_tokenizer(text).input_ids, codec.encoder_tokenizer(text).input_ids
        assert batch["input_ids"][row, : len(own)].tolist() == own
        assert batch["prompt_ids"][row, : len(theirs)].tolist() == theirs
        assert (batch["labels"][row] == IGNORED).sum() == batch["labels"].shape[1] - 2


def test_spans_cover_each_prompt_token_and_nothing_else():
    codec = make("offsets")
    rows = codec.encode(TEXTS)
    batch = codec.collate_prompts(rows)
    for row, tokens in enumerate(rows):
        spans = batch["prompt_spans"][row]
        covered = spans[:, 1] > spans[:, 0]
        assert covered.sum() == covered[: len(tokens["input_prompt_ids"])].sum() == len(tokens["input_prompt_ids"])
        assert spans.max() <= len(tokens["prompt_ids"])


def test_the_slm_reads_what_is_left_of_a_cut_prompt():
    for side, kept in (("right", "the dog sleeps"), ("left", "the lazy dog")):
        text = "the dog sleeps and  the lazy dog"
        limit = 2 + len(words().tokenize(kept))
        codec = make("offsets", max_prompt_tokens=limit, truncate_prompt=side)
        row = codec.encode([text])[0]
        assert codec.decode([row["input_prompt_ids"]]) == [kept]
        assert row["cut_prompt_tokens"] == [len(words()(text).input_ids) - limit]
        alone = codec.encode([kept])[0]
        assert row["prompt_spans"] == alone["prompt_spans"]


@pytest.mark.parametrize("layout", HIDES_PROMPT)
@pytest.mark.parametrize("is_encoder_decoder", [True, False])
def test_some_layouts_hide_the_prompt_from_the_slm(is_encoder_decoder, layout):
    codec = make(layout, is_encoder_decoder=is_encoder_decoder)
    batch = codec.collate_prompts(codec.encode(TEXTS))
    assert batch["input_ids"].tolist() == [[1], [1]]
    assert batch["prompt_ids"].shape[1] > 1


def test_one_tokenizer_makes_the_own_layout_the_same_ids():
    codec = make("own", encoder_tokenizer=None)
    batch = codec.collate_prompts(codec.encode(TEXTS[:1]))
    assert torch.equal(batch["input_ids"], batch["prompt_ids"])


def test_a_prompt_that_one_side_cannot_see_is_refused():
    with pytest.raises(UserError, match="a prompt has no tokens"):
        Codec(
            words(template=None),
            pieces(),
            text_format=TextFormat(),
            is_encoder_decoder=False,
            has_encoder=True,
            prompt_layout="own",
        ).encode(["   "])


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
@pytest.mark.parametrize("layout", ["offsets", "own", "placeholders", "start"])
def test_a_batch_may_be_made_as_long_as_it_is_padded_later(layout, is_encoder_decoder):
    codec = make(layout, is_encoder_decoder=is_encoder_decoder)
    codec.pad_id = codec.encoder_pad_id = 5  # within the batch; further positions hold what any model has
    rows = codec.encode(TEXTS)
    asked = []

    def length(name, tokens):
        return -(-tokens // 7) * 7 if name.startswith("prompt_") else tokens + 3

    def lengths(count, longest):
        asked.append((count, dict(longest)))
        return {name: length(name, tokens) for name, tokens in longest.items()}

    short, long = codec.collate_prompts(rows), codec.collate_prompts(rows, lengths)
    expected = padded_batch(short, length, left=not is_encoder_decoder)
    assert {name: value.tolist() for name, value in long.items()} == {n: v.tolist() for n, v in expected.items()}
    sides = [name for name in ("input_ids", "prompt_ids", "prompt_spans") if name in short]
    assert asked == [(len(TEXTS), {name: short[name].shape[1] for name in sides})]


@pytest.mark.parametrize("kind", [bytes_of, words, pieces])
def test_ids_without_characters_are_those_of_the_tokenizer(kind):
    tokenizer, texts = kind(), [*TEXTS, "<s> in </s> the text", "  two  spaces ", "🙂é"]
    codec = Codec(tokenizer, text_format=TextFormat(), is_encoder_decoder=False)
    tokenizer(texts, truncation=True, max_length=3, padding=True)  # the backend remembers both
    found = []
    for split in (False, True):
        tokenizer.split_special_tokens = split
        found.append([row["input_prompt_ids"] for row in codec.encode(texts)])
        assert found[-1] == tokenizer(texts).input_ids
    assert found[0] != found[1], "the case is void otherwise"


def test_a_tokenizer_with_a_way_of_its_own_goes_it():
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **kwargs):
            return super()._encode_plus([part.upper() for part in text], **kwargs)

    plain = bytes_of()
    ids = []
    for kind in (PreTrainedTokenizerFast, Shouting):
        tokenizer = kind(tokenizer_object=plain.backend_tokenizer, pad_token="<pad>", eos_token="</s>")
        codec = Codec(tokenizer, text_format=TextFormat(), is_encoder_decoder=False)
        ids.append([codec.encode([text])[0]["input_prompt_ids"] for text in ("abc", "ABC")])
    assert ids[1] == [ids[0][1]] * 2 != ids[0]
