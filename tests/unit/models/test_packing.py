"""Packed rows give the losses of rows of their own; chosen positions give the logits of all."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from llmslm.data.codec import IGNORED, Codec, PackedShape, TextFormat, target_positions
from llmslm.errors import UserError
from llmslm.models.blocks import blocks, compile_blocks
from llmslm.models.fusion import Add, Replace
from llmslm.models.head import logits_at
from llmslm.models.language_model import ModelSource
from llmslm.models.packing import check_packing
from llmslm.models.projector import Resampler
from llmslm.module import SystemModule
from tests import tiny
from tests.unit.models.compositions import compose

ROWS = [
    {"input_prompt_ids": [5, 6, 7], "target_ids": [8, 9, 1]},
    {"input_prompt_ids": [9], "target_ids": [4, 1]},
    {"input_prompt_ids": [3, 3, 5, 8], "target_ids": [6, 1]},
]


class Tokenizer:
    """As much of a tokenizer as collating needs."""

    pad_token_id, eos_token_id = 0, 1


def summed_loss(model, collated):
    module = SystemModule(ModelSource(source="unused"), ModelSource(source="unused"), system="slm")
    module.model, module.codec = model, codec_of(model)
    loss, tokens = module.loss(collated)
    return loss * tokens


@pytest.mark.parametrize("encoder", ["t5", "llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("fusion", [Add, Replace])
def test_a_composition_packs_both_sides(encoder, fusion, tmp_path):
    model = compose(encoder, "llama", tmp_path, fusion)
    check_packing(model, reads_states=True)
    codec = Codec(Tokenizer(), text_format=TextFormat(), is_encoder_decoder=False, has_encoder=True)
    rows = [row | {"prompt_ids": row["input_prompt_ids"]} for row in ROWS]
    packed = codec.collate_packed(rows, PackedShape(2, (10, 6)))
    assert packed["on_prompt"][0].tolist() == [1, 1, 1, 0, 0, 0, 1, 0, 0, 0]
    assert packed["prompt_documents"][0].tolist() == [0, 0, 0, 1, -1, -1]
    assert codec.sizes(rows, packed) == (3, 8, 7, 8, 32)
    expected = summed_loss(model, codec.collate(rows))
    torch.testing.assert_close(summed_loss(model, packed), expected, rtol=1e-5, atol=0)


def test_what_mixes_the_states_of_a_row_is_refused(tmp_path):
    model = compose("t5", "llama", tmp_path)
    model.projector = Resampler(32, 32, states=2)
    with pytest.raises(UserError, match=r"keep packed examples apart"):
        check_packing(model, reads_states=True)


def codec_of(model):
    enc_dec = model.config.is_encoder_decoder
    return Codec(Tokenizer(), text_format=TextFormat(), is_encoder_decoder=enc_dec, decoder_start_token_id=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "t5"])
def test_packing_changes_no_loss(family):
    model = tiny.build(family).eval()
    check_packing(model)
    codec = codec_of(model)
    shape = PackedShape(2, (10, 6) if family == "t5" else (10,))
    packed = codec.collate_packed(ROWS, shape)
    assert codec.sizes(ROWS, packed) == (3, 8, 7, 0, 32 if family == "t5" else 20)
    expected = summed_loss(model, codec.collate(ROWS))
    torch.testing.assert_close(summed_loss(model, packed), expected, rtol=1e-5, atol=0)


def test_positions_start_again_with_each_example():
    packed = codec_of(tiny.build("llama")).collate_packed(ROWS, PackedShape(2, (10,)))
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    assert packed["labels"][0].tolist() == [*[IGNORED] * 3, 8, 9, 1, IGNORED, 4, 1, IGNORED]


def test_padding_of_a_packed_row_is_no_nan():
    model = tiny.build("t5").train()
    loss = summed_loss(model, codec_of(model).collate_packed(ROWS, PackedShape(4, (10, 8))))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_a_model_that_counts_positions_by_itself_is_refused():
    with pytest.raises(UserError, match=r"bart does not keep packed examples apart .*data\.pack_tokens"):
        check_packing(tiny.build("bart"))


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


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it and hides the warning
def test_packed_batches_of_t5_are_compiled_once():
    torch.compiler.reset()
    model, compiled = tiny.build("t5").train(), CompileCounter()
    for block in blocks(model):
        block.compile(backend=compiled, fullgraph=True)
    batches = [codec_of(model).collate_packed(rows, PackedShape(2, (16, 24))) for rows in (ROWS, ROWS[::-1], ROWS[:2])]
    for batch in batches:
        summed_loss(model, batch).backward()
    assert compiled.frame_count == 4  # first and further blocks, of encoder and decoder
    torch.compiler.reset()


def test_compiled_blocks_are_not_compiled_for_the_few_tokens_of_the_check():
    model = tiny.build("llama")
    compile_blocks(model, fixed_shapes=True)
    torch._dynamo.reset()
    counters.clear()
    check_packing(model)
    assert not counters["stats"]["unique_graphs"]
