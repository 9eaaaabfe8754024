"""Evaluations in MLflow: a parent run a comparison with the leaderboard, and a child run a record."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.predictions import read_predictions
from evaluation.record import SUFFIX, Record, parse_record, write_record
from evaluation.registry import register_system
from llmslm.errors import UserError
from llmslm.mlflow_store import EXPERIMENT, PARENT_TAG, one_at_a_time, tracking_uri
from llmslm.provenance import hardware_name
from llmslm.writing import write_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from evaluation.leaderboard import Leaderboard

RECORD, PREDICTIONS = "record.json", "predictions.json"
RECORD_TAG = "llmslm.record"
LEADERBOARD_TAG = "llmslm.leaderboard"
_SPLITS = {"validation": "val"}  # metric keys are those of training: val/bleu


@dataclass(frozen=True)
class Logged:
    """Where a comparison lies."""

    tracking_uri: str
    parent_run_id: str
    child_run_ids: list[str]


def fetch_records(experiment: str, folder: Path) -> list[Path]:
    """Write the evaluations that an experiment holds as record files with their predictions.

    Args:
        experiment: name of an MLflow experiment.
        folder: where to write; one sub-folder a run.

    Raises:
        UserError: if the store does not answer, or the experiment holds no evaluation.
    """
    with _answering() as client:
        found = client.get_experiment_by_name(experiment)
        runs = [] if found is None else _all_runs(client, found.experiment_id)
        paths = [_fetch(client, run, folder / run) for run in runs]
    if not paths:
        raise UserError(f"MLflow at {tracking_uri()} has no evaluation in experiment {experiment!r} (--from-mlflow)")
    return paths


@contextmanager
def _answering() -> "Iterator[MlflowClient]":
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # MLflow's 7 are four minutes of silence
    try:
        with one_at_a_time(uri := tracking_uri()):
            client = MlflowClient(uri)
        yield client
    except MlflowException as error:
        reason = str(error).splitlines()[0][:200]
        keys = "MLFLOW_TRACKING_URI, --mlflow-parent, --no-mlflow"
        raise UserError(f"MLflow at {tracking_uri()}: {reason} ({keys})") from error


def _all_runs(client: "MlflowClient", experiment_id: str) -> list[str]:
    condition, ids, token = f"tags.`{RECORD_TAG}` LIKE '%'", [], None
    while True:
        page = client.search_runs([experiment_id], condition, max_results=1000, page_token=token)
        ids += [str(run.info.run_id) for run in page]
        token = page.token
        if not token:
            return ids


def _fetch(client: "MlflowClient", run_id: str, folder: Path) -> Path:
    with tempfile.TemporaryDirectory() as downloads:
        text = Path(client.download_artifacts(run_id, RECORD, downloads)).read_text(encoding="utf-8")
        record = parse_record(text, f"run {run_id} of MLflow at {tracking_uri()}")
        record["predictions"] = Path(record["predictions"]).name  # whatever it says: nothing outside of the folder
        if any(artifact.path == PREDICTIONS for artifact in client.list_artifacts(run_id)):
            text = Path(client.download_artifacts(run_id, PREDICTIONS, downloads)).read_text(encoding="utf-8")
            table = json.loads(text)
            rows = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_text(folder / record["predictions"], "".join(lines))
    path = folder / f"evaluation{SUFFIX}"
    write_record(path, record)
    return path


def log_comparison(board: "Leaderboard", parent_run_id: str | None = None, *, models: bool = True) -> Logged:
    """Log records and leaderboard, and register the systems; what is there already is not logged again.

    Args:
        board: as built.
        parent_run_id: the run to log under, for example that of the trainings; None makes (or finds) one.
        models: whether to upload the systems themselves, whose weights may be large.

    Raises:
        UserError: if the store does not answer, or holds no such parent run.
    """
    with _answering() as client:
        parent = _parent(client, board, parent_run_id)
        plots = {
            _key(record): board.plots.get((row.task, row.hardware), []) for row in board.rows for record in row.records
        }
        children = [_child(client, record, parent, plots.get(_key(record), [])) for record in board.records]
        if models:
            for record, child in zip(board.records, children, strict=True):
                register_system(client, record, child)
        for path in board.files.values():
            client.log_artifact(parent, str(path), "leaderboard")
    return Logged(tracking_uri(), parent, children)


def _parent(client: "MlflowClient", board: "Leaderboard", run_id: str | None) -> str:
    if run_id is not None:
        return str(client.get_run(run_id).info.run_id)
    key = hashlib.sha256("".join(sorted(map(_key, board.records))).encode()).hexdigest()
    found = _find(client, _experiment(client), f"tags.`{LEADERBOARD_TAG}` = '{key}'")
    if found is not None:
        return found
    tasks = sorted({record["task"]["name"] for record in board.records})
    run = client.create_run(
        _experiment(client), run_name=f"leaderboard {', '.join(tasks)}", tags={LEADERBOARD_TAG: key}
    )
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def _child(client: "MlflowClient", record: Record, parent: str, plots: Sequence[Path]) -> str:
    from mlflow.entities import Metric, Param

    key = _key(record)
    experiment = client.get_run(parent).info.experiment_id
    found = _find(client, experiment, f"tags.`{RECORD_TAG}` = '{key}' and tags.`{PARENT_TAG}` = '{parent}'")
    if found is not None:
        return found
    name = f"evaluate {record['task']['name']}/{record['system']}"
    run_id = str(client.create_run(experiment, run_name=name, tags=_tags(record) | {PARENT_TAG: parent}).info.run_id)
    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric(metric, value, now, 0) for metric, value in metrics(record).items()],
        params=[Param(parameter, str(value)) for parameter, value in _parameters(record).items()],
    )
    client.log_dict(run_id, record | {"predictions": Path(record["predictions"]).name}, RECORD)
    _log_predictions(client, run_id, Path(record["predictions"]))
    for plot in plots:
        client.log_artifact(run_id, str(plot), "plots")
    client.set_tag(run_id, RECORD_TAG, key)  # last: only a complete run counts as logged
    client.set_terminated(run_id)
    return run_id


def metrics(record: Record) -> dict[str, float]:
    """Return a record's numbers by metric key, such as test/bleu, test/bleu_low or test/ttft_s; no nulls."""
    split = _SPLITS.get(record["task"]["split"], record["task"]["split"])
    values: dict[str, Any] = {key: record[key] for key in ("ttft_s", "tpot_s", "tokens_per_s", "peak_memory_bytes")}
    values["length_ratio"] = record["length"]["ratio"]
    for name, score in record["scores"].items():
        values |= {name: score["value"], f"{name}_low": score["low"], f"{name}_high": score["high"]}
        values |= {f"{name}_{key}": value for key, value in score.get("versus_llm", {}).items()}
        values |= {f"{name}_slm_{key}": value for key, value in score.get("versus_slm", {}).items()}
    values |= record.get("cost", {})
    for entry in record["speed"]:
        prefix = f"{entry['mode']}_batch_{entry['batch_size']}"
        values |= {
            f"{prefix}_total_s": entry["total_s"]["p50"],
            f"{prefix}_tokens_per_s": entry["tokens_per_s"],
        }
    return {f"{split}/{name}": float(value) for name, value in values.items() if value is not None}


def _tags(record: Record) -> dict[str, str]:
    provenance = record["provenance"]
    return {
        "git.commit": provenance["commit"] or "unknown",
        "git.dirty": str(provenance["dirty"]).lower(),
        "data.fingerprint": record["task"]["data"],
        "system": record["system"],
        "comparison": record["comparison"],
    }


def _parameters(record: Record) -> dict[str, Any]:
    return {
        "system": record["system"],
        "task": record["task"]["name"],
        "task_version": record["task"]["version"],
        "split": record["task"]["split"],
        "examples": record["examples"]["effective"],
        "hardware": hardware_name(record["provenance"]["hardware"]),
        **{f"parameters_{name}": count for name, count in record["parameters"].items()},
        **record["settings"],
        **{f"training_{name}": record["training"].get(name) for name in ("recipe", "seed", "commit")},
    }


def _log_predictions(client: "MlflowClient", run_id: str, path: Path) -> None:
    if not path.is_file():
        return
    import pandas  # type: ignore[import-untyped]

    # log_table itself warns of string columns under pandas 3: objects it is
    client.log_table(run_id, pandas.DataFrame(read_predictions(path), dtype=object), PREDICTIONS)


def _key(record: Record) -> str:
    """Hash a record wherever it lies."""
    text = json.dumps(record | {"predictions": Path(record["predictions"]).name}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _find(client: "MlflowClient", experiment: str, condition: str) -> str | None:
    runs = client.search_runs([experiment], condition, max_results=1)
    return str(runs[0].info.run_id) if runs else None


def _experiment(client: "MlflowClient") -> str:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return str(experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT))
