"""Weights of 8 bits: near the model's own logits, read by the engine, refused where they cannot be used."""

import shutil

import pytest
import torch
from torch import nn

from llmslm.errors import UserError
from llmslm.generation.engine import DecodeEngine
from llmslm.generation.int8 import Int8Linear, to_int8
from tests.unit.generation.families import BUILD, prompts, tiny


def test_a_layer_is_near_the_one_it_replaces() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 40), torch.randn(3, 5, 96)
    y, near = layer(x), Int8Linear(layer.weight.detach(), layer.bias)(x)
    assert near.shape == y.shape
    assert (near - y).norm() < 0.02 * y.norm()


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize("batch", [2, 20])
def test_the_engine_reads_them(family: str, batch: int) -> None:
    model = tiny(family)
    inputs = prompts(model, batch, 6)
    decoded = {"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        own = model(**inputs, **decoded).logits
        to_int8(model)
        near = model(**inputs, **decoded).logits
    engine = DecodeEngine(model)
    assert engine.reason is None
    assert engine.generate(**inputs, max_new_tokens=4).shape[0] == batch
    assert (near - own).norm() < 0.3 * own.norm(), "tiny random models round badly; trained ones lose far less"
    if shutil.which("cc"):
        assert engine.decoder is not None
        assert engine.decoder.head.weight.dtype == torch.int8


def test_only_the_cpu_has_them() -> None:
    with pytest.raises(UserError, match="for the CPU, use bfloat16"):
        to_int8(nn.Linear(2, 2, device="meta"))
