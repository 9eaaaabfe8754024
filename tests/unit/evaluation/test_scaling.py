"""The benchmark of scaling: what a world runs, how worlds compare, and the batches that they train on."""

import json
from concurrent.futures import Future
from dataclasses import asdict, replace

import pytest
import torch

from evaluation.benchmarks.scaling import SHAPES, beside, cases_of, foretell, last_words, predicted, summary
from evaluation.benchmarks.scaling_rank import Case, Orders, examples, job_of, read_lines, training_batch
from llmslm.data.codec import IGNORED
from llmslm.errors import UserError
from llmslm.planning.step import build


def orders(world=2, cases=(), gpu=False):
    shapes = {"encoder": SHAPES["tiny"], "slm": SHAPES["tiny"]}
    lengths = {"prompt_tokens": 12, "target_tokens": 4}
    return Orders(world, list(cases), **shapes, **lengths, steps=2, compile=False, examples=64, gpu=gpu)


def test_a_strong_batch_that_is_a_weak_one_is_trained_once():
    assert [case.rows for case in cases_of(2, [32, 2], 64) if case.placement == "sharded"] == [32, 2]
    assert [case.rows for case in cases_of(8, [32, 2], 64) if case.placement == "unsharded"] == [32, 2, 8]
    with pytest.raises(UserError, match="--strong is 64, which 6 GPUs cannot share equally; give a multiple of 6"):
        cases_of(6, [32], 64)


def test_orders_travel_as_json(tmp_path):
    given = orders(cases=[Case("sharded", 4)])
    (tmp_path / "orders.json").write_text(json.dumps(asdict(given)))
    assert Orders.read(tmp_path) == given
    assert read_lines(tmp_path) == []


@pytest.mark.parametrize("placement", ["sharded", "replicated", "unsharded"])
def test_a_case_is_planned_as_it_is_trained(placement):
    job = job_of(orders(gpu=True), Case(placement, 3))
    assert (job.rows, job.mixed, job.fused_optimizer) == (3, True, True)
    assert job.is_sharded == (placement != "unsharded")
    assert not job.is_sharded or job.encoder == placement
    compiled = job_of(replace(orders(1, gpu=True), compile=True), Case(placement, 3))
    assert not compiled.masked
    assert not compiled.is_graphed(build(compiled), 1)


def test_a_sharded_case_is_predicted_to_take_less_memory():
    found = {place: predicted(orders(8), Case(place, 1))["peak_memory_bytes"] for place in ("sharded", "unsharded")}
    assert found["sharded"] < found["unsharded"]


def test_rows_are_full_of_random_tokens_and_targets_alone_count():
    job = job_of(orders(), Case("sharded", 3))
    model = build(job)
    batch, other = training_batch(model, job, 0), training_batch(model, job, 1)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 16)
    assert torch.equal(batch["prompt_ids"], batch["input_ids"][:, :12])
    assert (batch["labels"] != IGNORED).sum(dim=1).tolist() == [4, 4, 4]
    rows, columns = batch["target_positions"]
    assert torch.equal(batch["labels"][rows, columns], batch["input_ids"][:, 12:].flatten())
    assert not torch.equal(batch["input_ids"], other["input_ids"])


def test_the_evaluation_has_prompts_of_one_length():
    made = examples(40, orders())
    assert len(set(made.ids)) == 40
    assert {len(prompt.split()) for prompt in made.prompts} == {6}


def measured(gpus, placement, rows, step_s, peak=None):
    speed = {"tokens_per_s": gpus * rows * 512 / step_s, "step_s": step_s}
    return {"gpus": gpus, "placement": placement, "rows": rows, **speed, "peak_memory_bytes": peak}


def test_efficiencies_are_over_one_gpu():
    rows = [
        *(measured(1, "sharded", size, size / 32) for size in (32, 64)),
        *(measured(1, "unsharded", size, size / 40) for size in (32, 64)),
        measured(2, "sharded", 32, 1.25, peak=5.0),
        measured(2, "unsharded", 32, 1.0, peak=10.0),
        {"gpus": 1, "examples_per_s": 100.0},
        {"gpus": 2, "examples_per_s": 190.0},
    ]
    found = summary(rows, [32], 64)
    two = {
        (row["scaling"], row["placement"]): (row["efficiency"], row["efficiency_over_unsharded"])
        for row in found["training"]
        if row["gpus"] == 2
    }
    assert two == {
        ("weak", "sharded"): (0.8, 0.64),
        ("weak", "unsharded"): (0.8, 0.8),
        ("strong", "sharded"): (0.8, 0.64),
        ("strong", "unsharded"): (0.8, 0.8),
    }
    assert found["memory"] == [{"gpus": 2, "rows": 32, "placement": "sharded", "over_unsharded": 0.5}]
    assert [row["speedup"] for row in found["evaluation"]] == [1.0, 1.9]


def test_without_one_gpu_there_is_nothing_to_compare_with():
    found = summary([measured(2, "sharded", 32, 1.0), {"gpus": 2, "examples_per_s": 1.0}], [32], 64)
    assert {row["efficiency"] for row in found["training"]} == {None}
    assert found["memory"] == []
    assert found["evaluation"] == [{"gpus": 2, "speedup": None}]


def test_predictions_stand_beside_measurements():
    prediction = {"peak_memory_bytes": 9.0, "step_s": 2.0, "step_at_best_s": 0.5}
    found = beside(measured(2, "sharded", 32, 1.0, peak=10.0), prediction)
    assert found["predicted_over_measured"] == {"peak_memory": 0.9, "step": 2.0, "step_at_best": 0.5}
    assert beside(measured(2, "sharded", 32, 1.0), prediction)["predicted_over_measured"]["peak_memory"] is None


def test_a_prediction_that_fails_takes_no_measurement_with_it():
    good, bad = Future(), Future()
    good.set_result({"peak_memory_bytes": 9.0, "step_s": 2.0, "step_at_best_s": 0.5})
    bad.set_exception(ValueError("no such shape"))
    rows = [measured(2, "sharded", size, 1.0, peak=10.0) for size in (32, 2)] + [{"gpus": 2, "examples_per_s": 1.0}]
    failures = foretell(rows, {(2, "sharded", 32): good, (2, "sharded", 2): bad})
    assert failures == {"prediction (2, 'sharded', 2)": "ValueError('no such shape')"}
    assert ["predicted" in row for row in rows] == [True, False, False]


def test_the_words_of_the_ranks_are_shown_not_those_of_torchrun():
    log = "start\n\nValueError: it broke\nE1128 torch/distributed/elastic/api.py failed\nTraceback of torchrun\n"
    assert last_words(log) == "start\nValueError: it broke"
