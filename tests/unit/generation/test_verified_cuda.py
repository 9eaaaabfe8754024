"""Verified decoding on a CUDA device."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which comes with CUDA builds of torch")

from llmslm.generation.sampling import Sampling
from tests.unit.generation.families import by_generate
from tests.unit.generation.test_verified import batch, engine, pairs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pairs
@pytest.mark.parametrize("perfect", [False, True])
def test_greedy_tokens_are_the_llms(family, slm_family, perfect):
    verified = engine(family, slm_family, perfect=perfect, device="cuda")
    for rows in (1, 8):
        inputs, sides = ({k: v.cuda() for k, v in side.items()} for side in batch(verified.llm, rows))
        expected = by_generate(verified.llm, inputs, max_new_tokens=40)
        assert torch.equal(verified.generate(**sides, max_new_tokens=40).tokens, expected)


@pairs
def test_rows_end_and_tokens_are_handed_out_by_graphs_kept_from_earlier_calls(family, slm_family):
    """Ends, limits, several prompts of a size: the first call of a size runs without, the second with all graphs."""
    verified = engine(family, slm_family, perfect=True, device="cuda")
    for seed in range(4):
        inputs, sides = ({k: v.cuda() for k, v in side.items()} for side in batch(verified.llm, 3, 9, seed))
        if not seed:
            common = by_generate(verified.llm, inputs, max_new_tokens=20)[0, 6].item()
            verified.llm.generation_config.eos_token_id = [1, common]
        parts = []
        expected = by_generate(verified.llm, inputs, max_new_tokens=20, min_new_tokens=3)
        result = verified.generate(**sides, max_new_tokens=20, min_new_tokens=3, on_tokens=parts.append)
        assert torch.equal(result.tokens, expected)
        assert torch.equal(torch.cat(parts, dim=1), expected)
    assert len(verified._loops) == 1


def test_no_block_is_launched_behind_the_end():
    """The draft alone reads on; a block in vain would take as long as all of a short answer's."""
    verified = engine("llama", "gpt2", device="cuda")
    sides = {k: v.cuda() for k, v in batch(verified.llm, 1)[1].items()}
    verified.generate(**sides, max_new_tokens=9)
    loop = next(iter(verified._loops.values()))
    launched = []
    for size, graph in loop._graphs.items():
        loop._graphs[size] = lambda graph=graph, size=size: launched.append(size) or graph()
    assert verified.generate(**sides, max_new_tokens=9).acceptance.passes == len(launched)


def test_settings_of_the_llms_generation_config_are_honoured():
    """By the blocks in plain torch, which greedy calls without settings do not use."""
    verified = engine("gpt2", "gpt2", device="cuda")
    config = verified.llm.generation_config
    config.suppress_tokens, config.repetition_penalty, config.forced_eos_token_id = [7, 9], 1.7, 1
    for seed in range(3):
        inputs, sides = ({k: v.cuda() for k, v in side.items()} for side in batch(verified.llm, 3, 9, seed))
        mask = torch.ones_like(inputs["attention_mask"])
        inputs["attention_mask"] = sides["attention_mask"] = sides["prompt_attention_mask"] = mask
        expected = by_generate(verified.llm, inputs, max_new_tokens=12)
        assert torch.equal(verified.generate(**sides, max_new_tokens=12).tokens, expected)


def test_sampling_repeats_with_its_seed():
    verified = engine("gpt2", "gpt2", device="cuda")
    sides = {k: v.cuda() for k, v in batch(verified.llm, 4)[1].items()}
    draws = [
        verified.generate(**sides, max_new_tokens=12, min_new_tokens=12, sampling=Sampling(seed=seed)).tokens
        for seed in (0, 1, 1, 2)
    ]
    assert torch.equal(draws[1], draws[2])
    assert not torch.equal(draws[1], draws[3])
