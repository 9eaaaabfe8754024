"""The benchmark of scaling runs from its command to its record, here with two processes on a CPU."""

import json

import pytest

from evaluation.benchmarks import scaling
from evaluation.benchmarks.scaling_rank import Case, Orders
from tests.unit.evaluation.test_scaling import orders

SMALL = ["--prompt-tokens=12", "--target-tokens=4", "--steps=2", "--examples=64"]


def test_two_ranks_train_save_load_and_evaluate(tmp_path, capsys):
    out = tmp_path / "record.json"
    given = ["--encoder=tiny", "--slm=tiny", "--worlds", "1", "2", "--weak", "2", "--strong", "4", f"--out={out}"]
    with pytest.raises(SystemExit) as stopped:
        scaling.main([*given, *SMALL])
    record = json.loads(out.read_text())
    assert (stopped.value.code, record["failures"]) == (0, {})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    trained = [row for row in record["rows"] if "placement" in row]
    assert [(row["gpus"], row["rows"]) for row in trained] == [(1, 2), (1, 4)] * 3 + [(2, 2)] * 3
    assert all(row["step_s"] > 0 and row["predicted"]["peak_memory_bytes"] > 0 for row in trained)
    assert all(row["compiled"] == {"warm_up": 0, "on_the_clock": 0} for row in trained)
    saved = [row["checkpoint"] for row in trained if "checkpoint" in row]
    assert len(saved) == 2
    assert all(one["save_s"] > 0 and one["load_s"] > 0 and one["bytes"] > 100_000 for one in saved)
    evaluated = [row for row in record["rows"] if "examples_per_s" in row]
    assert [(row["gpus"], row["examples"]) for row in evaluated] == [(1, 64), (2, 64)]
    joined = [row for row in record["rows"] if "all_reduce_bytes_per_s" in row]
    assert [(row["gpus"], row["all_reduce_bytes_per_s"] > 0) for row in joined] == [(2, True)]
    assert record["provenance"]["versions"]["torch"]


def test_blocks_are_compiled_once_for_a_shape_before_the_clock_starts():
    values = vars(orders()) | {"cases": [Case("sharded", 2), Case("unsharded", 4)], "compile": True}
    rows, failure = scaling.run_world(Orders(**values), 240)
    assert failure is None
    once = {"warm_up": 6, "on_the_clock": 0}  # block and norm of the encoder and of the slm, the projector, the loss
    assert [row["compiled"] for row in rows if "placement" in row] == [once, once]


def test_a_world_that_fails_says_why_and_keeps_what_it_has(tmp_path):
    values = vars(orders()) | {"cases": [Case("sharded", 2), Case("sharded", 0)]}
    rows, failure = scaling.run_world(Orders(**values), 240)
    assert [row["rows"] for row in rows] == [2]
    assert failure.startswith("torchrun ended with status 1")
    assert "Error" in failure.splitlines()[-1]


def test_a_world_that_takes_too_long_is_stopped():
    rows, failure = scaling.run_world(orders(cases=[Case("sharded", 2)]), 1)
    assert rows == []
    assert failure.startswith("stopped after 1 s (--limit)")
