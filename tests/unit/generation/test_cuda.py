"""The same tokens through kernels and graphs; needs a CUDA device."""

from collections.abc import Callable

import pytest
import torch

from llmslm.generation.engine import DecodeEngine
from llmslm.generation.families import read
from llmslm.generation.graphs import Captured
from llmslm.generation.sampling import Sampling, start_token
from llmslm.generation.self_check import relative_difference
from tests.unit.generation.families import BUILD, by_generate, prompts, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("family", BUILD)
def test_greedy_tokens_are_those_of_generate(family: str) -> None:
    model = tiny(family).cuda()
    engine = DecodeEngine(model)
    assert engine.reason is None
    for batch, length in ((1, 7), (5, 9), (8, 3), (64, 40)):
        inputs = {key: value.cuda() for key, value in prompts(model, batch, length).items()}
        for setting in ({}, {"min_new_tokens": 6}):
            expected = by_generate(model, inputs, max_new_tokens=24, **setting)
            assert torch.equal(engine.generate(**inputs, max_new_tokens=24, **setting), expected)


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
    assert torch.equal(torch.cat(events[1:], dim=1), tokens.cpu())


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
