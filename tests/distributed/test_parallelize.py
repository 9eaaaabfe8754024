"""Sharded over gloo ranks, a model has the losses and gradients of one process on the same global batch."""

import threading
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaModel

from llmslm.errors import UserError
from llmslm.models.alignment import SameTokenizer
from llmslm.models.encoder import Encoder
from llmslm.models.fusion import Add
from llmslm.models.modeling import LlmToSlm
from llmslm.models.projector import MlpProjector
from llmslm.models.trained import Lora, restrict
from llmslm.parallel import _shard_encoder, gathered, make_mesh, parallelize, token_share
from tests import tiny
from tests.distributed.ranks import run_ranks

ROWS, LENGTH = 6, 12


def composition(slm="llama", trained="full"):
    """The same composition on every rank."""
    torch.manual_seed(3)
    encoder = Encoder(tiny.build("t5").get_encoder())
    model = tiny.build(slm)
    restrict(model, trained, "somewhere", None, "model.slm")
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)  # where it is zero, the other adapters have no gradient
    parts = {"projector": MlpProjector(32, 32), "alignment": SameTokenizer(32, 32), "fusion": Add(32, 32)}
    return LlmToSlm.compose(encoder, model, **parts).train()


def batch():
    """Rows with different numbers of targets, so that ranks have different shares."""
    torch.manual_seed(5)
    ids = torch.randint(3, tiny.VOCABULARY, (ROWS, LENGTH))
    labels = torch.full_like(ids, -100)
    for row in range(ROWS):
        labels[row, 5 : 7 + row] = ids[row, 5 : 7 + row]
    prompt = {"prompt_ids": ids[:, :5], "prompt_attention_mask": torch.ones(ROWS, 5, dtype=torch.long)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels} | prompt


def backward(model, rows, weigh=True):
    part = {name: value[rows] for name, value in batch().items()}
    tokens = int((part["labels"][:, 1:] != -100).sum())
    loss = model(**part, use_cache=False).loss
    (loss * (token_share(tokens, loss.device) if weigh else 1)).backward()
    return loss.detach() * tokens


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def sharded_gradients(rank, world_size, shards, options, trained="full"):
    model = composition(trained=trained)
    parallelize(model, mesh=make_mesh("cpu", world_size, shards), **options)
    rows = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    loss = backward(model, rows)
    torch.distributed.all_reduce(loss)
    return loss.item(), {name: value.numpy() for name, value in gradients(model).items()}


@pytest.mark.parametrize(
    ("world_size", "shards", "options"),
    [
        (2, None, {"encoder": "sharded"}),
        (2, None, {"encoder": "replicated", "reshard_after_forward": False}),
        (2, None, {"encoder": "offloaded", "activation_checkpointing": True}),
        (3, None, {}),
        (2, 1, {}),
        (4, 2, {"encoder": "replicated"}),
    ],
    ids=["sharded", "replicated", "offloaded", "uneven", "copies", "hybrid"],
)
def test_loss_and_gradients_are_those_of_one_process(world_size, shards, options):
    model = composition()
    expected_loss = backward(model, slice(None)).item()
    expected = gradients(model)
    for loss, found in run_ranks(sharded_gradients, world_size, world_size, shards, options):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert set(found) == set(expected)
        apart = [abs(loss - expected_loss) / int((batch()["labels"] != -100).sum())]
        apart += [float((torch.from_numpy(value) - expected[name]).abs().max()) for name, value in found.items()]
        print(f"loss and gradients differ by at most {max(apart):.2g}")
        assert max(apart) <= 1e-6
        for name, value in found.items():
            torch.testing.assert_close(torch.from_numpy(value), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [Lora(rank=4), Lora(rank=4, dora=True), "nothing"], ids=["lora", "dora", "nothing"])
def test_gradients_of_adapters_and_projector_alone_too(trained):
    model = composition(trained=trained)
    expected_loss = backward(model, slice(None)).item()
    expected = gradients(model)
    options = {"activation_checkpointing": True}
    for loss, found in run_ranks(sharded_gradients, 2, 2, None, options, trained):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert set(found) == set(expected)
        for name, value in found.items():
            torch.testing.assert_close(torch.from_numpy(value), expected[name], rtol=1e-5, atol=1e-6)


def predictions(rank, slm):
    model = composition(slm).eval()
    parallelize(model, mesh=make_mesh("cpu", 2))
    prompts = {name: value[:, :5] for name, value in batch().items() if name.startswith("prompt")}
    with gathered(model):
        first = model.generate(**prompts, max_new_tokens=4 + rank, do_sample=False)  # each at its own pace
    with torch.no_grad():
        model(**batch(), use_cache=False)  # sharded again
    assert all(isinstance(p, DTensor) for p in model.slm.parameters())
    return first.tolist()


@pytest.mark.parametrize("slm", ["llama", "t5"])
def test_generate_agrees_on_all_ranks(slm):
    model = composition(slm).eval()
    prompts = {name: value[:, :5] for name, value in batch().items() if name.startswith("prompt")}
    expected = model.generate(**prompts, max_new_tokens=5, do_sample=False)
    for rank, found in enumerate(run_ranks(predictions, 2, slm)):
        assert found == expected[:, : 4 + rank + (1 if slm == "t5" else 5)].tolist()


def mixed(rank):
    model = composition()
    parallelize(model, mesh=make_mesh("cpu", 2), compute_dtype=torch.bfloat16)
    backward(model, slice(rank * 3, rank * 3 + 3))
    kinds = {(p.dtype, p.grad.dtype) for p in model.parameters() if p.grad is not None}
    return [tuple(map(str, kind)) for kind in kinds]


def test_weights_and_gradients_stay_in_float32_under_bfloat16():
    assert run_ranks(mixed, 2) == [[("torch.float32", "torch.float32")]] * 2


def left_out(rank):
    model = composition()
    weight = torch.nn.Parameter(torch.zeros(3))
    parallelize(model, mesh=make_mesh("cpu", 2))
    model.register_parameter("late", weight)
    from llmslm.parallel import _check_sharded

    try:
        _check_sharded(model)
    except RuntimeError as error:
        return str(error)


def test_a_trained_weight_that_is_left_out_is_an_error():
    assert all("would differ between ranks: ['late']" in text for text in run_ranks(left_out, 2))


@pytest.mark.parametrize("place", ["sharded", "offloaded"])
def test_a_quantised_encoder_is_not_cut_into_parts(place):
    encoder = composition().encoder
    encoder.quantization = "8bit"
    assert _shard_encoder(encoder, "replicated", {}) == set(encoder.parameters())
    with pytest.raises(UserError, match=f"cannot be {place}: its 8bit weights .* set .*encoder to replicated"):
        _shard_encoder(encoder, place, {})


def test_a_mesh_that_does_not_fit():
    with pytest.raises(UserError, match="shard_size is 3, which does not divide the 4 devices"):
        make_mesh("cpu", 4, 3)


def own_bytes():
    """Memory of this process alone: pages of a mapped file, which all processes of a host share, do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def loaded_in_shards(rank, folder):
    """Load a frozen encoder, hash it and shard it; return the most memory that it took, and the weights."""
    first = composition()  # what torch allocates once is there before
    parallelize(first, mesh=make_mesh("cpu", 2))
    before, seen, done = own_bytes(), [], threading.Event()

    def watch():
        while not done.wait(0.002):
            seen.append(own_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    parts = {"projector": MlpProjector(512, 32), "alignment": SameTokenizer(512, 32), "fusion": Add(512, 32)}
    model = LlmToSlm.compose(Encoder.from_source(folder), tiny.build("llama"), **parts)
    parallelize(model, mesh=make_mesh("cpu", 2))
    done.set()
    thread.join()
    taken = max(seen) - before
    weights = {name: value.full_tensor().sum().item() for name, value in model.encoder.model.state_dict().items()}
    return taken, weights


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from Linux")
def test_a_rank_holds_its_part_of_a_frozen_encoder_never_all_of_it(tmp_path):
    """Weights are mapped from safetensors: the ranks of a host share the file's pages, and each copies its part."""
    config = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=24, vocab_size=tiny.VOCABULARY)
    whole = LlamaModel(config)
    whole.save_pretrained(tmp_path)
    size = sum(weight.nbytes for weight in whole.parameters())
    expected = {name: value.sum().item() for name, value in whole.state_dict().items()}
    for taken, found in run_ranks(loaded_in_shards, 2, str(tmp_path)):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
        print(f"{taken / 2**20:.0f} MiB of its own for a rank, {size / 2**20:.0f} MiB the encoder")
        assert taken < 0.7 * size
