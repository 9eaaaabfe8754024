"""Which MLflow store runs go to, and under which names; imports nothing of MLflow."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmslm.writing import is_disk_full, raise_if_full

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
    """Keep processes apart that open a store in a SQLite file: the first one makes its tables, and two would fail.

    A new file whose tables could not all be made is removed: nobody could open it later.

    Raises:
        UserError: if the disk is full.
    """
    prefix = "sqlite:///"
    if not uri.startswith(prefix):
        yield
        return
    from filelock import FileLock

    path = Path(uri.removeprefix(prefix))
    with in_words(uri), FileLock(f"{path}.lock"):
        is_new = not path.exists()
        try:
            yield
        except BaseException:
            if is_new:
                path.unlink(missing_ok=True)
            raise


@contextmanager
def in_words(uri: str) -> Iterator[None]:
    """Say in one line that a store has no room.

    Raises:
        UserError: if the disk is full.
    """
    logging.getLogger("mlflow.store.db.utils").addFilter(_is_no_full_disk)
    try:
        yield
    except Exception as error:
        advice = "free some space, or name another store (MLFLOW_TRACKING_URI)"
        raise_if_full(error, f"MLflow cannot write to {uri}; {advice}")
        raise


def _is_no_full_disk(record: logging.LogRecord) -> bool:
    """Leave out MLflow's own traceback."""
    return not (record.exc_info and record.exc_info[1] and is_disk_full(record.exc_info[1]))
