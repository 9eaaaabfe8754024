"""Projectors: padding is not read, the number of states, norms, and what is remembered of them."""

import pytest
import torch

from llmslm.errors import UserError
from llmslm.models.projector import GatedMlpProjector, LinearProjector, MlpProjector, Projector, Resampler
from tests import tiny

ALL = [LinearProjector, MlpProjector, GatedMlpProjector, Resampler]


@pytest.mark.parametrize("kind", ALL)
def test_padding_is_not_read(kind):
    mask = tiny.prompts()[1]
    states = torch.randn(*mask.shape, 12)
    projector = kind(12, 8)
    other = states.masked_fill(~mask.bool().unsqueeze(-1), 1e4)
    kept = projector.states_mask(mask).bool()
    torch.testing.assert_close(projector(states, mask)[kept], projector(other, mask)[kept])


@pytest.mark.parametrize("kind", ALL)
def test_it_is_rebuilt_from_its_spec(kind):
    projector = kind(12, 8, input_norm=True, **({"states": 3, "layers": 1} if kind is Resampler else {}))
    again = Projector.from_spec(projector.spec(), 12, 8)
    again.load_state_dict(projector.state_dict())
    states, mask = torch.randn(2, 5, 12), torch.ones(2, 5)
    assert torch.equal(again(states, mask), projector(states, mask))


@pytest.mark.parametrize("kind", ALL)
def test_an_input_norm_takes_the_scale_away(kind):
    states, mask = torch.randn(2, 5, 12), torch.ones(2, 5)
    projector = kind(12, 8, input_norm=True, output_norm=False)
    torch.testing.assert_close(projector(states, mask), projector(1000 * states, mask), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ALL)
def test_it_starts_at_the_scale_of_the_embeddings(kind):
    projector = kind(12, 8)
    projector.match_scale(0.03 * torch.randn(100, 8))
    projected = projector(50 * torch.randn(2, 5, 12), torch.ones(2, 5))
    torch.testing.assert_close(projected.square().mean().sqrt(), torch.tensor(0.03), rtol=0.1, atol=0)


def test_a_resampler_makes_as_many_states_as_it_has_queries():
    resampler = Resampler(12, 8, states=3)
    for length in (1, 9):
        assert resampler(torch.randn(2, length, 12), torch.ones(2, length)).shape == (2, 3, 8)
    with pytest.raises(UserError, match="states=0, layers=2; expected 1 or more"):
        Resampler(12, 8, states=0)
