"""Verified decoding on a CUDA device."""

import pytest
import torch

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
