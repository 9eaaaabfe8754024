"""One recipe, from nothing to a leaderboard: train llm, slm and llm_to_slm, compare them, say where everything is."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from llmslm import provenance
from llmslm.checkpoint import SYSTEM_FOLDER, written_aside_file
from llmslm.recipe import find_recipe, load_source

SYSTEMS = ("llm", "slm", "llm_to_slm")
STAMP = "trained.json"


def run(config: str, out: str = "runs", *, limit: int | None = None, overrides: tuple[str, ...] = ()) -> None:
    """Train what is not trained yet, compare the three systems on the test split and build the leaderboard.

    A system is trained again only if its recipe, its data, the overrides or the llm beneath it have changed.

    Args:
        config: recipe, by name or path.
        out: folder of runs; results go to `<out>/<recipe>/`.
        limit: number of test examples; None takes all.
        overrides: further arguments for `llmslm fit`, for example ("--trainer.max_steps", "10").

    Raises:
        UserError: for mistakes in the recipe or its data.
    """
    path = find_recipe(config)
    folder = Path(out) / path.stem
    source = load_source(config)
    source.prepare()
    parent = parent_run(folder, path.stem)
    stamp = _hash(path.read_text(encoding="utf-8"), source.fingerprint(), repr(overrides))
    for system in SYSTEMS:
        train(path, folder / system, system, stamp, parent, overrides)
        if system == "llm":
            stamp_of_llm = (folder / "llm" / STAMP).read_text(encoding="utf-8")
        if system == "slm":
            stamp = _hash(stamp, stamp_of_llm)
    _evaluate(path, folder, parent, limit)


def train(path: Path, folder: Path, system: str, stamp: str, parent: str, overrides: tuple[str, ...]) -> None:
    """Fit one system unless its folder already holds the result of the same work."""
    done = folder / STAMP
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["stamp"] == stamp:
        sys.stdout.write(f"{system}: trained already ({folder / SYSTEM_FOLDER})\n")
        return
    from llmslm import training

    sys.stdout.write(f"{system}: training\n")
    arguments = [
        "fit",
        "--config",
        str(path),
        "--model.system",
        system,
        "--trainer.default_root_dir",
        str(folder),
    ]
    training.run([*arguments, "--trainer.logger.init_args.parent_run", parent, *overrides])
    written_aside_file(done, json.dumps({"stamp": stamp, "commit": provenance.commit()[0]}))


def parent_run(folder: Path, name: str) -> str:
    """Return the MLflow run that all runs of this comparison belong under; it is made once per folder and store."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from llmslm.callbacks.tracking import tracking_uri

    client = MlflowClient(tracking_uri())
    remembered = folder / "mlflow_parent.txt"
    if remembered.is_file():
        try:
            return str(client.get_run(remembered.read_text(encoding="utf-8").strip()).info.run_id)
        except MlflowException:
            pass  # another store, or a deleted run: start a new parent
    experiment = client.get_experiment_by_name("llmslm")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("llmslm")
    run_id = str(client.create_run(experiment_id, run_name=name).info.run_id)
    written_aside_file(remembered, run_id)
    return run_id


def _evaluate(path: Path, folder: Path, parent: str, limit: int | None) -> None:
    raise NotImplementedError


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _unused() -> Any:
    return None
