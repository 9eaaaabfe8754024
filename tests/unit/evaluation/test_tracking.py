"""A comparison in MLflow: parent, children, what they hold, and that nothing is logged twice."""

import json
import math
from pathlib import Path

import pytest
from mlflow import MlflowClient

from evaluation.compare import Settings, compare
from evaluation.leaderboard import build
from evaluation.record import read_record
from evaluation.systems import Arm
from evaluation.tracking import fetch_records, log_comparison, metrics, tracking_uri
from llmslm.errors import UserError

FAST = {"max_new_tokens": 16, "batch_size": 8, "warmups": 0, "runs": 1, "resamples": 20}


@pytest.fixture
def records(dummy, examples, tmp_path):
    compare([Arm(dummy("llm", 0.95)), Arm(dummy("slm", 0.4))], examples, Settings(out=tmp_path / "out", **FAST))
    return tmp_path / "out"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # artifacts of a SQLite store go to the working directory
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield MlflowClient(tracking_uri())  # in full: other tests' loggers set MLflow's global one


def test_a_child_for_each_record_under_one_parent(client, records, tmp_path):
    board = build([records], tmp_path / "board")
    logged = log_comparison(board)
    llm = next(
        run
        for run in map(client.get_run, logged.child_run_ids)
        if run.data.params["system"] == "llm" and run.data.tags["mlflow.parentRunId"] == logged.parent_run_id
    )
    record = read_record(records / "copying.llm.record.json")
    assert llm.data.metrics["test/bleu"] == record["scores"]["bleu"]["value"]
    assert llm.data.metrics["test/ttft_s"] == record["ttft_s"]
    assert llm.data.tags["data.fingerprint"] == record["task"]["data"]
    assert llm.data.tags["git.commit"] == (record["provenance"]["commit"] or "unknown")
    assert llm.info.status == "FINISHED"
    table = json.loads(Path(client.download_artifacts(llm.info.run_id, "predictions.json")).read_text())
    assert len(table["data"]) == record["examples"]["effective"]
    assert len(client.list_artifacts(llm.info.run_id, "plots")) == 2
    names = {each.path for each in client.list_artifacts(logged.parent_run_id, "leaderboard")}
    assert {"leaderboard/leaderboard.html", "leaderboard/leaderboard.md"} <= names
    assert log_comparison(board) == logged


def test_under_a_given_parent(client, records, tmp_path):
    parent = client.create_run(client.create_experiment("trainings")).info.run_id
    logged = log_comparison(build([records], tmp_path / "board"), parent)
    assert logged.parent_run_id == parent
    assert log_comparison(build([records], tmp_path / "board"), parent) == logged
    with pytest.raises(UserError, match=r"MLflow at sqlite:.*not found.*--mlflow-parent"):
        log_comparison(build([records], tmp_path / "board"), "0" * 32)


def test_a_record_of_a_newer_schema_is_refused(client, records, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.tracking.EXPERIMENT", "newer")
    run = log_comparison(build([records], tmp_path / "board")).child_run_ids[0]
    record = read_record(records / "copying.llm.record.json")
    assert len(fetch_records("newer", tmp_path / "back")) == 2
    client.log_dict(run, record | {"predictions": "../../outside.jsonl"}, "record.json")
    fetch_records("newer", tmp_path / "a" / "b")
    assert not (tmp_path / "outside.jsonl").exists()
    client.log_dict(run, record | {"schema_version": 99}, "record.json")
    with pytest.raises(UserError, match=f"run {run} of MLflow at sqlite:.* has record schema 99"):
        fetch_records("newer", tmp_path / "back")


def test_a_server_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9: .*MLFLOW_TRACKING_URI"):
        fetch_records("llmslm", tmp_path)


def test_metrics_hold_numbers_only(records):
    record = read_record(records / "copying.slm.record.json")
    record["scores"]["bleu"]["value"] = None
    record["task"]["split"] = "validation"
    values = metrics(record)
    assert "val/bleu" not in values
    assert values["val/chrf_p_value"] == record["scores"]["chrf"]["versus_llm"]["p_value"]
    assert all(math.isfinite(value) for value in values.values())
