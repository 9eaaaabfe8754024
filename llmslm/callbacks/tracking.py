"""MLflow tracking: the logger with a usable default store, and the callback that records what a run was."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import MLFlowLogger

from llmslm import provenance
from llmslm.callbacks.save_system import data_fingerprint

DEFAULT_STORE = "sqlite:///mlflow.db"
PARENT_TAG = "mlflow.parentRunId"


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI, or a SQLite file in the working directory (MLflow 3 refuses plain folders)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE


class MlflowLogger(MLFlowLogger):
    """Lightning's MLflow logger whose store is chosen when the run starts, not when the library is imported.

    Args:
        experiment_name: MLflow experiment.
        run_name: name of the run; the command line sets recipe/system.
        parent_run: id of the run that this one belongs under, for the systems of one comparison.
        run_id: an existing run to go on with, for a resumed training.
        tags: further tags.
    """

    def __init__(
        self,
        experiment_name: str = "llmslm",
        run_name: str | None = None,
        parent_run: str | None = None,
        run_id: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        tags = dict(tags or {}) | ({PARENT_TAG: parent_run} if parent_run else {})
        super().__init__(experiment_name, run_name, tracking_uri=tracking_uri(), tags=tags, run_id=run_id)


class RecordRun(SaveConfigCallback):
    """Writes the resolved recipe into the run folder and, with its parameters, commit and data hash, into MLflow."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called on rank 0 when a stage begins."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)
        logger = next((one for one in trainer.loggers if isinstance(one, MLFlowLogger)), None)
        if logger is None or logger.run_id is None:
            return
        client, run_id = logger.experiment, logger.run_id
        if stage == "fit":
            logger.log_hyperparams(_flat(self.config.as_dict()))
        head, dirty = provenance.commit()
        client.set_tag(run_id, "git.commit", head or "unknown")
        client.set_tag(run_id, "git.dirty", str(dirty).lower())
        client.set_tag(run_id, "data.fingerprint", data_fingerprint(trainer))
        client.log_artifact(run_id, str(path))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Keep what a reader filters runs by: model and data keys, not the Trainer's hundred defaults."""
    return {key: values[key] for key in ("model", "data", "seed_everything") if key in values}
