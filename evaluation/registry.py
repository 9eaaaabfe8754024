"""Evaluated systems in MLflow's model registry, each under the name of its recipe and system."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.record import Record
from llmslm.provenance import folder_hash

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHECKPOINT_TAG = "llmslm.checkpoint"


def register_system(client: "MlflowClient", record: Record, run_id: str) -> str | None:
    """Log the system of a record as a model of its run, and register it; what is registered already is left alone.

    Args:
        client: of the store.
        record: as read.
        run_id: the run of the record.

    Returns:
        The name it is registered under; None where the system folder that was evaluated is not here any more, and for
        systems that have none.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    from llmslm.checkpoint import CARD

    checkpoint, folder = record["hashes"]["checkpoint"], Path(record.get("folder") or "")
    if not (folder / CARD).is_file() or folder_hash(folder) != checkpoint:
        return None
    name = f"{record['training'].get('recipe') or record['task']['name']}-{record['system']}"
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    if any(each.tags.get(CHECKPOINT_TAG) == checkpoint for each in client.search_model_versions(f"name='{name}'")):
        return name
    model_id = _log_model(client, record, run_id, folder)
    client.create_model_version(
        name, f"models:/{model_id}", run_id=run_id, tags={CHECKPOINT_TAG: checkpoint}, model_id=model_id
    )
    return name


def _log_model(client: "MlflowClient", record: Record, run_id: str, folder: Path) -> str:
    from evaluation.mlflow_model import save_model

    experiment = client.get_run(run_id).info.experiment_id
    tags = {CHECKPOINT_TAG: record["hashes"]["checkpoint"]}
    model = client.create_logged_model(experiment, record["system"], source_run_id=run_id, tags=tags)
    model_id = str(model.model_id)
    with tempfile.TemporaryDirectory() as aside:
        save_model(folder, Path(aside, "model"))
        client.log_model_artifacts(model_id, str(Path(aside, "model")))
    client.finalize_logged_model(model_id, "READY")
    return model_id
