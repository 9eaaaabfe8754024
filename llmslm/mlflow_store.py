"""Which MLflow store runs go to, and under which names; imports nothing of MLflow."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Keep processes apart that open a store in a SQLite file: the first one makes its tables, and two would fail."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix):
        yield
        return
    from filelock import FileLock

    with FileLock(f"{uri.removeprefix(prefix)}.lock"):
        yield
