"""Whole prompts by fused kernels against the models' own forward; see test_kernels.py for how the kernels run."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton", reason="needs Triton (pip install triton)")

from llmslm.generation import fused_prefill, fused_rows, memory, self_check, verified_loop
from llmslm.generation.engine import DecodeEngine
from llmslm.generation.families import read, read_stack
from llmslm.generation.fused_prefill import FusedDecoder, FusedEncoder, FusedPrefill, FusedReader, seen_keys
from llmslm.generation.fused_projector import FusedProjector
from llmslm.generation.memory import Call, Front
from llmslm.generation.prefill import CausalPrefill, causal_mask
from llmslm.generation.prompt_pass import HostReads, PromptPass
from llmslm.generation.state import DecodeState
from llmslm.generation.verified import VerifiedEngine
from llmslm.models.encoder import Encoder, pad_right
from llmslm.models.fusion import Prefix
from llmslm.models.shared_encoder import SharedEncoder
from tests import tiny as tiny_models
from tests.unit.generation.families import BUILD, EOS, PAD, VOCABULARY, by_generate, prompts, tiny
from tests.unit.generation.test_kernels import COMPILED, DEVICE, HALF, _few_programs, graph_loop  # noqa: F401
from tests.unit.generation.test_prompt_pass import attended, batch_of, padded_for
from tests.unit.generation.test_verified import batch as sides_of
from tests.unit.generation.test_verified import engine as verified_engine
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
    length = 19 if dtype == torch.float32 else 10  # few enough for the kernels of short prompts, whatever the norms
    inputs = {name: value.to(DEVICE) for name, value in prompts(model, 3, length).items()}
    prompt, mask = inputs["input_ids"], inputs["attention_mask"]
    prompt = model.get_input_embeddings()(prompt) if embedded else prompt
    (logits, state), (expected, own) = both(model, prompt, mask)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert (logits - expected).norm() < tolerance * expected.norm()
    kept = mask.bool()
    filled, expected = (s.cache[..., :length, :].permute(2, 4, 0, 1, 3, 5)[kept] for s in (state, own))
    assert (filled - expected).norm() < tolerance * expected.norm()
    assert not state.cache[..., length:, :].any(), "no place behind the prompt is written"
    for name in ("valid", "position", "slot", "seen"):
        assert torch.equal(getattr(state, name), getattr(own, name))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt"])
@torch.no_grad()
def test_short_and_long_prompts_in_16_bits_are_off_alike(family):
    """From float32 with the same weights: both round, at other places, and layers of large weights amplify it."""
    model = tiny(family).to(DEVICE, HALF)
    exact = deepcopy(model).float()
    for batch, length in [(1, 60), (2, 13), (1, 120)]:  # of layer norms the second alone is short
        inputs = [value.to(DEVICE) for value in prompts(model, batch, length).values()]
        (logits, state), _ = both(model, *inputs)
        with fused_rows.left_out():
            (others, other), _ = both(model, *inputs)
        (expected, right), _ = both(exact, *inputs)
        for short, long, true in [(logits, others, expected), (state.cache, other.cache, right.cache)]:
            off, usual = ((found.float() - true).norm() / true.norm() for found in (short, long))
            assert off < 1.5 * usual + 5e-3


def test_what_prompts_short_kernels_read():
    def suit(rows, width, dtype=HALF, *, centred=False):
        return fused_rows.suits_prompts(torch.empty(rows, width, dtype=dtype, device="meta"), centred=centred)

    assert suit(fused_rows.PROMPT_ROWS, 2048)
    assert suit(fused_rows._CENTRED_PROMPT_ROWS, 64, centred=True)
    assert not suit(fused_rows._CENTRED_PROMPT_ROWS + 1, 64, centred=True)
    assert not suit(fused_rows.PROMPT_ROWS + 1, 64)
    assert not suit(8, 2049)
    assert not suit(8, 64, torch.float32)
    with fused_rows.left_out():
        assert not suit(8, 64)
    for limit in (fused_rows._CENTRED_PROMPT_ROWS, fused_rows.PROMPT_ROWS):
        assert any(limit // 2 < batch * length <= limit for batch, length in self_check._PROMPTS), "is tried out"


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
    original = FusedDecoder.last_logits
    monkeypatch.setattr(FusedDecoder, "last_logits", lambda *args, **kwargs: original(*args, **kwargs) * 1.1)
    with pytest.warns(UserWarning, match=r"prompts go through the model's own forward.* off by"):
        assert not engine._with_prompts_verified(engine.decoder).reads_prompts
    monkeypatch.setattr(FusedDecoder, "last_logits", lambda *args, **kwargs: 1 / 0)
    with pytest.warns(UserWarning, match="division by zero"):
        assert not engine._with_prompts_verified(engine.decoder).reads_prompts


@pytest.mark.parametrize("slm", ["llama", "t5"])
@pytest.mark.parametrize("encoder", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_a_composition_is_encoded_by_it(encoder, slm, by_kernels, tmp_path):
    model = compose(encoder, slm, tmp_path).to(DEVICE)
    run, batch = PromptPass(model), batch_of(model, device=DEVICE)
    padded = padded_for(run, batch)
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
    padded = padded_for(run, batch)
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
        fused = memory._walked_fused_pass(decoder, call).peak
        assert 0.25 < fused / memory._walked_pass(model, decoder, call).peak < 1


def test_a_workspace_of_cublas_is_predicted_where_cublas_multiplies():
    def multiplies(family, length, dtype=HALF):
        call = Call(1, length, length + 20, 0)
        return memory._walked_fused_pass(read(tiny(family).to(dtype), 300), call).multiplies

    assert not multiplies("llama", fused_rows.PROMPT_ROWS)
    assert multiplies("llama", fused_rows.PROMPT_ROWS + 1)
    assert multiplies("llama", 8, torch.float32)
    assert multiplies("gpt2", fused_rows._CENTRED_PROMPT_ROWS + 1)


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


@pytest.mark.parametrize(("depth", "dtype"), [(0, torch.float32), (1, torch.float32), (2, torch.float32), (1, HALF)])
@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_a_reader_gives_what_one_pass_of_the_llm_gives(family, depth, dtype):
    model = tiny(family).to(DEVICE, dtype)
    inputs = {name: value.to(DEVICE) for name, value in prompts(model, 3, 19).items()}
    ids, mask = pad_right(inputs["input_ids"], inputs["attention_mask"])
    reading = SharedEncoder(model, depth).read(ids, mask)
    own = model.get_output_embeddings()(reading.last_hidden_state[torch.arange(3), mask.sum(dim=1) - 1])
    state = state_for(model, read(model, 128), 3, 24)
    result = FusedReader(read(model, 128), depth)(ids, mask, state.cache)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    kept = mask.bool()
    keys = torch.stack([layer.keys for layer in reading.past_key_values.layers])
    for found, expected in (
        (result.states[kept], reading.hidden_states[kept]),
        (result.last, own),
        (state.cache[:, 0, :, :, :19].permute(1, 3, 0, 2, 4)[kept], keys.permute(1, 3, 0, 2, 4)[kept]),
    ):
        assert (found - expected).norm() < tolerance * expected.norm()
    assert result.cache is state.cache
    assert not state.cache[..., 19:, :].any(), "no place behind the prompt is written"


@torch.no_grad()
def test_a_reader_asks_the_device_for_no_value(monkeypatch):
    """Which no graph could hold; the kernels, which ask for none, are left out."""
    for module in (fused_prefill, fused_rows):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    model = tiny("llama").to(DEVICE)
    ids, mask = (value.to(DEVICE) for value in prompts(model, 3, 19).values())
    with HostReads() as reads:
        FusedReader(read(model, 16), 1)(ids, mask)
    assert not reads.found


@pytest.fixture
def reads_by_kernels(monkeypatch):
    """What verified decoding does on CUDA devices with its prompts, on the CPU."""
    made = []

    def reader(decoder, depth):
        if decoder is None or decoder.crosses:
            return None
        made.append(FusedReader(decoder, depth))
        return made[-1]

    if not COMPILED:
        monkeypatch.setattr("llmslm.generation.verified_prompt.reader_for", reader)
    return made


def fixed(*arguments, **settings):
    """An engine whose buffers are those of graphs."""
    verified = verified_engine(*arguments, **settings, device=DEVICE)
    verified.fixed = True
    return verified


READ = [
    ("llama", "llama", {}),
    ("qwen3", "llama", {"layer": 1}),
    ("qwen2", "qwen3", {"layer": 1, "fusion": Prefix}),
    ("gpt2", "gpt2", {"layer": 1, "perfect": True}),
    ("opt-post-norm", "opt", {"layer": 0}),
    ("llama", "t5", {"layer": 1}),
    ("t5", "llama", {}),
    ("llama", "qwen2", {"layer": [1, "last"]}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "slm_family", "settings"), READ)
@torch.no_grad()
def test_verified_tokens_are_the_llms_where_kernels_read_the_prompts(
    family, slm_family, settings, reads_by_kernels, monkeypatch
):
    """The first call of a size reads into a cache of its own, the second into its side's."""
    monkeypatch.setattr(verified_loop, "_milliseconds", lambda work: work() or 1.0)  # blocks of both are of one size
    settings = {"perfect": False} | settings
    own, verified = (fixed(family, slm_family, **settings) for _ in range(2))
    own._reader._fused_llm = own._reader._fused_slm = None
    fused = [verified._reader._fused_llm, verified._reader._fused_slm]
    alone = family == "t5" or isinstance(settings.get("layer"), list)
    assert [each is not None for each in fused] == [not alone, slm_family != "t5"]
    for seed in range(2):
        inputs, sides = (
            {k: v.to(DEVICE) for k, v in side.items()} for side in sides_of(verified.llm, 3, 30, seed=seed)
        )
        expected = by_generate(verified.llm, inputs, max_new_tokens=9)
        result, unfused = (each.generate(**sides, max_new_tokens=9) for each in (verified, own))
        assert torch.equal(result.tokens, expected)
        assert result.acceptance == unfused.acceptance, "the draft starts from what the composition gives it"
    assert len(verified.loops) == 1


@torch.no_grad()
def test_what_kernels_read_wrongly_the_models_read_themselves(reads_by_kernels, monkeypatch):
    original = FusedReader.__call__
    verified = verified_engine("llama", "qwen2", layer=1, device=DEVICE)

    def with_states(change):
        def called(*arguments):
            return change(original(*arguments))

        monkeypatch.setattr(FusedReader, "__call__", called)
        return VerifiedEngine(verified.llm, verified.draft)._reader

    for change in (
        lambda passed: passed._replace(last=passed.last.roll(1, 0)),
        lambda passed: passed._replace(cache=passed.cache * 1.1),
    ):
        with (
            pytest.warns(UserWarning, match=r"the slm reads prompts to verify by its own forward.* off by"),
            pytest.warns(UserWarning, match=r"the LLM reads prompts to verify by its own forward.* off by"),
        ):
            reader = with_states(change)
        assert reader._fused_llm is None
        assert reader._fused_slm is None
    with pytest.warns(UserWarning, match="the LLM reads"):
        reader = with_states(lambda p: p if p.states is None else p._replace(states=p.states * 1.1))
    assert reader._fused_llm is None
    assert reader._fused_slm is not None


@torch.no_grad()
def test_a_prompt_may_be_longer_than_a_drafts_positions(reads_by_kernels):
    """Its slm's kernels have no angles there: the last ones serve, and the LLM corrects the draft."""
    verified = fixed("llama", "qwen2", layer=1)
    slm = verified._reader._fused_slm
    slm.decoder = replace(slm.decoder, max_positions=8)
    inputs, sides = sides_of(verified.llm, 3, 30)
    inputs, sides = ({k: v.to(DEVICE) for k, v in side.items()} for side in (inputs, sides))
    expected = by_generate(verified.llm, inputs, max_new_tokens=6)
    assert torch.equal(verified.generate(**sides, max_new_tokens=6).tokens, expected)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_what_a_reader_needs_is_predicted(family, depth):
    """By the model's own forward, which may have to read the prompt, and what is kept beside it."""
    verified = verified_engine(family, "llama", layer=depth)
    decoder = verified._alone.decoder
    verified._reader._fused_llm = FusedReader(decoder, depth)
    reader = FusedReader(memory._without_data(decoder), depth)
    for call in (Call(4, 40, 60, 0), Call(1, 8, 16, 0)):
        mask = torch.ones(call.batch, call.length, dtype=torch.long, device="meta")
        with memory.LiveBytes() as live, memory._FusedAttention():
            result = reader(mask, mask)
        predicted = memory._walked_pass(verified.llm, decoder, call).peak + verified._reader.kept_bytes(*mask.shape)
        assert 0.4 < live.peak / predicted < 1
        assert result.states.shape[:2] == mask.shape
