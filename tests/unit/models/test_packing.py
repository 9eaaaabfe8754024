"""Packed rows give the losses of rows of their own; chosen positions give the logits of all."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import LlamaConfig

from llmslm.checkpoint import codec_for
from llmslm.data.codec import IGNORED, PackedShape, TextFormat, target_positions
from llmslm.errors import UserError
from llmslm.models.blocks import blocks, compile_blocks
from llmslm.models.document_attention import has_windows
from llmslm.models.fusion import Add, CrossAttend, Prefix, PrefixOnly, Replace, ReplaceEncoder
from llmslm.models.head import logits_at
from llmslm.models.language_model import ModelSource
from llmslm.models.packing import causal_inputs, check_packing
from llmslm.models.projector import Resampler
from llmslm.module import SystemModule
from tests import tiny
from tests.unit.models.compositions import compose, open_gates

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
@pytest.mark.parametrize("fusion", [Add, Replace, CrossAttend])
def test_a_composition_packs_both_sides(encoder, fusion, tmp_path):
    model = composed(encoder, "llama", tmp_path, fusion)
    codec, rows = codec_of(model), with_states(ROWS)
    packed = codec.collate_packed(rows, PackedShape(2, (10, 6)))
    assert packed["on_prompt"][0].tolist() == [1, 1, 1, 0, 0, 0, 1, 0, 0, 0]
    assert packed["prompt_documents"][0].tolist() == [0, 0, 0, 1, -1, -1]
    assert codec.sizes(rows, packed) == (3, 8, 7, 8, 32)
    assert_same_loss(model, codec.collate(rows), packed)


@pytest.mark.parametrize("encoder", ["t5", "llama"])
@pytest.mark.parametrize("fusion", [Add, Replace])
def test_a_composition_of_an_encoder_decoder_packs_three_sides(encoder, fusion, tmp_path):
    model = composed(encoder, "t5", tmp_path, fusion)
    codec, rows = codec_of(model), with_states(ROWS)
    packed = codec.collate_packed(rows, PackedShape(2, (8, 6, 6)))
    assert packed["documents"][0].tolist() == [0, 0, 0, 1, -1, -1, -1, -1]
    assert codec.sizes(rows, packed) == (3, 8, 7, 8, 40)
    assert_same_loss(model, codec.collate(rows), packed)


@pytest.mark.parametrize("encoder", ["t5", "llama"])
def test_a_decoder_that_reads_the_states_packs_these_and_its_targets(encoder, tmp_path):
    model = composed(encoder, "t5", tmp_path, ReplaceEncoder)
    codec = codec_of(model)
    rows = [row | {"input_prompt_ids": [1]} for row in with_states(ROWS)]
    packed = codec.collate_packed(rows, PackedShape(2, (8, 6)))
    assert packed["input_ids"].tolist() == [[1], [1]]
    assert codec.sizes(rows, packed) == (3, 0, 7, 8, 28)
    assert_same_loss(model, codec.collate(rows), packed)


def composed(encoder, slm, folder, fusion):
    """A composition whose new layers are no longer at zero, and which passes the check of packing."""
    model = compose(encoder, slm, folder, fusion)
    open_gates(model)
    check_packing(model, reads_states=True)
    return model


def with_states(rows):
    return [row | {"prompt_ids": row["input_prompt_ids"]} for row in rows]


def assert_same_loss(model, alone, packed):
    torch.testing.assert_close(summed_loss(model, packed), summed_loss(model, alone), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("slm", "fusion"), [("llama", Prefix), ("llama", PrefixOnly), ("t5", PrefixOnly), ("t5", CrossAttend)]
)
def test_fusions_that_would_mix_examples_do_not_pack(slm, fusion, tmp_path):
    assert not codec_of(compose("t5", slm, tmp_path, fusion)).can_pack


def test_states_that_are_compressed_do_not_pack(tmp_path):
    model = compose("llama", "t5", tmp_path, ReplaceEncoder)
    assert model.can_pack
    model.projector = Resampler(32, 32, states=2)
    assert not model.can_pack


def test_what_cannot_read_a_packed_row_is_refused(monkeypatch):
    model = tiny.build("llama").train()
    forward = model.model.forward

    def of_one_example(*args, attention_mask=None, **kwargs):
        if attention_mask is not None:
            raise ValueError("too many values to unpack")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", of_one_example)
    with pytest.raises(UserError, match=r"llama cannot read packed examples \(too many values.*data\.pack_tokens"):
        check_packing(model)
    assert model.training


@pytest.mark.parametrize(
    ("changes", "has"),
    [
        ({}, False),
        ({"sliding_window": 4}, True),
        ({"layer_types": ["full_attention", "chunked_attention"], "num_hidden_layers": 2}, True),
    ],
)
def test_layers_that_see_a_part_keep_the_masks_of_their_own(changes, has):
    config = LlamaConfig(attn_implementation="sdpa", **changes)
    assert has_windows(config) == has
    assert bool(causal_inputs(config, torch.zeros(1, 3, dtype=torch.long), None)) != has


def test_what_mixes_the_states_of_a_row_is_refused(tmp_path):
    model = compose("t5", "llama", tmp_path)
    model.projector = Resampler(32, 32, states=2)
    with pytest.raises(UserError, match=r"keep packed examples apart"):
        check_packing(model, reads_states=True)


def codec_of(model):
    return codec_for(model, Tokenizer(), None, TextFormat())


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


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # as above
def test_blocks_that_attend_to_states_share_their_compilations(tmp_path):
    torch.compiler.reset()
    model, compiled = composed("llama", "llama", tmp_path, CrossAttend).train(), CompileCounter()
    model.slm.model.layers.extend(copy.deepcopy(model.slm.model.layers))
    model.fusion.attach(model.slm)
    for block in blocks(model.slm):
        block.compile(backend=compiled)
    summed_loss(model, codec_of(model).collate_packed(with_states(ROWS), PackedShape(2, (24, 16)))).backward()
    assert compiled.frame_count <= 2  # of the first block, whose input is not a block's output, and of the further ones
    torch.compiler.reset()


def test_compiled_blocks_are_not_compiled_for_the_few_tokens_of_the_check():
    model = tiny.build("llama")
    compile_blocks(model, fixed_shapes=True)
    torch._dynamo.reset()
    counters.clear()
    check_packing(model)
    assert not counters["stats"]["unique_graphs"]
