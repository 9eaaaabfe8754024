"""Residual dropout for architectures without it."""

import pytest
import torch

from llmslm.errors import UserError
from llmslm.models.blocks import compile_blocks
from llmslm.models.dropout import add_dropout
from tests import tiny


def test_drops_in_training_alone_and_saves_nothing():
    model, ids = tiny.build("llama"), torch.arange(3, 9)[None]
    names, before = list(model.state_dict()), model(ids).logits
    assert add_dropout(model, 0.5) == 2 * 3  # attention and feed-forward of each block
    assert torch.equal(model(ids).logits, before)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert list(model.state_dict()) == names


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it and hides the warning
def test_compiled_blocks_drop_too():
    torch.compiler.reset()
    model, ids = tiny.build("llama"), torch.arange(3, 9)[None]
    before = model(ids).logits
    add_dropout(model, 0.5)
    for block in model.model.layers:
        block.compile(backend="eager", fullgraph=True)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    model.train()
    assert not torch.allclose(model(ids).logits, before, atol=1e-2)
    assert compile_blocks(model) == 3
    torch.compiler.reset()


def test_leaves_a_model_with_dropout_of_its_own_alone():
    with pytest.raises(UserError, match="gpt2 has dropout of its own"):
        add_dropout(tiny.build("gpt2"), 0.1)
    with pytest.raises(UserError, match=r"model.dropout is 1.5"):
        add_dropout(tiny.build("llama"), 1.5)
