"""The same tokens through kernels and graphs; needs a CUDA device."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmslm.generation.engine import DecodeEngine
from llmslm.generation.families import read
from llmslm.generation.graphs import Captured
from llmslm.generation.plan import Linear, Norm
from llmslm.generation.sampling import Sampling, start_token
from llmslm.generation.self_check import prompt_difference, relative_difference
from tests.unit.generation.families import BUILD, EOS, PAD, by_generate, prompts, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("family", BUILD)
def test_greedy_tokens_are_those_of_generate(family: str) -> None:
    model = tiny(family).cuda()
    engine = DecodeEngine(model)
    assert engine.reason is None
    assert engine.decoder is not None
    assert engine.decoder.reads_prompts
    for batch, length in ((1, 7), (5, 9), (8, 3), (64, 40)):
        inputs = {key: value.cuda() for key, value in prompts(model, batch, length).items()}
        for setting in ({}, {"min_new_tokens": 6}):
            expected = by_generate(model, inputs, max_new_tokens=24, **setting)
            assert torch.equal(engine.generate(**inputs, max_new_tokens=24, **setting), expected)


CAUSAL = [family for family in BUILD if not tiny(family).config.is_encoder_decoder]


@pytest.mark.parametrize("family", CAUSAL)
def test_tokens_from_embeddings_are_those_of_generate(family: str) -> None:
    model = tiny(family).cuda()
    engine = DecodeEngine(model)
    for batch, length in ((1, 32), (5, 9)):
        inputs = {key: value.cuda() for key, value in prompts(model, batch, length).items()}
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
        mask, expected = inputs["attention_mask"], by_generate(model, inputs, max_new_tokens=12)
        assert torch.equal(engine.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=12), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_prompts_in_16_bits_are_read_as_the_model_does(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).cuda().to(dtype)
    assert prompt_difference(model, read(model, 128), ((1, 32), (2, 32), (1, 100), (9, 32))) < 0.05


@torch.no_grad()
def test_a_large_batch_of_long_prompts_is_read_as_the_model_does() -> None:
    """Wider than the tiny ones, with a width and heads that are no powers of two."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1000,
        eos_token_id=EOS,
        pad_token_id=PAD,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().cuda()
    ids = torch.randint(3, 1000, (6, 1500), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :700] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    engine = DecodeEngine(model)
    assert torch.equal(engine.generate(**inputs, max_new_tokens=8), by_generate(model, inputs, max_new_tokens=8))
    model.bfloat16()
    assert prompt_difference(model, read(model, 2048), [(40, 32)]) < 0.05


def test_rows_beyond_32_bits_are_found() -> None:
    from llmslm.generation import fused_prefill  # Triton exists beside CUDA builds of torch alone

    rows, width = 2**18 + 7, 8200  # 2.15e9 values
    x = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(width, device="cuda")
    norm = Norm(torch.ones(width, device="cuda"), None, 1e-6, False)
    total, y = fused_prefill.joined(x, x, norm)
    assert torch.equal(total[-1], 2 * x[-1])
    expected = torch.nn.functional.rms_norm(total[-1].float(), (width,), eps=1e-6)
    torch.testing.assert_close(y[-1].float(), expected, rtol=1e-2, atol=1e-2)
    del total, y
    gated = fused_prefill._activated(x, Linear(x[:1], None, "relu", True))
    assert torch.equal(gated[-1], x[-1, : width // 2].relu() * x[-1, width // 2 :])


@pytest.mark.parametrize("family", BUILD)
def test_steps_in_bfloat16_are_the_models(family: str) -> None:
    """Products by the matrix units, which float32 does not use."""
    model = tiny(family).cuda().bfloat16()
    assert DecodeEngine(model, verify=True).reason is None
    decoder = read(model, 128)
    for batch in (1, 2, 3, 8, 16):
        assert relative_difference(model, decoder, start_token(model) or 0, batch) < 0.05


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_ends_are_seen_and_streamed_tokens_are_the_result(family: str) -> None:
    model = tiny(family).cuda()
    inputs = {key: value.cuda() for key, value in prompts(model, 16, 6).items()}
    common = by_generate(model, inputs, max_new_tokens=40).flatten().mode().values.item()
    model.generation_config.eos_token_id = [1, common]
    events: list[torch.Tensor | str] = []
    tokens = DecodeEngine(model).generate(
        **inputs, max_new_tokens=40, on_first_token=lambda: events.append("first"), on_tokens=events.append
    )
    assert torch.equal(tokens, by_generate(model, inputs, max_new_tokens=40))
    assert events[0] == "first"
    assert torch.equal(torch.cat(events[1:], dim=1), tokens)


@pytest.mark.parametrize("settings", [{}, {"suppress_tokens": [7, 9]}])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_calls_in_a_row_are_not_disturbed_by_the_last_steps_of_each_other(family: str, settings: dict) -> None:
    """Nothing waits for the steps behind an end; of new lengths graphs are captured between calls."""
    model = tiny(family).cuda()
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    engine, sides = DecodeEngine(model), [prompts(model, 1, 6 + 30 * (seed % 2), seed) for seed in range(6)]
    common = by_generate(model, {k: v.cuda() for k, v in sides[0].items()}, max_new_tokens=20)[0, 4].item()
    model.generation_config.eos_token_id = [1, common]
    expected = [by_generate(model, {k: v.cuda() for k, v in side.items()}, max_new_tokens=20) for side in sides]
    assert min(tokens.shape[1] for tokens in expected) < 20, "void if no call ends early"
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    for turn in range(4):  # on one stream, then each call on another than the one before
        for number, (side, tokens) in enumerate(zip(sides, expected, strict=True)):
            with torch.cuda.stream(streams[number % 3 if turn > 1 else 0]):
                assert torch.equal(engine.generate(**side, max_new_tokens=20), tokens)


def test_sampling_repeats_with_its_seed() -> None:
    model = tiny("gpt2").cuda()
    inputs = {key: value.cuda() for key, value in prompts(model, 8, 6).items()}
    engine = DecodeEngine(model)
    first, again, other = (
        engine.generate(**inputs, max_new_tokens=12, sampling=Sampling(top_p=0.9, seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_captures_of_many_sizes_leave_no_memory() -> None:
    engine = DecodeEngine(tiny("llama").cuda(), keep=1)
    held = []
    for capacity in range(1, 13):
        ids = torch.full((capacity, 5), 7, device="cuda")  # a batch of another size, so other graphs
        engine.generate(input_ids=ids, max_new_tokens=3)
        engine.forget()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] - held[3] < 2**20


def test_a_capture_that_fails_leaves_the_others_alone() -> None:
    device, ones, before = torch.device("cuda", 0), torch.ones(4, device="cuda"), torch.cuda.current_stream()

    def captured(function: Callable[[torch.Tensor], torch.Tensor]) -> Captured:
        return Captured(function, device, pool=torch.cuda.graph_pool_handle())

    with pytest.raises(RuntimeError):
        captured(lambda x: x * x.sum().item())(ones)
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    assert torch.equal(captured(lambda x: 2 * x)(ones), 2 * ones)
