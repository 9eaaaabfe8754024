"""What the prompt's pass leaves in the state beside the caches."""

import pytest
import torch

from llmslm.generation.engine import DecodeEngine
from llmslm.generation.prefill import prompt_positions
from tests.unit.generation.families import tiny

RIGHT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])


def loop_of(family, **inputs):
    engine = DecodeEngine(tiny(family), verify=False)
    engine.generate(input_ids=torch.full((3, 9), 7), max_new_tokens=3, **inputs)
    return next(iter(engine._loops.values()))


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_a_left_padded_prompt_is_counted_over_what_is_attended(dtype):
    causal, mask = loop_of("llama").causal, RIGHT.flip(1).to(dtype)
    causal.state.forget()
    given = []
    causal.last_logits = lambda _prompt, _mask, positions: given.append(positions)
    causal(torch.full((3, 5), 7), mask)
    assert torch.equal(given[0], prompt_positions(mask))
    assert torch.equal(causal.state.valid[:, :5], mask.bool())
    assert causal.state.valid[:, 5:].all()
    assert causal.state.position.tolist() == [2, 4, 0]
    assert causal.state.slot.tolist() == [4] * 3


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_encoder_states_are_seen_by_the_mask_and_all_of_them_where_it_hides_all(dtype):
    encoded = loop_of("t5").encoded
    width = encoded.model.config.d_model
    for length in (5, 3):
        encoded(torch.zeros(3, length, width), RIGHT[:, :length].to(dtype))
        expected = torch.zeros(3, 9, dtype=torch.bool)
        expected[:, :length] = RIGHT[:, :length].bool() | torch.tensor([[False], [False], [True]])
        assert torch.equal(encoded.state.encoder_valid, expected)
