"""The Offsets alignment: means of the right states, of the same prompt alone, on either side of padding."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmslm.data.codec import Codec, TextFormat
from llmslm.errors import UserError
from llmslm.models.alignment import EncoderTokenizer, Offsets, SameTokenizer, place_by_rank
from llmslm.models.fusion import CrossAttend, Prefix
from llmslm.models.prompt import ProjectedPrompt
from tests import tiny
from tests.unit.data.test_overlap import texts
from tests.unit.data.tokenizers import bytes_of, pieces, words
from tests.unit.models.compositions import compose

SPANS = torch.tensor([[[0, 1], [1, 3], [2, 3]], [[0, 2], [1, 2], [0, 0]]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def test_each_token_gets_the_mean_of_its_states():
    states = torch.arange(12.0).reshape(2, 3, 2)
    states[1, 2] = torch.nan  # padding must not be read at all
    own = torch.zeros(2, 5, 2)
    attention_mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    aligned = Offsets(2, 2)(own, attention_mask, ProjectedPrompt(states, MASK, spans=SPANS))
    assert aligned.prompt_embeds[0].tolist() == [[0, 0], [0, 1], [3, 4], [4, 5], [0, 0]]
    assert aligned.prompt_embeds[1].tolist() == [[7, 8], [8, 9], [0, 0], [0, 0], [0, 0]]
    assert aligned.on_prompt[..., 0].tolist() == [[False, True, True, True, False], [True, True, False, False, False]]


def test_the_identity_is_the_same_tokenizer_bit_for_bit():
    ids, mask = tiny.prompts()
    states, own = torch.randn(*ids.shape, 8), torch.randn(*ids.shape, 8)
    index = torch.arange(ids.shape[1])
    spans = torch.stack([index, index + 1], dim=-1).expand(len(ids), -1, -1) * mask.unsqueeze(-1)
    one = Offsets(8, 8)(own, mask, ProjectedPrompt(states, mask, spans=spans))
    other = SameTokenizer(8, 8)(own, mask, ProjectedPrompt(states, mask))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def two_tokenizers(model):
    return Codec(
        bytes_of(template="<s> $A"),
        words(),
        text_format=TextFormat(),
        is_encoder_decoder=model.config.is_encoder_decoder,
        decoder_start_token_id=0,
        has_encoder=True,
        prompt_layout=model.prompt_layout,
    )


@pytest.mark.parametrize(
    ("parts", "slm"),
    [
        ({"alignment": Offsets}, "llama"),
        ({"alignment": Offsets}, "t5"),
        ({"fusion": Prefix}, "gpt2"),
        ({"fusion": CrossAttend}, "bart"),
    ],
)
def test_a_batch_of_two_tokenizers_leaks_nothing_between_prompts(parts, slm, tmp_path, monkeypatch):
    for family in {"qwen2", slm}:
        config = tiny.CONFIGS[family]
        wide = type(config).from_dict(config.to_dict() | {"vocab_size": 400, "eos_token_id": None})
        monkeypatch.setitem(tiny.CONFIGS, family, wide)
    model = compose("qwen2", slm, tmp_path, **parts)
    codec = two_tokenizers(model)
    rows = codec.encode(["the quick brown fox", "naïve 東京   🙂", "x"], ["a", "b", "c"])
    together = model(**codec.collate(rows)).logits
    new = model.generate(**codec.collate_prompts(rows), max_new_tokens=4, do_sample=False)[:, -4:]
    for row in range(len(rows)):
        logits = model(**codec.collate(rows[row : row + 1])).logits[0]
        torch.testing.assert_close(together[row, : len(logits)], logits, atol=1e-4, rtol=1e-4)
        alone = model.generate(**codec.collate_prompts(rows[row : row + 1]), max_new_tokens=4, do_sample=False)
        assert torch.equal(alone[0, -4:], new[row])


@pytest.mark.parametrize("slm_tokenizer", [bytes_of, words, pieces])
@settings(max_examples=25, deadline=None)
@given(prompts=st.lists(texts, min_size=2, max_size=4))
def test_random_prompts_are_covered_and_keep_to_themselves(slm_tokenizer, prompts):
    """Where each state says whose prompt it is of, each token of the slm's prompt reads its own prompt's number."""
    tokenizers = _made(slm_tokenizer), _made(words if slm_tokenizer is bytes_of else bytes_of)
    codec = Codec(
        *tokenizers, text_format=TextFormat(), is_encoder_decoder=False, has_encoder=True, prompt_layout="offsets"
    )
    try:
        batch = codec.collate_prompts(codec.encode(prompts))
    except UserError:
        return  # a side that has no token for any of a prompt's characters
    mask, spans, owners = batch["prompt_attention_mask"], batch["prompt_spans"], torch.arange(1.0, len(prompts) + 1)
    states = owners.reshape(-1, 1, 1).expand(-1, mask.shape[1], 2)
    own = torch.zeros(*batch["attention_mask"].shape, 2)
    aligned = Offsets(2, 2)(own, batch["attention_mask"], ProjectedPrompt(states, mask, spans=spans))
    expected = batch["attention_mask"].unsqueeze(-1) * states[:, :1]
    torch.testing.assert_close(aligned.prompt_embeds, expected.expand_as(aligned.prompt_embeds))
    assert torch.equal(aligned.on_prompt[..., 0], batch["attention_mask"].bool())


@functools.cache
def _made(kind):
    return kind()


@pytest.mark.parametrize(("states_len", "input_len"), [(6, 6), (9, 6), (4, 9), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.int32])
def test_states_are_placed_by_rank_whatever_the_padding(states_len, input_len, dtype):
    """By the definition, position by position; attended positions may even have gaps, as packed rows have them."""
    torch.manual_seed(states_len)
    counts = torch.randint(1, states_len + 1, (8,))
    states_mask = (torch.arange(states_len) < counts[:, None]).to(dtype)
    states = torch.randn(8, states_len, 2).masked_fill(~states_mask.bool()[..., None], torch.nan)
    attention_mask = (torch.rand(8, input_len) < 0.7).to(dtype)
    placed, on_prompt = place_by_rank(states, states_mask, attention_mask)
    for row in range(8):
        rank = 0
        for column in range(input_len):
            takes = bool(attention_mask[row, column]) and rank < counts[row]
            assert bool(on_prompt[row, column, 0]) == takes
            assert placed[row, column].tolist() == (states[row, rank].tolist() if takes else [0, 0])
            rank += int(attention_mask[row, column])


def test_the_encoders_embeddings_stand_where_its_states_do():
    ids, mask = tiny.prompts()
    alignment, width = EncoderTokenizer(4, 8), ids.shape[1]
    states, embeds, own = torch.randn(len(ids), width, 8), torch.randn(len(ids), width, 4), torch.randn(*ids.shape, 8)
    for own_mask in (mask, mask.flip(1)):
        aligned = alignment(own, own_mask, ProjectedPrompt(states, mask, embeds))
        placed, on_prompt = place_by_rank(states, mask, own_mask)
        mapped, _ = place_by_rank(alignment.linear(embeds), mask, own_mask)
        assert torch.equal(aligned.prompt_embeds, placed)
        assert torch.equal(aligned.on_prompt, on_prompt)
        assert torch.equal(aligned.inputs_embeds, torch.where(on_prompt, mapped, own))
