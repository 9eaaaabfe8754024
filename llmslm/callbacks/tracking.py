"""MLflow tracking: the logger with a usable default store, and the callback that records what a run was."""

import os
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import MLFlowLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from llmslm import provenance
from llmslm.callbacks.outbox import Metric, Outbox
from llmslm.callbacks.save_system import data_fingerprint
from llmslm.mlflow_store import EXPERIMENT, PARENT_TAG, in_words, one_at_a_time, tracking_uri

UNSENT = Path("mlflow_unsent")
"""Folder in the working directory: metrics that wait for their server, one file a run."""
FLUSH_S = 30.0


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
        experiment_name: str = EXPERIMENT,
        run_name: str | None = None,
        parent_run: str | None = None,
        run_id: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        tags = dict(tags or {}) | ({PARENT_TAG: parent_run} if parent_run else {})
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; MLflow's own limits let a run hang for
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # many minutes
        uri = tracking_uri()
        with one_at_a_time(uri):
            super().__init__(experiment_name, run_name, tracking_uri=uri, tags=tags, run_id=run_id)
        self._outbox: Outbox | None = None
        self._gone = self._writing = False
        self._records: list[Callable[[], None]] = []

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client; a server that is gone when a run begins, or begins again, does not keep it from training."""
        from mlflow.exceptions import MlflowException

        if not self._gone:
            try:
                self._open()
            except MlflowException as error:
                if not self._is_no_answer(error):
                    raise
                self._gone = True
                reason = " ".join(str(error).split())[:200]
                warnings.warn(f"the MLflow server {self._tracking_uri} does not answer: {reason}", stacklevel=2)
        return self._mlflow_client

    def record(self, write: Callable[[], None]) -> None:
        """Write something of the run; where the server is gone, when it is back."""
        from mlflow.exceptions import MlflowException

        self._records.append(write)
        if self.experiment is not None and self._initialized:
            try:
                self._write_records()
            except MlflowException as error:
                if not self._is_no_answer(error):
                    raise
                warnings.warn(f"the MLflow run {self.run_id} lacks its parameters for now: {error}", stacklevel=2)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Write parameters, where the server is gone when it is back."""
        write = partial(super().log_hyperparams, params)
        write() if self._writing else self.record(write)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Queue metrics; a thread sends them, so training never waits for the server."""
        if self._outbox is None:
            name = self.run_id or f"without-run-id-{uuid.uuid4().hex[:8]}"
            self._outbox = Outbox(self._send, UNSENT / f"{name}.jsonl")
        now = int(time.time() * 1000)
        self._outbox.put([(name, float(value), now, step or 0) for name, value in metrics.items()])

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Send what is left, and the state of the run; a server that is gone does not stop the end of a run."""
        if self._outbox is None and not self._initialized:
            return
        if self._outbox is not None and not self._outbox.flush(FLUSH_S):
            warnings.warn(
                f"the MLflow server {self._tracking_uri} is gone: the metrics that it lacks are in "
                f"{self._outbox.file}"
                + ("; they are sent when the run is resumed with this run_id" if self._run_id else ""),
                stacklevel=2,
            )
            return
        try:
            super().finalize(status)
        except Exception as error:  # whatever the client raises, the training is done
            warnings.warn(f"the state of the MLflow run {self.run_id} could not be set: {error}", stacklevel=2)

    def _send(self, metrics: Sequence[Metric]) -> None:
        from mlflow.entities import Metric as Entity  # mlflow takes 2 s to import

        self._open()  # makes the run, where the server was gone before
        self._write_late_records()
        entities = [Entity(*metric) for metric in metrics]
        self._mlflow_client.log_batch(str(self._run_id), metrics=entities)

    def _write_late_records(self) -> None:
        """Write what waits; where the server refuses one, leave it out, or metrics would wait behind it for ever."""
        from mlflow.exceptions import MlflowException

        try:
            self._write_records()
        except MlflowException as error:
            if error.get_http_status_code() >= 500:  # it does not answer, or cannot for now
                raise
            self._records.pop(0)
            warnings.warn(f"the MLflow run {self._run_id} lacks what its server refuses: {error}", stacklevel=2)
            self._write_late_records()

    def _is_no_answer(self, error: Exception) -> bool:
        """Whether a server is gone: one that is there and refuses says so, and a file is never gone."""
        from mlflow.exceptions import RestException

        return self._tracking_uri.startswith("http") and not isinstance(error, RestException)

    def _open(self) -> None:
        with in_words(self._tracking_uri):
            MLFlowLogger.experiment.fget(self)  # type: ignore[attr-defined]

    def _write_records(self) -> None:
        self._gone, self._writing = False, True
        try:
            with in_words(self._tracking_uri):
                while self._records:
                    self._records[0]()
                    self._records.pop(0)
        finally:
            self._writing = False


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
        if logger is None:
            return
        fingerprint = data_fingerprint(trainer)
        write = partial(self._record, logger, stage, fingerprint, path)
        logger.record(write) if isinstance(logger, MlflowLogger) else write()

    def _record(self, logger: MLFlowLogger, stage: str, fingerprint: str, path: Path) -> None:
        client, run_id = logger.experiment, logger.run_id
        if run_id is None:
            return
        if stage == "fit":
            logger.log_hyperparams(_flat(self.config.as_dict()))
        head, dirty = provenance.commit()
        client.set_tag(run_id, "git.commit", head or "unknown")
        client.set_tag(run_id, "git.dirty", str(dirty).lower())
        client.set_tag(run_id, "data.fingerprint", fingerprint)
        client.log_artifact(run_id, str(path))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Keep what a reader filters runs by: model and data keys, not the Trainer's hundred defaults."""
    return {key: values[key] for key in ("model", "data", "seed_everything") if key in values}
