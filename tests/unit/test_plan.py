"""The plan: what it counts is what training has, and what sharding divides is divided."""

import json

import pytest
import torch

from llmslm.checkpoint import codec_for
from llmslm.cli import main
from llmslm.data.codec import IGNORED, PackedShape, TextFormat
from llmslm.data.datamodule import collate_training
from llmslm.errors import UserError
from llmslm.planning.command import table
from llmslm.planning.costs import DEVICES, allocated
from llmslm.planning.job import Job, World
from llmslm.planning.predict import Sizes, check, predict
from llmslm.planning.rows import batch as full_batch
from llmslm.planning.step import build, loss
from tests import tiny
from tests.unit import toy

RECIPE = {
    "model": {"llm": {"config": toy.T5}, "slm": {"config": toy.LLAMA}},
    "data": {"tokenizer": {"vocab_size": 300}, "micro_batch_size": 4, "max_prompt_tokens": 16, "max_target_tokens": 8},
    "trainer": {"precision": "bf16-mixed"},
}
FSDP = {"class_path": "llmslm.parallel.Fsdp"}
ONE = World(DEVICES["h200"], 1, 8, 1)


def job(system="llm_to_slm", strategy=None, **trainer):
    recipe = RECIPE | {"model": RECIPE["model"] | {"system": system}}
    extra = {"strategy": strategy} if strategy else {}
    return Job.of(recipe | {"trainer": RECIPE["trainer"] | extra | trainer})


def world(gpus, shard):
    return World(DEVICES["h200"], gpus, 8, shard)


@pytest.mark.parametrize("system", ["llm", "slm", "llm_to_slm"])
def test_weights_are_those_of_the_real_system_and_a_step_runs(system):
    model = build(job(system))
    found = predict(job(system), ONE)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found["weights"]["trained"] == sum(p.numel() for p in trained)
    assert (found["weights"]["frozen"] > 0) == (system == "llm_to_slm")
    loss(model, job(system), full_batch(model, job(system))).backward()
    assert all(p.grad is not None for p in trained if p.numel() > 1)
    assert found["memory_bytes"]["optimizer"] == 8 * found["weights"]["trained"]
    assert 0 < found["seconds"]["compute"] <= found["seconds"]["step"]


@pytest.mark.parametrize("train", [{"rank": 2}, {"rank": 2, "dora": True}, "nothing"], ids=["lora", "dora", "nothing"])
def test_what_is_not_trained_needs_no_moments(train):
    recipe = RECIPE | {"model": RECIPE["model"] | {"slm": RECIPE["model"]["slm"] | {"train": train}}}
    one, full = Job.of(recipe), job()
    trained = sum(p.numel() for p in build(one).parameters() if p.requires_grad)
    found, whole = predict(one, ONE), predict(full, ONE)
    assert found["weights"]["trained"] == trained < whole["weights"]["trained"]
    assert found["memory_bytes"]["optimizer"] == 8 * trained
    assert found["memory_bytes"]["weights"] >= whole["memory_bytes"]["weights"]
    assert Sizes.of(build(one)).root > 0


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    small, large = predict(job(), ONE), predict(Job.of(RECIPE, prompt_tokens=256), ONE)
    assert large["memory_bytes"]["activations"] > 8 * small["memory_bytes"]["activations"]
    deep = {"llm": {"config": toy.T5}, "slm": {"config": toy.LLAMA | {"num_hidden_layers": 12}}, "system": "slm"}
    peaks = []
    for again in (False, True):
        strategy = FSDP | {"init_args": {"activation_checkpointing": again}}
        one = Job.of(RECIPE | {"model": deep, "trainer": {"precision": "bf16-mixed", "strategy": strategy}}, 256)
        peaks.append(predict(one, world(2, 2))["memory_bytes"]["activations"])
    assert peaks[1] < peaks[0] / 2


def test_shards_divide_what_is_held():
    whole, half = predict(job(strategy=FSDP), world(1, 1)), predict(job(strategy=FSDP), world(2, 2))
    for kind in ("weights", "gradients", "optimizer", "encoder"):
        assert half["memory_bytes"][kind] == whole["memory_bytes"][kind] / 2
    assert whole["seconds"]["communication"] == 0
    copies = predict(job(strategy=FSDP), world(16, 8))
    assert copies["memory_bytes"]["weights"] == whole["memory_bytes"]["weights"] / 8
    replicated = predict(job(strategy=FSDP | {"init_args": {"encoder": "replicated"}}), world(2, 2))
    assert replicated["memory_bytes"]["encoder"] == whole["memory_bytes"]["encoder"]
    offloaded = predict(job(strategy=FSDP | {"init_args": {"encoder": "offloaded"}}), world(2, 2))
    assert offloaded["memory_bytes"]["encoder"] == 0
    assert (half["host_bytes"], offloaded["host_bytes"]) == (0, whole["memory_bytes"]["encoder"])
    assert "of each host: the encoder" in table(job(), world(2, 2), offloaded)
    assert "of each host" not in table(job(), world(2, 2), half)


def test_copies_hold_each_gradient_once():
    found = predict(job(strategy="ddp"), world(2, 1))["memory_bytes"]
    assert found["peak"] == sum(size for kind, size in found.items() if kind != "peak")
    assert found["gathered"] == 0


def test_the_forward_runs_beside_the_gradients_of_the_step_before():
    wide = {"system": "slm", "slm": {"config": toy.LLAMA | {"hidden_size": 256, "intermediate_size": 1024}}}
    found = planned(wide, {"micro_batch_size": 1})
    # Weights, gradients and moments, and what the forward casts for its backward: 16 and 2 bytes a weight.
    assert found["memory_bytes"]["peak"] > 17.5 * found["weights"]["trained"]


def test_a_large_encoder_is_planned_without_its_weights():
    llama = toy.LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    llama |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    model = {"llm": {"config": llama}, "slm": {"config": toy.LLAMA}, "encoder": {"dtype": "bfloat16"}}
    large = Job.of({"model": model, "data": RECIPE["data"], "trainer": {"precision": "bf16-mixed", "strategy": FSDP}})
    found = predict(large, world(64, 64))
    assert found["weights"]["frozen"] == pytest.approx(69.5e9, rel=0.02)
    assert found["memory_bytes"]["encoder"] == pytest.approx(69.5e9 * 2 / 64, rel=0.02)
    assert found["fits"]
    assert not predict(large, world(1, 1))["fits"]


def test_the_command(workdir, capsys):
    recipe = toy.write_recipe(workdir, precision="bf16-mixed")
    main(["plan", "--config", recipe, "--config", "hardware/8gpu_fsdp", "--gpu", "h100", "--model.system", "slm"])
    text = capsys.readouterr().out
    assert "8 x h100 (8 a node), shards of 8" in text
    assert "of 80: fits" in text
    main(["plan", "--config", recipe, "--model.system=slm", "--data.micro_batch_size=2", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["gpus"] == record["shard"] == 1
    main(["plan", "--config", recipe, "--model.system=slm", "--measure"])
    record = json.loads(capsys.readouterr().out)
    assert record["measured"]["step_s"] > 0
    assert record["provenance"]["hardware"]["cpu"]
    assert record["predicted_over_measured"]["step"] > 0


def test_mistakes(workdir, capsys):
    recipe = toy.write_recipe(workdir)
    with pytest.raises(UserError, match="6 GPUs cannot be divided into shards of 4"):
        check(job(), world(6, 4))
    sharded = ["plan", "--config", recipe, "--config", "hardware/8gpu_fsdp"]
    for key, message in (("encoder", "encoder is cpu; expected one of sharded,"), ("shards", "shards is not known")):
        with pytest.raises(SystemExit):
            main([*sharded, f"--trainer.strategy.init_args.{key}", "cpu"])
        assert f"trainer.strategy.init_args.{message}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--config", recipe, "--model.system"])
    assert "expected --key.of.recipe VALUE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--config", "hardware/1gpu"])
    assert "the recipe has neither model.llm.source nor model.llm.config" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--config", recipe, "--model.encoder.source=/nowhere"])
    assert "model.encoder.source '/nowhere' cannot be loaded: there is no folder" in capsys.readouterr().err


def test_sizes_of_a_model():
    model = build(job("slm"))
    sizes = Sizes.of(model)
    assert sizes.trained == sizes.root + sizes.block  # one block
    assert sizes.frozen == sizes.frozen_block == 0
    assert torch.get_default_dtype() == torch.float32


def planned(model=None, data=None, strategy=None, at=ONE, **trainer):
    """A prediction for changes of the recipe."""
    recipe = {"model": RECIPE["model"] | (model or {}), "data": RECIPE["data"] | (data or {})}
    recipe["trainer"] = RECIPE["trainer"] | ({"strategy": strategy} if strategy else {}) | trainer
    return predict(Job.of(recipe), at)


def test_an_encoder_is_read_whole(tmp_path):
    tiny.CONFIGS["llama"].save_pretrained(tmp_path)
    whole, short = ({"source": str(tmp_path), **more} for more in ({}, {"layers": 1}))
    held = [planned({"llm": llm})["memory_bytes"]["encoder"] for llm in (whole, short)]
    assert held[0] == held[1]
    trained = [planned({"system": "llm", "llm": llm})["weights"]["trained"] for llm in (whole, short)]
    assert trained[0] > trained[1]


def test_packed_rows_are_as_long_as_they_are_packed():
    found = planned(data={"pack_tokens": 96})
    assert found["row_tokens"] == {"prompt": 64, "target": 32}
    assert found["memory_bytes"]["activations"] > 3 * planned()["memory_bytes"]["activations"]
    encoder_decoder = planned({"system": "llm"}, {"pack_tokens": 96})
    assert encoder_decoder["row_tokens"] == {"prompt": 96, "target": 48}
    unpacked = planned({"fusion": {"class_path": "llmslm.models.fusion.Prefix"}}, {"pack_tokens": 96})
    assert unpacked["row_tokens"] == {"prompt": 16, "target": 8}


def test_packed_rows_keep_no_mask():
    same = {"max_prompt_tokens": 128, "max_target_tokens": 128}
    packed, padded = (planned({"system": "slm"}, same | more) for more in ({"pack_tokens": 256}, {}))
    assert packed["row_tokens"] == padded["row_tokens"]
    masks = 4 * 256 * 256 * 2  # of rows, in the one block
    positions = 3 * 2 * 256 * 8 * 4  # sines and cosines are of each row's own positions
    assert packed["memory_bytes"]["activations"] == padded["memory_bytes"]["activations"] - masks + positions


@pytest.mark.parametrize(("mib", "block"), [(9.5, 9.5), (10, 10), (11, 12), (11.5, 12), (10.5, 10.5), (12, 12)])
def test_the_allocator_has_blocks_of_two_mib(mib, block):
    assert allocated(mib * 2**20) == block * 2**20


def test_a_quantised_encoder_takes_fewer_bytes_but_for_its_embeddings():
    wide = {"llm": {"config": toy.LLAMA | {"hidden_size": 256, "intermediate_size": 1024}}}
    whole, eight, four = (
        planned(wide | {"encoder": {"dtype": "bfloat16", "quantization": bits}})["memory_bytes"]["encoder"]
        for bits in (None, "8bit", "4bit")
    )
    embeddings = 2 * 300 * 256
    assert (eight - embeddings) / (whole - embeddings) == pytest.approx(0.5, rel=0.01)
    assert (four - embeddings) / (whole - embeddings) == pytest.approx(0.28, rel=0.01)


def test_both_models_attend_as_they_do_in_training():
    """The encoder's attention was the eager one, which holds the scores of all pairs of tokens."""
    model = build(Job.of(RECIPE | {"model": RECIPE["model"] | {"llm": {"config": toy.LLAMA}}}))
    assert model.encoder.config._attn_implementation == model.slm.config._attn_implementation == "sdpa"


def test_stored_features_need_no_encoder():
    found = planned({"encoder": {"features": "folder"}})
    assert found["weights"]["frozen"] == found["memory_bytes"]["encoder"] == 0
    assert found["seconds"]["compute"] < planned()["seconds"]["compute"]


def test_gradients_wait_whole_while_they_are_accumulated():
    one, four = (planned(strategy=FSDP, at=world(8, 8), accumulate_grad_batches=n) for n in (1, 4))
    more = four["memory_bytes"]["gathered"] - one["memory_bytes"]["gathered"]
    assert more == pytest.approx(4 * one["weights"]["trained"] * 7 / 8)


def test_the_adapters_of_a_node_work_together():
    assert world(8, 8).shard_link == DEVICES["h200"].link_bytes_per_s
    assert world(16, 16).shard_link == 350e9  # 8 x 45e9 is more than a GPU's own link
    assert world(16, 8).copy_link == 45e9  # each GPU reduces its own part with one GPU of the other node
    assert world(16, 2).copy_link == 4 * 45e9


def test_what_a_training_costs(workdir, capsys):
    recipe = toy.write_recipe(workdir, max_steps=1_000_000)
    main(["plan", "--config", recipe, "--config", "hardware/8gpu_fsdp", "--data.micro_batch_size", "4000000"])
    text = capsys.readouterr().out
    assert "does not fit: try a lower data.micro_batch_size" in text
    assert "1,000,000 steps: " in text
    last = text.splitlines()[-1].replace(",", "").split()
    assert float(last[last.index("GPU-hours") - 1]) == pytest.approx(8 * float(last[last.index("hours") - 1]), rel=0.01)


def test_compiled_blocks_keep_less_and_compute_it_again():
    eager, compiled = (
        predict(Job.of(RECIPE | {"model": RECIPE["model"] | {"system": "slm", "compile": on}}), ONE)["memory_bytes"]
        for on in (False, True)
    )
    assert compiled["activations"] < 0.9 * eager["activations"]
    assert compiled["weights"] == eager["weights"]


@pytest.mark.parametrize(("precision", "mixed"), [("bf16", True), (16, True), ("32", False), ("16-mixed", True)])
def test_short_names_of_precisions_are_those_of_the_trainer(precision, mixed):
    assert job(precision=precision).mixed == mixed
    with pytest.raises(UserError, match=r"trainer.precision is bf16-true; a plan knows 32, "):
        job(precision="bf16-true")


@pytest.mark.parametrize(("devices", "gpus"), [(2, 2), ([0, 3], 2), ("4", 4), ("0,1,", 2), ("auto", 1), (-1, 1)])
def test_devices_are_counted_as_the_trainer_does(workdir, capsys, devices, gpus):
    recipe = toy.write_recipe(workdir, devices=devices)
    main(["plan", "--config", recipe, "--json"])
    assert json.loads(capsys.readouterr().out)["gpus"] == gpus


def test_the_folder_of_a_run_is_planned_as_its_model(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "run" / "system")
    model = RECIPE["model"] | {"encoder": {"source": str(tmp_path / "run")}}
    assert build(Job.of(RECIPE | {"model": model})).encoder.hidden_size == 32


@pytest.mark.parametrize("system", ["llm", "slm", "llm_to_slm"])
def test_a_graph_has_gradients_of_its_own(system):
    compiled = RECIPE["model"] | {"system": system, "compile": True}
    packed = RECIPE | {"model": compiled, "data": RECIPE["data"] | {"pack_tokens": 32}}
    one = predict(Job.of(packed), ONE)
    assert one["memory_bytes"]["gradients"] == 2 * 4 * one["weights"]["trained"]
    copies = predict(Job.of(packed), world(2, 1))["memory_bytes"]["gradients"]
    assert copies == 3 * 4 * one["weights"]["trained"]


def test_many_gradients_of_copies_are_averaged_during_the_backward(monkeypatch):
    monkeypatch.setattr("llmslm.planning.job.MOST_OF_COPIES", 1)
    compiled = RECIPE["model"] | {"system": "slm", "compile": True}
    packed = RECIPE | {"model": compiled, "data": RECIPE["data"] | {"pack_tokens": 32}}
    copies = predict(Job.of(packed), world(2, 1))
    assert copies["memory_bytes"]["gradients"] == 4 * copies["weights"]["trained"]


class Tokenizer:
    """As much of a tokenizer as collating needs."""

    pad_token_id, eos_token_id = 0, 1


@pytest.mark.parametrize("pack_tokens", [None, 24, 60])
@pytest.mark.parametrize("system", ["llm", "slm", "llm_to_slm", "stored", "states"])
def test_a_batch_is_what_the_collator_makes_of_full_rows(system, pack_tokens):
    config = toy.T5 if system in ("llm", "states") else toy.LLAMA
    parts = {"stored": {"encoder": {"features": "folder"}}, "states": {"fusion": "ReplaceEncoder"}}.get(system, {})
    model = {"llm": {"config": config}, "slm": {"config": config}, **parts}
    model["system"] = "llm_to_slm" if parts else system
    one = Job.of(RECIPE | {"model": model, "data": RECIPE["data"] | {"pack_tokens": pack_tokens}})
    built = build(one)
    found = full_batch(built, one)
    count, codec = one.examples(built), codec_for(built, Tokenizer(), None, TextFormat())
    assert count == {None: 1, 24: 1, 60: 3 if built.config.is_encoder_decoder else 2}[pack_tokens]
    rows = []
    for number in range(one.rows * count):
        prompt, target = ((i + 1) * n // count - i * n // count for n in one.lengths(built) for i in [number % count])
        states = {"hidden_states": torch.zeros(prompt, 32, dtype=torch.bfloat16)} if system == "stored" else {}
        own = [1] if system == "states" else [2] * prompt
        rows.append({"input_prompt_ids": own, "prompt_ids": [2] * prompt, "target_ids": [2] * target, **states})
    capacities = tuple(sum(len(row[name]) for row in rows[:count] for name in side) for side in codec.packed_sides)
    shape = PackedShape(one.rows, capacities, one.rows * (count + 1))
    expected = collate_training(rows, codec, [shape] if pack_tokens else [])
    del expected["sizes"]
    shapes = [{name: (x.shape, x.dtype) for name, x in tensors.items()} for tensors in (found, expected)]
    assert shapes[0] == shapes[1]
    for name in set(found) - {"input_ids", "prompt_ids", "labels", "target_ids"}:
        assert torch.equal(found[name], expected[name]), name
    assert torch.equal(found["labels"] == IGNORED, expected["labels"] == IGNORED)


def test_dropout_keeps_what_it_drops():
    without, dropping = (planned({"system": "slm", "dropout": rate}, {"pack_tokens": 24}) for rate in (0.0, 0.1))
    assert without["memory_bytes"]["activations"] < dropping["memory_bytes"]["activations"]


def test_time_is_that_of_how_a_step_is_run():
    packed = {"pack_tokens": 24}
    eager, compiled, graphed, sharded = (
        planned({"system": "slm", "compile": on}, data, strategy)
        for on, data, strategy in ((False, {}, None), (True, {}, None), (True, packed, None), (True, {}, FSDP))
    )
    runs = [found["run"] for found in (eager, compiled, graphed, sharded)]
    assert runs == ["eager", "compiled", "one graph", "compiled"]
    assert compiled["seconds"]["compute"] < eager["seconds"]["compute"]
    assert eager["limit"] == "host"  # few rows of a small model
    assert graphed["seconds"]["host"] == 0
    assert graphed["limit"] == "compute"
    assert graphed["seconds"]["step_at_best"] < graphed["seconds"]["step"] < compiled["seconds"]["step"]
    assert sharded["seconds"]["host"] > 1.5 * compiled["seconds"]["host"]


@pytest.mark.parametrize("compiled", [False, True])
def test_logits_of_the_llm_take_another_gradient_of_the_slms(compiled):
    model = {"system": "slm", "compile": compiled, "slm": {"config": toy.LLAMA | {"vocab_size": 30_000}}}
    without, learning = (
        planned(model | {"distillation": {"logits": logits}}, {"micro_batch_size": 512})["memory_bytes"]
        for logits in (None, "folder")
    )
    added = learning["activations"] - without["activations"]
    assert added == pytest.approx(512 * 8 * 30_000 * 2, rel=1e-3)  # rows, target tokens, vocabulary, bytes in bfloat16


def test_the_llm_does_not_learn_from_its_own_logits():
    model = {"compile": True, "distillation": {"logits": "folder"}}
    runs = [planned(model | {"system": name}, {"pack_tokens": 24})["run"] for name in ("llm", "slm")]
    assert runs == ["one graph", "compiled"]
