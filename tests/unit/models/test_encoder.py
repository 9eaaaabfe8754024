"""The frozen encoder: right states, right layers, no other weights, no gradient."""

import ast
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import llmslm.models
from llmslm.errors import UserError
from llmslm.models.encoder import Encoder, layer_index, layer_list, pad_right
from tests import tiny

FAMILIES = [*tiny.FAMILIES, *tiny.ENCODERS]


@pytest.mark.parametrize("layer", ["last", 0, 1, 2, -2, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_the_whole_model(family, layer, tmp_path):
    source = tiny.folder(family, tmp_path)
    whole = AutoModel.from_pretrained(source).eval()
    whole = whole.get_encoder() if whole.config.is_encoder_decoder else whole
    ids, mask = tiny.prompts()
    expected = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    states, states_mask = Encoder.from_source(source, layer=layer)(ids, mask)
    index = layer_index(layer, len(expected) - 1)
    torch.testing.assert_close(states[states_mask.bool()], expected[index][mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_above_the_highest_are_neither_there_nor_made(family, tmp_path, monkeypatch):
    source = tiny.folder(family, tmp_path)
    deleted = []
    monkeypatch.setattr(torch.nn.ModuleList, "__delitem__", lambda layers, which: deleted.extend(layers[which]))
    for layer, count in ((1, 1), (0, 1), ([0, 1], 1)):
        assert len(layer_list(Encoder.from_source(source, layer=layer).model)) == count
    assert deleted == []


@pytest.mark.parametrize("family", FAMILIES)
def test_several_layers_stand_side_by_side(family, tmp_path):
    source = tiny.folder(family, tmp_path)
    ids, mask = tiny.prompts()
    several = Encoder.from_source(source, layer=[0, 0.5, "last"])
    states = several(ids, mask)[0].chunk(3, dim=-1)
    for layer, expected in zip(several.layer, states, strict=True):
        torch.testing.assert_close(Encoder.from_source(source, layer=layer)(ids, mask)[0], expected)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_only_the_stack_of_an_encoder_decoder_is_loaded(family, tmp_path):
    source = tiny.folder(family, tmp_path)
    stack = Encoder.from_source(source).model
    whole = AutoModelForSeq2SeqLM.from_pretrained(source)
    assert not any("decoder" in name for name, _ in stack.named_parameters())
    expected = {id(p): p for p in whole.get_encoder().parameters()}
    assert sum(p.numel() for p in stack.parameters()) == sum(p.numel() for p in expected.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_is_read_as_right_padding(family, tmp_path):
    encoder = Encoder.from_source(tiny.folder(family, tmp_path))
    ids, mask = tiny.prompts()
    right, right_mask = encoder(ids, mask)
    left, left_mask = encoder(_left(ids, mask), _left(mask, mask))
    assert torch.equal(right_mask, left_mask)
    assert torch.equal(right[right_mask.bool()], left[left_mask.bool()])


def _left(values, mask):
    lengths = mask.sum(1)
    return torch.stack([row.roll(len(row) - int(n)) for row, n in zip(values, lengths, strict=True)])


def test_pad_right_keeps_the_order():
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
    assert pad_right(ids, mask)[0].tolist() == [[5, 6, 0, 0], [7, 8, 0, 0]]


def test_it_never_trains(tmp_path):
    encoder = Encoder.from_source(tiny.folder("t5", tmp_path)).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    ids, mask = tiny.prompts()
    assert encoder(ids, mask)[0].grad_fn is None


def test_positions_limit_is_found(tmp_path):
    assert Encoder.from_source(tiny.folder("gpt2", tmp_path)).max_positions == 64
    assert Encoder.from_source(tiny.folder("bart", tmp_path)).max_positions == 64
    assert Encoder.from_source(tiny.folder("llama", tmp_path)).max_positions is None


def test_hash_ignores_dtype_and_sees_values(tmp_path):
    source = tiny.folder("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(source).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    one = Encoder.from_source(str(tmp_path / "half"), dtype="float32")
    other = Encoder.from_source(str(tmp_path / "half"), dtype="bfloat16")
    assert one.content_hash() == other.content_hash()
    with torch.no_grad():
        next(other.model.parameters())[0] += 1
    assert one.content_hash() != other.content_hash()


def test_errors_say_what_to_change(tmp_path):
    with pytest.raises(UserError, match=r"encoder source '/nowhere' cannot be loaded"):
        Encoder.from_source("/nowhere")
    tiny.CONFIGS["t5"].save_pretrained(tmp_path / "empty")
    with pytest.raises(UserError, match=r"expected a hub name, a folder with config.json and weights, or a GGUF file"):
        Encoder.from_source(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"layer 7 does not exist in a model of 3 layers"):
        Encoder.from_source(tiny.folder("llama", tmp_path), layer=7)
    with pytest.raises(UserError, match=r"the list of encoder layers is empty.*model\.encoder\.layer"):
        Encoder.from_source(str(tmp_path / "llama"), layer=[])


def test_no_family_is_asked_for_by_name():
    names = {config.model_type for config in (tiny.CONFIGS | tiny.ENCODERS).values()}
    for path in Path(llmslm.models.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        identifiers = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {str(constant).lower() for constant in constants}, path
        assert not [name for name in identifiers if name.removesuffix("Config").lower() in names], path
