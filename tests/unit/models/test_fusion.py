"""Every fusion: the contracts of the composition, on each family of slm that it serves."""

import copy
import itertools

import pytest
import torch

from llmslm.errors import UserError
from llmslm.generation.engine import DecodeEngine
from llmslm.models.alignment import HIDES_PROMPT, EncoderTokenizer
from llmslm.models.fusion import CrossAttend, GatedAdd, Prefix, PrefixOnly, ReplaceEncoder
from llmslm.models.modeling import LlmToSlm
from llmslm.models.projector import Resampler
from tests import tiny
from tests.unit.models.compositions import bare, compose, generate, left, open_gates, training_batch, until_end

FUSIONS = [GatedAdd, Prefix, PrefixOnly, CrossAttend]
CASES = [*itertools.product(FUSIONS, tiny.FAMILIES), (ReplaceEncoder, "t5"), (ReplaceEncoder, "bart")]
ENCODERS = dict(zip(tiny.FAMILIES, ["llama", "t5", "bart", "qwen2", "gpt2"], strict=True))
cases = pytest.mark.parametrize(("fusion", "slm"), CASES, ids=lambda x: getattr(x, "__name__", x))


def make(fusion, slm, tmp_path, **kwargs):
    """A composition whose gates are open, so that states matter."""
    return open_gates(compose(ENCODERS[slm], slm, tmp_path, fusion=fusion, **kwargs))


@cases
def test_cache_batch_and_padding_change_no_prediction_nor_does_reloading(fusion, slm, tmp_path):
    model = make(fusion, slm, tmp_path)
    ids, mask = tiny.prompts()
    batched = generate(model, ids, mask)
    assert torch.equal(batched, generate(model, ids, mask, use_cache=False))
    wide = torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(mask, (0, 3))
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = generate(model, ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert until_end(alone[0]) == until_end(batched[row])
        assert until_end(generate(model, *wide)[row]) == until_end(batched[row])
    model.save_pretrained(tmp_path / "system")
    again = LlmToSlm.from_pretrained(tmp_path / "system").eval()
    assert torch.equal(generate(again, ids, mask), batched)


@cases
def test_it_decodes_what_it_was_trained_on_and_the_states_count(fusion, slm, tmp_path):
    """Teacher forcing along a prediction finds each of its tokens again, but not with another prompt's states."""
    model = make(fusion, slm, tmp_path)
    ids, mask = tiny.prompts()
    predicted = generate(model, ids, mask)[:, :5]
    batch = training_batch(model, ids, mask)
    for row in range(len(ids)):
        count = len(until_end(predicted[row]))
        batch["labels"][row, batch["labels"][row] != -100] = predicted[row]
        if not model.config.is_encoder_decoder:
            batch["input_ids"][row] = torch.where(
                batch["labels"][row] == -100, batch["input_ids"][row], batch["labels"][row]
            )
        logits = model(**{k: v[row : row + 1] for k, v in batch.items()}).logits[0]
        if not model.config.is_encoder_decoder:
            logits = logits[:-1][batch["labels"][row, 1:] != -100]
        assert logits.argmax(-1)[:count].tolist() == predicted[row, :count].tolist()
    logits = model(**batch).logits
    assert logits.shape[1] == (5 if model.config.is_encoder_decoder else batch["input_ids"].shape[1])
    other = batch | {"prompt_ids": ids.roll(1, 0)}
    assert (model(**other).logits - logits).abs().max() > 1e-3


@cases
def test_training_reaches_every_part_but_the_encoder(fusion, slm, tmp_path):
    model = make(fusion, slm, tmp_path).train()
    output = model(**training_batch(model, *tiny.prompts()))
    output.loss.backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.fusion.parameters())
    assert all(p.grad is not None for p in model.slm.parameters() if p.requires_grad)
    copy.deepcopy(model)  # as averaging of weights does in the middle of training


@cases
def test_the_engine_decodes_what_generate_does(fusion, slm, tmp_path):
    model = make(fusion, slm, tmp_path)
    ids, mask = tiny.prompts()
    expected = generate(model, ids, mask)
    if model.prompt_layout in HIDES_PROMPT:
        own = torch.ones(len(ids), 1, dtype=torch.long)
        own_mask = torch.ones_like(own)
    else:
        own, own_mask = (ids, mask) if model.config.is_encoder_decoder else (left(ids, mask), left(mask, mask))
    engine = DecodeEngine(model.slm)
    assert (engine.reason is None) == (fusion is not CrossAttend)
    with torch.no_grad():
        inputs = model.slm_inputs(own, own_mask, ids, mask)
        if fusion is CrossAttend:
            with pytest.warns(UserWarning, match="hooks change what its layers do"):
                tokens = engine.generate(**inputs, max_new_tokens=8)
        else:
            tokens = engine.generate(**inputs, max_new_tokens=8)
    assert [until_end(row) for row in tokens] == [until_end(row) for row in expected]


@pytest.mark.parametrize("slm", tiny.FAMILIES)
@pytest.mark.parametrize("fusion", [GatedAdd, CrossAttend])
def test_a_closed_gate_leaves_the_slm_as_it_is_bit_for_bit(fusion, slm, tmp_path):
    model = compose(ENCODERS[slm], slm, tmp_path, fusion=fusion)
    batch = training_batch(model, *tiny.prompts())
    logits = model(**batch).logits
    alone = tiny.build(slm)
    alone.load_state_dict(model.slm.state_dict())
    assert torch.equal(logits, alone(**bare(model, batch)).logits)


@pytest.mark.parametrize("slm", ["llama", "bart"])
@pytest.mark.parametrize("fusion", [Prefix, PrefixOnly, CrossAttend])
def test_a_resampler_hands_over_the_same_number_of_states_for_any_prompt(fusion, slm, tmp_path):
    model = make(fusion, slm, tmp_path, projector=lambda *widths: Resampler(*widths, states=4, layers=1))
    ids, mask = tiny.prompts()
    alone = [generate(model, ids[i : i + 1, :n], mask[i : i + 1, :n])[0] for i, n in enumerate(mask.sum(1).tolist())]
    assert [until_end(row) for row in generate(model, ids, mask)] == [until_end(row) for row in alone]
    if fusion is PrefixOnly:
        prompt = model.embed_prompt(ids[:, :1], mask[:, :1], ids, mask)
        assert prompt.inputs_embeds.shape[1] == 5


def test_cross_attention_serves_beams_and_every_second_layer(tmp_path):
    model = make(lambda *widths: CrossAttend(*widths, every=2), "llama", tmp_path)
    assert len(model.fusion.layers) == 2
    assert list(model.metrics()) == ["fusion/out_0", "fusion/out_2"]
    # two layers of norm, queries and outputs of width 32
    assert sum(p.numel() for p in model.fusion.step_parameters()) == 2 * (32 + 2 * 32 * 32)
    ids, mask = tiny.prompts()
    beams = generate(model, ids, mask, num_beams=3)
    assert until_end(beams[1]) == until_end(generate(model, ids[1:2, :7], mask[1:2, :7], num_beams=3)[0])
    generate(model, ids, mask)
    with pytest.raises(ValueError, match="called with 2 rows after 3 prompts"):
        model.slm(ids[:2])


def test_the_own_encoder_is_neither_kept_nor_trained(tmp_path):
    model = make(ReplaceEncoder, "t5", tmp_path)
    encoder, decoder = model.slm.get_encoder(), model.slm.get_decoder()
    own = {id(p) for p in encoder.parameters()} - {id(p) for p in decoder.parameters()}
    assert len(encoder.block) == 0
    assert not any(p.requires_grad for p in model.slm.parameters() if id(p) in own)
    assert decoder.embed_tokens.weight.requires_grad


def test_states_start_at_the_scale_of_what_they_stand_for(tmp_path):
    ids, mask = tiny.prompts()
    for fusion, slm in ((ReplaceEncoder, "t5"), (Prefix, "gpt2")):
        own = tiny.build(slm)
        expected = fusion(32, 32).reference(own).square().mean().sqrt()
        model = compose("llama", slm, tmp_path, fusion=fusion)
        states = model.projector(*model.encode(ids, mask))[mask.bool()]
        torch.testing.assert_close(states.square().mean().sqrt(), expected, rtol=0.05, atol=0)


def test_parts_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"Resampler compresses the prompt.*set model.fusion to Prefix"):
        compose("t5", "t5", tmp_path, projector=Resampler)
    with pytest.raises(UserError, match=r"fusion Prefix aligns nothing: remove model.alignment EncoderTokenizer"):
        compose("t5", "t5", tmp_path, fusion=Prefix, alignment=EncoderTokenizer)
    with pytest.raises(UserError, match="ReplaceEncoder needs an encoder-decoder slm, 'gpt2' has no encoder"):
        compose("t5", "gpt2", tmp_path, fusion=ReplaceEncoder)
    with pytest.raises(UserError, match="every=0"):
        CrossAttend(32, 32, every=0)
