"""What the logger does with a server's answers, without a server."""

from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from llmslm.callbacks.tracking import MlflowLogger


@pytest.fixture
def logger(monkeypatch):
    """A logger that was begun without its server, and what reaches the server now."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setattr(MlflowLogger, "_open", lambda _: None)
    reached = []
    made = MlflowLogger(run_id="1")
    made._mlflow_client = SimpleNamespace(log_batch=lambda _, metrics: reached.extend(one.key for one in metrics))
    return made, reached


def fails(*args):
    def write():
        raise MlflowException(*args)

    return write


def test_metrics_do_not_wait_for_parameters_that_are_refused(logger):
    made, reached = logger
    made._records = [fails("another value", INVALID_PARAMETER_VALUE), lambda: reached.append("tags")]
    with pytest.warns(UserWarning, match="lacks what its server refuses: another value"):
        made._send([("loss", 1.0, 0, 0)])
    assert reached == ["tags", "loss"]


def test_parameters_wait_for_a_server_that_does_not_answer(logger):
    made, reached = logger
    made._records = [fails("no connection")]
    with pytest.raises(MlflowException, match="no connection"):
        made._send([("loss", 1.0, 0, 0)])
    assert (len(made._records), reached) == (1, [])
