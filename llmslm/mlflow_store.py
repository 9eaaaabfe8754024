"""Which MLflow store runs go to, and under which names; imports nothing of MLflow."""

import os
from pathlib import Path

DEFAULT_STORE = "mlflow.db"
EXPERIMENT = "llmslm"
PARENT_TAG = "mlflow.parentRunId"
"""MLflow's own tag: the run that a run belongs under."""


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI, or a SQLite file in the working directory (MLflow 3 refuses plain folders).

    Its whole path is named: MLflow keeps one connection for each address, wherever the process has gone since.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / DEFAULT_STORE}"
