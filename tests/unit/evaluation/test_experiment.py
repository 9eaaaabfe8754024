"""From nothing to a leaderboard in one command, with options for the trainings; what is done is not done again."""

from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from evaluation import experiment
from evaluation.cli import main
from evaluation.compare import Settings
from evaluation.record import find_records, read_record
from tests.unit import toy


def test_trains_compares_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr("evaluation.compare.Settings", lambda **given: Settings(**given, warmups=0, runs=1))
    recipe = Path(toy.write_recipe(tmp_path, max_steps=1, val_check_interval=1))
    values = yaml.safe_load(recipe.read_text())
    del values["trainer"]["logger"]  # the command's own logs to MLflow
    recipe.write_text(yaml.safe_dump(values))
    command = ["experiment", "--config", str(recipe), "--limit", "5", "--seed_everything=7"]
    main(command)
    said = capsys.readouterr().out
    records = {record["system"]: record for record in map(read_record, find_records(["runs/toy/records"]))}
    assert set(records) == {"llm", "slm", "llm_to_slm", "llm_to_slm/zero_features", "llm_to_slm/shuffled_features"}
    assert {record["training"]["seed"] for record in records.values()} == {7}
    assert {record["examples"]["effective"] for record in records.values()} == {5}
    assert "| llm_to_slm |" in said
    assert "page: runs/toy/leaderboard/leaderboard.html" in said
    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("llmslm").experiment_id])
    (parent,) = (run for run in runs if run.info.run_name == "toy")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 3 + len(records)
    assert {model.name for model in client.search_registered_models()} == {f"toy-{name}" for name in experiment.SYSTEMS}
    main(command)
    assert capsys.readouterr().out.count("trained already") == 3


def test_a_recipe_without_mlflow_and_mistakes_in_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(experiment, "evaluate", lambda *_: None)
    recipe = toy.write_recipe(tmp_path, max_steps=1, val_check_interval=1)  # its trainer.logger is false
    main(["experiment", "--config", recipe])
    assert Path("runs/toy/llm_to_slm/system/system.json").is_file()
    for option in (["--limt", "3"], ["--model.sytem=slm"]):
        with pytest.raises(SystemExit, match="2"):
            main(["experiment", "--config", recipe, *option])
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"llmslm-eval: unrecognized arguments: {option[0].partition('=')[0]}")
