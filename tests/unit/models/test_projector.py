"""Projectors: padding is not read, the number of states, norms, and what is remembered of them."""

import pytest
import torch

from llmslm.errors import UserError
from llmslm.models.modeling import LlmToSlm
from llmslm.models.packing import check_packing
from llmslm.models.projector import (
    GatedMlpProjector,
    LinearProjector,
    MlpProjector,
    Projector,
    Resampler,
    TransformerProjector,
    rotary_angles,
)
from tests import tiny
from tests.unit.models.compositions import compose, generate

ALL = [LinearProjector, MlpProjector, GatedMlpProjector, Resampler, TransformerProjector]


def trained(projector):
    """New layers end at zero, where they do not count yet."""
    for name, parameter in projector.named_parameters():
        if name.endswith(("out.weight", "down.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    return projector


@pytest.mark.parametrize("kind", ALL)
def test_padding_is_not_read(kind):
    mask = tiny.prompts()[1]
    states = torch.randn(*mask.shape, 12)
    projector = trained(kind(12, 8))
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


def test_each_state_of_a_prompt_sees_the_others_and_no_other_prompt():
    projector = trained(TransformerProjector(12, 8, layers=2))
    states, documents = torch.randn(1, 9, 12), torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1, -1]])
    packed = projector(states, documents=documents)
    torch.testing.assert_close(packed[:, :4], projector(states[:, :4]))
    torch.testing.assert_close(packed[:, 4:7], projector(states[:, 4:7]))
    changed = projector(states.index_fill(1, torch.tensor(3), 1.0), documents=documents)
    assert ((packed - changed).abs().amax(-1) > 1e-4).squeeze().tolist()[:7] == [True] * 4 + [False] * 3
    backwards = projector(states[:, :4].flip(1)).flip(1)
    assert not torch.allclose(packed[:, :4], backwards, atol=1e-3), "its positions do not count"


def test_angles_are_the_same_where_another_dtype_is_the_default_one():
    """As in training with trainer.precision bf16-true, but not in decoding."""
    documents = torch.zeros(1, 400, dtype=torch.long)
    angles = rotary_angles(documents, 8)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = rotary_angles(documents, 8)
    finally:
        torch.set_default_dtype(default)
    torch.testing.assert_close(again, angles, rtol=0, atol=0)


def test_new_reading_layers_change_nothing_yet():
    projector = TransformerProjector(12, 8, layers=3, output_norm=False)
    states = torch.randn(2, 5, 12)
    torch.testing.assert_close(projector(states), projector.linear(projector.norm_in(states)))


def test_a_transformer_projector_needs_layers_and_even_heads():
    with pytest.raises(UserError, match="layers=0; expected 1 or more"):
        TransformerProjector(12, 8, layers=0)
    with pytest.raises(UserError, match="wide has heads of 9"):
        TransformerProjector(12, 9)


@pytest.mark.parametrize("kind", ALL)
def test_training_in_mixed_precision_warns_of_nothing(kind, recwarn):
    projector = kind(12, 8, input_norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        projector(torch.randn(2, 5, 12, dtype=torch.bfloat16)).float().sum().backward()
    assert not recwarn


@pytest.mark.parametrize("slm_family", ["llama", "gpt2"])
def test_a_composition_that_reads_on_keeps_examples_apart_and_is_saved_whole(slm_family, tmp_path):
    model = compose("llama", slm_family, tmp_path, projector=TransformerProjector)
    trained(model.projector)
    check_packing(model, reads_states=True)
    model.save_pretrained(tmp_path / "saved")
    again = LlmToSlm.from_pretrained(tmp_path / "saved").eval()
    ids, mask = tiny.prompts()
    expected = generate(model, ids, mask)
    assert torch.equal(generate(again, ids, mask), expected)
    inputs = again.slm_inputs(ids, mask, ids, mask)
    first = (ids[:1, : mask[0].sum()], mask[:1, : mask[0].sum()])
    alone = again.slm_inputs(*first, *first)
    kept = inputs["attention_mask"][0].bool()
    torch.testing.assert_close(inputs["inputs_embeds"][0][kept], alone["inputs_embeds"][0], atol=1e-5, rtol=1e-4)
