"""One recipe, from nothing to a leaderboard: train llm, slm and llm_to_slm, compare them, say where everything is."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llmslm.mlflow_store import EXPERIMENT, one_at_a_time, tracking_uri
from llmslm.models.source import SYSTEM_FOLDER
from llmslm.recipe import find_recipe, load_source, read_recipe
from llmslm.writing import write_text

SYSTEMS = ("llm", "slm", "llm_to_slm")
TRAINED = "trained.json"


def run(config: str, out: str = "runs", limit: int | None = None, overrides: Sequence[str] = ()) -> None:
    """Train what is not trained yet, compare the three systems on the test split and build the leaderboard.

    A system is trained again only where its recipe, its data, the overrides or the llm beneath it changed.

    Args:
        config: recipe, by name or path.
        out: folder of runs; everything goes to `<out>/<recipe>/`.
        limit: test examples; None takes all.
        overrides: further arguments for `llmslm fit`, for example ("--trainer.max_steps=10",).

    Raises:
        UserError: for mistakes in the recipe or its data.
    """
    path = find_recipe(config)
    folder = Path(out) / path.stem
    source = load_source(str(path))
    source.prepare()
    parent = parent_run(folder, path.stem)
    stamp = _hash(path.read_text(encoding="utf-8"), source.fingerprint(), *overrides)
    for system in SYSTEMS:
        if system == "llm_to_slm":
            stamp = _hash(stamp, (folder / "llm" / TRAINED).read_text(encoding="utf-8"))
        train(path, folder / system, system, stamp, parent, overrides)
    evaluate(path, folder, parent, limit)


def train(path: Path, folder: Path, system: str, stamp: str, parent: str, overrides: Sequence[str]) -> None:
    """Fit one system unless its folder already holds the result of the same work."""
    done = folder / TRAINED
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["stamp"] == stamp:
        sys.stdout.write(f"{system}: trained already ({folder / SYSTEM_FOLDER})\n")
        return
    from llmslm import training

    sys.stdout.write(f"{system}: training, into {folder}\n")
    sys.stdout.flush()
    done.unlink(missing_ok=True)
    arguments = ["fit", "--config", str(path), "--model.system", system, "--trainer.default_root_dir", str(folder)]
    training.run([*arguments, *_under(parent, path), *overrides])
    write_text(done, json.dumps({"stamp": stamp}) + "\n")


def _under(parent: str, path: Path) -> list[str]:
    """Put a training under the comparison's MLflow run, unless the recipe logs elsewhere or not at all."""
    trainer = read_recipe([str(path)], ()).get("trainer", {})
    if "logger" in trainer and "MlflowLogger" not in str(trainer["logger"]):
        return []
    return ["--trainer.logger.init_args.parent_run", parent]


def evaluate(path: Path, folder: Path, parent: str, limit: int | None) -> None:
    """Compare the trained systems, print the leaderboard and where its parts are."""
    from evaluation.compare import Settings, compare_folders
    from evaluation.leaderboard import build
    from evaluation.tracking import log_comparison

    settings = Settings(out=folder / "records", controls=True)
    records = compare_folders({s: str(folder / s) for s in SYSTEMS}, str(path), settings, limit=limit)
    built = build([str(record) for record in records], folder / "leaderboard")
    logged = log_comparison(built, parent)
    lines = [f"{name}: {file}" for name, file in built.files.items()]
    lines.append(f"mlflow: run {logged.parent_run_id} in {logged.tracking_uri}")
    sys.stdout.write("\n".join(["", built.markdown, "", *lines, ""]))


def parent_run(folder: Path, name: str) -> str:
    """Return the MLflow run that all runs of this comparison belong under; it is made once per folder and store."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with one_at_a_time(uri := tracking_uri()):
        client = MlflowClient(uri)
    remembered = folder / "mlflow_parent.txt"
    if remembered.is_file():
        try:
            return str(client.get_run(remembered.read_text(encoding="utf-8").strip()).info.run_id)
        except MlflowException:
            sys.stdout.write("the MLflow run of this comparison is not in this store: starting another\n")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    run_id = str(client.create_run(experiment_id, run_name=name).info.run_id)
    write_text(remembered, run_id + "\n")
    return run_id


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
