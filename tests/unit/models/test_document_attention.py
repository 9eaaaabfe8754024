"""Attention within documents is attention by mask, without the mask."""

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llmslm.data.codec import PackedShape, document_starts
from llmslm.models import document_attention
from llmslm.models.document_attention import NAME, attend_by_mask, attend_within_documents
from llmslm.models.fusion import Add, CrossAttend
from llmslm.models.packing import check_packing
from tests import tiny
from tests.unit.models.test_packing import ROWS, assert_same_loss, codec_of, composed, summed_loss, with_states


def one_by_one(query, key, value, starts, _, longest, __, *, scale, window_size):
    """What the kernel computes, for CPUs."""
    assert window_size == (-1, 0)
    parts = []
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert stop - start <= longest
        flat = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        parts.append(scaled_dot_product_attention(*flat, is_causal=True, scale=scale).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def takes():
    """Precisions that the kernel takes."""
    return {torch.float32, torch.bfloat16}


@pytest.fixture
def calls(monkeypatch, takes):
    """Let CPUs attend so, and list the calls."""
    made = []

    def kernel(*args, **kwargs):
        made.append(kwargs)
        return one_by_one(*args, **kwargs)

    monkeypatch.setattr(document_attention, "_runs_on", lambda query: query.dtype in takes)
    monkeypatch.setattr(document_attention, "may_attend", lambda _: True)
    monkeypatch.setattr(document_attention, "varlen_attn", kernel)
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma"])
def test_a_model_has_the_loss_of_examples_on_their_own(family, calls):
    model = tiny.build(family).eval()
    expected = summed_loss(model, codec_of(model).collate(ROWS))
    attend_within_documents(model, lambda: check_packing(model))
    calls.clear()
    packed = codec_of(model).collate_packed(ROWS, PackedShape(2, (10,), 8))
    torch.testing.assert_close(summed_loss(model, packed), expected, rtol=1e-5, atol=0)
    assert len(calls) == model.config.num_hidden_layers
    attend_by_mask(model)
    torch.testing.assert_close(summed_loss(model, packed), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_mixed_precision_reaches_the_kernel(family, calls, takes):
    """Rotary positions make float32 of queries and keys; the kernel takes 16 bits alone."""
    takes.remove(torch.float32)
    model = tiny.build(family).eval()
    batch = codec_of(model).collate_packed(ROWS, PackedShape(2, (10,), 8))
    with torch.autocast("cpu", torch.bfloat16):
        expected = summed_loss(model, batch)
        attend_within_documents(model, lambda: check_packing(model))
        calls.clear()
        found = summed_loss(model, batch)
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("fusion", [Add, CrossAttend])
def test_so_does_a_composition(fusion, calls, tmp_path):
    model = composed("t5", "llama", tmp_path, fusion)
    attend_within_documents(model.slm, lambda: check_packing(model, reads_states=True))
    assert calls
    codec, rows = codec_of(model), with_states(ROWS)
    assert_same_loss(model, codec.collate(rows), codec.collate_packed(rows, PackedShape(2, (10, 6), 8)))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it and hides the warning
def test_compiled_blocks_hold_it_whole(calls, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(document_attention, "varlen_attn", lambda query, *_, **__: query)
    model = tiny.build("llama")
    attend_within_documents(model, lambda: None)
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        summed_loss(model, codec_of(model).collate_packed(ROWS, PackedShape(2, (10,), 8)))
    torch.compiler.reset()


def test_what_fails_the_check_attends_by_mask(calls):
    model = tiny.build("llama")

    def check():
        assert model.config._attn_implementation == NAME
        raise RuntimeError("no such kernel\nfurther lines")

    with pytest.warns(UserWarning, match=r"^packed rows are attended to by a mask: no such kernel$"):
        attend_within_documents(model, check)
    assert model.config._attn_implementation == "sdpa"


def test_a_saved_model_does_not_name_it(calls, tmp_path):
    model = tiny.build("llama")
    attend_within_documents(model, lambda: None)
    model.save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_a_cpu_attends_by_mask():
    model = tiny.build("llama")
    attend_within_documents(model, lambda: pytest.fail("nothing to check"))
    assert model.config._attn_implementation == "sdpa"


def test_starts_of_documents_have_room_left_over():
    documents = torch.tensor([[0, 0, 1, -1], [0, 1, 1, 1]])
    assert document_starts(documents).tolist() == [0, 2, 3, 4, 5, 8]
    assert document_starts(documents, 7).tolist() == [0, 2, 3, 4, 5, 8, 8, 8]
    assert len(document_starts(documents, 4)) == 8 + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler looks at it
@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernel_has_the_loss_and_gradients_of_the_mask(compiled, monkeypatch):
    torch.manual_seed(0)
    model = tiny.build("llama", hidden_size=128, num_attention_heads=2, num_key_value_heads=1).cuda()
    kernel, calls = document_attention.varlen_attn, []

    def counted(*args, **kwargs):
        calls.append(args)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(document_attention, "varlen_attn", counted)
    batch = codec_of(model).collate_packed(ROWS, PackedShape(2, (16,), 8))
    batch = {name: tensor.cuda() for name, tensor in batch.items()}

    def step():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = summed_loss(model, batch)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, gradients = step()
    with torch.autocast("cuda", torch.bfloat16):
        attend_within_documents(model, lambda: check_packing(model))
    assert calls
    assert model.config._attn_implementation == NAME
    if compiled:
        monkeypatch.undo()
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    found, ours = step()
    torch.testing.assert_close(found, loss, rtol=0.02, atol=0)
    assert (ours - gradients).norm() < 0.05 * gradients.norm()
