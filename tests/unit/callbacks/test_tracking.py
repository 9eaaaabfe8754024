"""What the logger does with a server's answers, without a server."""

from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from llmslm.callbacks.outbox import Outbox
from llmslm.callbacks.tracking import MlflowLogger
from llmslm.errors import UserError


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


@pytest.mark.parametrize("is_open", [False, True])
def test_a_store_that_has_no_room_is_said_in_a_line(monkeypatch, is_open):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    made, full = MlflowLogger(run_id="1"), fails("(sqlite3.OperationalError) database or disk is full")
    made._initialized, made._mlflow_client = is_open, SimpleNamespace(get_run=lambda _: full())
    expected = r"the disk is full: MLflow cannot write to http://127.0.0.1:1; .*\(MLFLOW_TRACKING_URI\)"
    with pytest.raises(UserError, match=expected):
        made.record(full)


def test_metrics_that_have_no_room_either_wait_in_memory(monkeypatch, tmp_path):
    gone = [True]

    def send(_):
        if gone:
            raise OSError("no route to host")

    def write(*_):
        raise UserError("the disk is full: unsent was not written")

    monkeypatch.setattr("llmslm.callbacks.outbox.write_text", write)
    box = Outbox(send, tmp_path / "unsent")
    written = pytest.warns(UserWarning, match="metrics that wait cannot be written to .*unsent: the disk is full")
    with pytest.warns(UserWarning, match="no route to host"), written:
        is_sent = box.put([("loss", 1.0, 0, 0)]) or box.flush(30)
    assert not is_sent
    gone.clear()
    assert box.flush(30)
