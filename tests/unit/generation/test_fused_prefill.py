"""Whole prompts by fused kernels against the models' own forward; see test_kernels.py for how the kernels run."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton", reason="needs Triton (pip install triton)")

from llmslm.generation import memory, self_check
from llmslm.generation.engine import DecodeEngine
from llmslm.generation.families import read, read_stack
from llmslm.generation.fused_prefill import FusedDecoder, FusedEncoder, FusedPrefill, seen_keys
from llmslm.generation.fused_projector import FusedProjector
from llmslm.generation.memory import Call, Front
from llmslm.generation.prefill import CausalPrefill, causal_mask
from llmslm.generation.prompt_pass import PromptPass
from llmslm.generation.state import DecodeState
from llmslm.models.encoder import Encoder
from tests import tiny as tiny_models
from tests.unit.generation.families import BUILD, EOS, PAD, VOCABULARY, by_generate, prompts, tiny
from tests.unit.generation.test_kernels import COMPILED, DEVICE, HALF, _few_programs, graph_loop  # noqa: F401
from tests.unit.generation.test_prompt_pass import attended, batch_of
from tests.unit.models.compositions import compose

CAUSAL = [family for family in BUILD if not tiny(family).config.is_encoder_decoder]
ENCODERS = ["llama", "gpt2", "qwen2", "qwen3", "smollm3", "opt", "gemma"]


def state_for(model, decoder, batch, capacity):
    state = DecodeState(
        decoder.shape,
        batch=batch,
        capacity=capacity,
        encoder_capacity=0,
        mode="plain",
        penalise=True,
        device=DEVICE,
        dtype=model.dtype,
    )
    state.ask(min_new=0, max_new=4, sampling=None, penalty=1.5)
    return state


def both(model, prompt, mask):
    """Logits and state after the fused pass, and after the model's own."""
    decoder, results = read(model, 128), []
    for kind in (FusedPrefill, CausalPrefill):
        state = state_for(model, decoder, mask.shape[0], mask.shape[1] + 5)
        results.append((kind(model, decoder, state)(prompt, mask), state))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_logits_caches_and_places_are_those_of_the_models_own_forward(family, embedded, dtype):
    model = tiny(family).to(DEVICE, dtype)
    inputs = {name: value.to(DEVICE) for name, value in prompts(model, 3, 19).items()}
    prompt, mask = inputs["input_ids"], inputs["attention_mask"]
    prompt = model.get_input_embeddings()(prompt) if embedded else prompt
    (logits, state), (expected, own) = both(model, prompt, mask)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert (logits - expected).norm() < tolerance * expected.norm()
    kept = mask.bool()
    filled, expected = (s.cache[..., :19, :].permute(2, 4, 0, 1, 3, 5)[kept] for s in (state, own))
    assert (filled - expected).norm() < tolerance * expected.norm()
    assert not state.cache[..., 19:, :].any(), "no place behind the prompt is written"
    for name in ("valid", "position", "slot", "seen"):
        assert torch.equal(getattr(state, name), getattr(own, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_seen_is_what_the_models_are_given(dtype):
    mask = (torch.rand(3, 19, device=DEVICE) < 0.7).long()
    assert torch.equal(seen_keys(mask, dtype), causal_mask(mask.bool(), dtype))


@torch.no_grad()
def test_heads_of_odd_width_with_biases_and_a_prompt_without_a_token():
    config = LlamaConfig(
        hidden_size=72,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        vocab_size=VOCABULARY,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).eval().to(DEVICE)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    prompt = prompts(model, 3, 11)["input_ids"].clamp(min=3).to(DEVICE)
    mask = torch.ones_like(prompt)
    mask[1, :10] = 0
    mask[2] = 0
    (logits, _), (expected, _) = both(model, prompt, mask)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["last", 1, 0])
@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_states_of_an_encoder_are_its_own(family, layer, tmp_path):
    encoder = Encoder.from_source(tiny_models.folder(family, tmp_path), layer=layer).to(DEVICE)
    ids, mask = (value.to(DEVICE) for value in tiny_models.prompts(3))
    fused = FusedEncoder(encoder, read_stack(encoder.model, 64))
    states, _ = encoder(ids, mask, mask - 1)
    torch.testing.assert_close(fused(ids, mask)[mask.bool()], states[mask.bool()], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_base_model_is_read_as_what_has_its_head():
    for family in CAUSAL:
        model = tiny(family)
        whole, stack = read(model, 64), read_stack(model.base_model, 64)
        assert len(stack.sublayers) == len(whole.sublayers)
        for ours, other in zip(stack.sublayers, whole.sublayers, strict=True):
            assert torch.equal(ours.into.weight, other.into.weight)
        assert torch.equal(stack.embedding, whole.embedding)


@pytest.fixture
def by_kernels(monkeypatch):
    """What CUDA devices do, on the CPU."""
    for module in ("loop", "self_check"):
        monkeypatch.setattr(f"llmslm.generation.{module}.prefill_for", FusedPrefill)
    monkeypatch.setattr(
        "llmslm.generation.prompt_pass.encoder_pass_for",
        lambda encoder, positions: FusedEncoder(encoder, read_stack(encoder.model, positions)),
    )
    monkeypatch.setattr(
        "llmslm.generation.prompt_pass.projector_pass_for",
        lambda projector, positions: FusedProjector(projector, positions) if hasattr(projector, "reading") else None,
    )
    monkeypatch.setattr(PromptPass, "_pays", lambda *_: True)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt-post-norm"])
@pytest.mark.skipif(COMPILED, reason="test_cuda.py has the loop with its graphs")
def test_tokens_are_those_of_generate(family, by_kernels, graph_loop):  # noqa: F811
    model = tiny(family)
    inputs = prompts(model, 3, 9)
    engine = DecodeEngine(model, verify=False)
    tokens = engine.generate(**inputs, max_new_tokens=4)
    assert torch.equal(tokens, by_generate(model, inputs, max_new_tokens=4))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    again = engine.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=4)
    assert torch.equal(tokens, again)


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_a_pass_is_held_against_the_models_own(family, by_kernels):
    model = tiny(family).to(DEVICE)
    assert self_check.prompt_difference(model, read(model, 128)) < 1e-4


@torch.no_grad()
def test_a_pass_that_differs_or_fails_is_done_without(by_kernels, monkeypatch):
    model = tiny("llama").to(DEVICE)
    engine = DecodeEngine(model)
    monkeypatch.setattr(engine, "device", torch.device("cuda"))
    assert engine._with_prompts_verified(engine.decoder).reads_prompts
    original = FusedDecoder.__call__
    monkeypatch.setattr(FusedDecoder, "__call__", lambda *args, **kwargs: original(*args, **kwargs) * 1.1)
    with pytest.warns(UserWarning, match=r"prompts go through the model's own forward.* off by"):
        assert not engine._with_prompts_verified(engine.decoder).reads_prompts
    monkeypatch.setattr(FusedDecoder, "__call__", lambda *args, **kwargs: 1 / 0)
    with pytest.warns(UserWarning, match="division by zero"):
        assert not engine._with_prompts_verified(engine.decoder).reads_prompts


@pytest.mark.parametrize("slm", ["llama", "t5"])
@pytest.mark.parametrize("encoder", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_a_composition_is_encoded_by_it(encoder, slm, by_kernels, tmp_path):
    model = compose(encoder, slm, tmp_path).to(DEVICE)
    run, batch = PromptPass(model), batch_of(model, device=DEVICE)
    padded = run.padded(batch)
    result = attended(run(padded))
    assert run._trusted
    assert "encoder" in run._fused
    torch.testing.assert_close(result, attended(model.slm_inputs(**batch)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_encoder_whose_states_differ_runs_by_its_own_forward(by_kernels, monkeypatch, tmp_path):
    model = compose("llama", "llama", tmp_path).to(DEVICE)
    original = FusedDecoder.__call__
    monkeypatch.setattr(FusedDecoder, "__call__", lambda *args, **kwargs: original(*args, **kwargs) * 1.1)
    run, batch = PromptPass(model), batch_of(model, device=DEVICE)
    padded = run.padded(batch)
    with pytest.warns(UserWarning, match="the encoder runs by its own forward"):
        result = attended(run(padded))
    assert run._trusted
    torch.testing.assert_close(result, attended(model.slm_inputs(**batch)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_it_is_predicted_to_need_less_memory_than_the_models_own_forward(family, embedded):
    model = tiny(family)
    decoder = read(model, 128)
    for call in (Call(4, 40, 60, 0, embedded=embedded), Call(1, 8, 16, 0, embedded=embedded)):
        fused = memory._fused_pass_bytes(decoder, call)
        assert 0.25 < fused / memory._pass_bytes(model, decoder, call) < 1


@torch.no_grad()
def test_copies_of_an_encoders_weights_are_predicted(by_kernels, tmp_path):
    model = compose("llama", "llama", tmp_path)
    run, engine = PromptPass(model), DecodeEngine(model.slm, verify=False)
    front = Front(model, "slm_inputs", batch_of(model))
    call_of = partial(engine.call_sizes, 3, max_new_tokens=8, embedded=True)
    without, with_copies = (
        memory.predict_with(replace(front, stack=stack), call_of, model.slm, engine.decoder)[0].weights
        for stack in (None, run.stack)
    )
    fused = [s.into.weight.nbytes for s in run.stack.sublayers]
    assert with_copies - without == sum(fused)
