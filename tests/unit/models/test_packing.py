"""Packed rows give the losses of rows of their own; chosen positions give the logits of all."""

import pytest
import torch

from llmslm.data.codec import IGNORED, Codec, TextFormat, target_positions
from llmslm.errors import UserError
from llmslm.models.head import logits_at
from llmslm.models.packing import check_packing
from tests import tiny

ROWS = [
    {"input_prompt_ids": [5, 6, 7], "target_ids": [8, 9, 1]},
    {"input_prompt_ids": [9], "target_ids": [4, 1]},
    {"input_prompt_ids": [3, 3, 5, 8], "target_ids": [6, 1]},
]
LAYOUT = {"text_format": TextFormat(), "is_encoder_decoder": False}


class Tokenizer:
    """As much of a tokenizer as collating needs."""

    pad_token_id, eos_token_id = 0, 1


def summed_loss(model, batch):
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_packing_changes_no_loss(family):
    model = tiny.build(family).eval()
    check_packing(model)
    codec = Codec(Tokenizer(), **LAYOUT)
    packed = codec.collate_packed(ROWS, (2, 10))
    assert packed["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0]
    assert codec.sizes(ROWS, packed) == (3, 8, 7, 0, 20)
    torch.testing.assert_close(summed_loss(model, packed), summed_loss(model, codec.collate(ROWS)), rtol=1e-5, atol=0)


def test_a_model_that_mixes_examples_is_refused():
    model = tiny.build("gpt2").eval()
    forward = model.forward
    model.forward = lambda position_ids=None, **kwargs: forward(**kwargs)
    with pytest.raises(UserError, match=r"gpt2 does not keep packed examples apart .*data\.pack_tokens"):
        check_packing(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
@torch.no_grad()
def test_logits_of_chosen_positions_are_those_of_all(family):
    model = tiny.build(family).eval()
    ids = torch.randint(2, 20, (2, 6))
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    rows, columns = target_positions(torch.where(torch.rand(2, 6) < 0.5, ids, IGNORED))
    expected = model(**batch).logits[rows, columns]
    with logits_at(model, rows, columns, 6):
        chosen = model(**batch).logits
    torch.testing.assert_close(chosen, expected.unsqueeze(0))
    assert model(**batch).logits.shape[:2] == (2, 6)
