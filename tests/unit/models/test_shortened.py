"""A model of some of another one's layers."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from llmslm.errors import UserError
from llmslm.models.language_model import ModelSource, load_language_model
from llmslm.models.shortened import shortened, shortened_config
from tests import tiny

STACKS = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "gpt2": "transformer.h",
    "t5": "decoder.block",
    "bart": "model.decoder.layers",
}


def logits(model):
    ids = torch.arange(3, 15).reshape(2, 6)
    given = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False, **given).logits


@pytest.mark.parametrize("family", STACKS)
def test_it_computes_what_the_whole_model_does_without_the_other_layers(family, tmp_path):
    tiny.build(family).save_pretrained(tmp_path)
    whole = load_language_model(ModelSource(str(tmp_path)), None, "model.slm")
    stack = whole.get_submodule(STACKS[family])
    chosen = [0, len(stack) - 1]
    short = load_language_model(ModelSource(str(tmp_path), layers=chosen), None, "model.slm")
    parent, _, name = STACKS[family].rpartition(".")
    setattr(whole.get_submodule(parent), name, nn.ModuleList([stack[number] for number in chosen]))
    torch.testing.assert_close(logits(short), logits(whole))
    prompt = torch.tensor([[5, 6, 7]])
    short.generate(prompt, max_new_tokens=4, do_sample=False)  # its layers number themselves for the cache
    short.save_pretrained(tmp_path / "short")
    again = load_language_model(ModelSource(str(tmp_path / "short")), None, "model.slm")
    torch.testing.assert_close(logits(again), logits(short))


def test_what_is_said_of_each_layer_goes_with_it():
    model = tiny.build("qwen2")
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    model.config.sliding_window = 4
    assert shortened(model, [1, 2], "model.slm").config.layer_types == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(("layers", "chosen"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2])])
def test_so_many_are_taken_at_equal_distances(layers, chosen):
    model = tiny.build("llama")
    torch.testing.assert_close(
        logits(shortened(model, layers, "model.slm")), logits(shortened(model, chosen, "model.slm"))
    )


@pytest.mark.parametrize(
    ("family", "layers", "message"),
    [
        ("llama", 4, "model.slm.layers is 4; expected 1 to 3"),
        ("llama", [0, 3], "expected numbers in ascending order from 0 to 2"),
        ("llama", [1, 0], "expected numbers in ascending order"),
        ("llama", [], "expected numbers"),
        ("t5", [1], "leaves out a layer that others need .*relative_attention_bias.*add layer 0"),
    ],
)
def test_layers_that_cannot_be_taken(family, layers, message):
    with pytest.raises(UserError, match=message):
        shortened(tiny.build(family), layers, "model.slm")


def test_a_model_put_together_of_others_is_refused():
    with pytest.raises(UserError, match=r"model\.slm\.layers cannot take layers of a t5gemma"):
        shortened_config(AutoConfig.for_model("t5gemma"), 2, "model.slm")


@pytest.mark.parametrize(
    "source", [ModelSource(config={"model_type": "t5"}, layers=2), ModelSource("x", None, None, 2, "nothing")]
)
def test_layers_are_of_a_source_and_trained(source):
    with pytest.raises(UserError, match=r"layers takes layers of model\.slm\.source and trains them"):
        source.check("model.slm")
