"""Every task runs on a local stand-in for its data: the same code, the same columns, nothing from a hub."""

import json

import datasets
import pytest
import yaml

from evaluation.compare import Settings, compare
from evaluation.examples import load_task_examples
from evaluation.record import read_record
from evaluation.scoring import check_metrics
from evaluation.systems import Arm
from evaluation.tasks import FOLDER, load_task, task_names
from llmslm.errors import UserError

ROWS = 50


def stand_in(name, folder):
    """Point a hub task at a folder in the hub's format, with its own columns and splits."""
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    arguments = values["source"]["init_args"]
    rows = []
    for index in range(ROWS):
        row = {}
        for key in ("prompt_column", "extra_prompt_column", "target_column"):
            parts = arguments.get(key, "").split(".")
            if len(parts) == 2:
                row.setdefault(parts[0], {})[parts[1]] = f"{key} number {index}"
            elif parts[0]:
                row[parts[0]] = f"{key} number {index}"
        rows.append(row)
    for split in ("train",) if "train[" in arguments.get("test", "") else ("train", "test"):
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    arguments["path"] = str(folder)
    arguments.pop("config_name", None)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def is_hub(name):
    return "HubDataset" in (FOLDER / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", task_names())
def test_is_sound(name):
    _, task = load_task(name)
    check_metrics(task.metrics)
    assert task.version >= 1
    assert f" {name}" in f" {table_names()}"


def table_names():
    text = (FOLDER / "README.md").read_text()
    return text + "".join(f" debian_translation_en_{code}" for code in ("it", "da", "de", "fr") if f"_{code}" in text)


@pytest.mark.parametrize("name", [name for name in task_names() if is_hub(name)])
def test_runs_on_a_local_stand_in(name, dummy, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    label, task = load_task(stand_in(name, tmp_path))
    examples = load_task_examples(label, task, 5, seed=1)
    assert len(examples) == min(5, examples.original)
    assert "number" in examples.prompts[0]
    assert "target_column number" in examples.references[0]
    settings = Settings(out=tmp_path / "out", metrics=task.metrics, runs=0, resamples=10)
    record = read_record(compare([Arm(dummy())], examples, settings)[0])
    assert record["task"]["name"] == name
    assert {"rouge": "rouge_l"}.get(task.metrics[0], task.metrics[0]) in record["scores"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no task 'cooking'; expected a YAML file or one of alpaca"):
        load_task("cooking")
    path = tmp_path / "mine.yaml"
    path.write_text("version: 1\nsource: {class_path: llmslm.data.sources.Docstrings}\nspice: hot\n")
    with pytest.raises(UserError, match=r"is no valid task.*spice"):
        load_task(str(path))
    path.write_text("version: [\n")
    with pytest.raises(UserError, match="is no valid task"):
        load_task(str(path))


def test_the_version_goes_into_the_record(dummy, tmp_path):
    rows = [{"prompt": f"words {index}", "target": "words"} for index in range(3)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"class_path": "llmslm.data.sources.TextFiles"}
    arguments = {"test": str(tmp_path / "x.jsonl"), "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"version": 7, "source": source | {"init_args": arguments}, "metrics": ["smoothed_bleu"]})
    )
    examples = load_task_examples(*load_task(str(tmp_path / "mine.yaml")), None, 1)
    settings = Settings(out=tmp_path / "out", metrics=("smoothed_bleu",), runs=0, resamples=10)
    record = read_record(compare([Arm(dummy())], examples, settings)[0])
    assert (record["task"]["version"], record["task"]["name"]) == (7, "mine")
    assert record["scores"]["smoothed_bleu"]["value"] < 100
