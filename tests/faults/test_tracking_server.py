"""MLflow's server hangs, comes back, and is killed: training goes on, metrics are sent later or lie on the disk."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

from llmslm.callbacks.outbox import Outbox
from llmslm.callbacks.safeguard import REQUEUE
from tests.processes import Run, free_port, until
from tests.unit import toy

SERVER = "-m mlflow server --host 127.0.0.1 --workers 1 --backend-store-uri sqlite:///store.db"


def answers(uri):
    try:
        return urllib.request.urlopen(f"{uri}/health", timeout=1).status == 200
    except OSError:
        return False


@contextmanager
def serving(folder, port):
    """Start a server and wait until it answers; yield a function that signals all its processes."""
    options = [*SERVER.split(), "--port", str(port), "--artifacts-destination", "artifacts"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *options], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}"), every=0.3)
        yield lambda number: os.killpg(process.pid, number)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def server(tmp_path):
    """A server's address and a function that signals all its processes."""
    port = free_port()
    with serving(tmp_path, port) as send:
        yield f"http://127.0.0.1:{port}", send


def fit(folder, uri, recipe, timeout_s):
    """Start a run of slow steps that logs each of them to the server, which it asks once."""
    losses = {"class_path": "tests.probe.Losses", "init_args": {"file": "losses", "seconds": 0.1}}
    logger = {"class_path": "llmslm.callbacks.tracking.MlflowLogger"}
    args = ["--model.system=slm", f"--trainer.callbacks={json.dumps([losses])}", "--trainer.log_every_n_steps=1"]
    environment = {"LLMSLM_CACHE": str(folder / "cache"), "MLFLOW_TRACKING_URI": uri}
    environment |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": timeout_s, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    return Run(["fit", "--config", recipe, *args, f"--trainer.logger={json.dumps(logger)}"], folder, environment)


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def test_training_does_not_wait_for_the_server(tmp_path, server):
    from mlflow import MlflowClient

    uri, send = server
    recipe = toy.write_recipe(tmp_path, max_steps=150, val_check_interval=150, limit_val_batches=1)
    run = fit(tmp_path, uri, recipe, "3")
    done = tmp_path / "losses.0.txt"

    until(lambda: lines(done) >= 5 or not run.process.is_alive())
    assert run.process.is_alive(), run.text
    send(signal.SIGSTOP)  # it takes connections and never answers
    until(lambda: lines(done) >= 30)
    spool = until(lambda: next(iter((tmp_path / "mlflow_unsent").glob("*.jsonl")), None))
    send(signal.SIGCONT)
    client = MlflowClient(uri)
    history = until(lambda: [m.step for m in client.get_metric_history(spool.stem, "train/loss") if m.step >= 20])
    assert history
    until(lambda: not spool.exists())
    assert lines(done) < 150  # or the server would have it all
    send(signal.SIGKILL)  # gone for good
    assert run.wait(60) == 0, run.text
    assert "metrics cannot be sent and are kept in" in run.text
    assert "is gone: the metrics that it lacks are in" in run.text
    kept = [json.loads(line) for line in spool.read_text().splitlines()]
    assert 149 in [step for name, _, _, step in kept if name == "train/loss"]
    assert "val/loss" in {name for name, *_ in kept}


def test_a_server_that_comes_late_gets_it_all(tmp_path):
    """It is gone when the run begins, as after a restart, and comes while the run trains."""
    from mlflow import MlflowClient

    uri = f"http://127.0.0.1:{(port := free_port())}"
    recipe = toy.write_recipe(tmp_path, max_steps=2000, val_check_interval=2000, limit_val_batches=0)
    run = fit(tmp_path, uri, recipe, "5")
    until(lambda: lines(tmp_path / "losses.0.txt") >= 5 or not run.process.is_alive())
    assert list((tmp_path / "mlflow_unsent").glob("without-run-id-*.jsonl")), run.text
    with serving(tmp_path, port):
        client = MlflowClient(uri)
        found = until(lambda: client.get_experiment_by_name("llmslm"))
        made = until(lambda: client.search_runs([found.experiment_id]))[0].info.run_id
        until(lambda: 1 in [metric.step for metric in client.get_metric_history(made, "train/loss")])
        data = client.get_run(made).data
        assert data.params["model/warmup_steps"] == "2"
        assert "data.fingerprint" in data.tags
        run.send(signal.SIGTERM)
        assert run.wait(60) == REQUEUE, run.text
    assert f"the MLflow server {uri} does not answer" in run.text
    assert not list((tmp_path / "mlflow_unsent").glob("*"))


def test_metrics_left_by_a_run_are_sent_by_the_next(tmp_path):
    file, sent, gone = tmp_path / "unsent.jsonl", [], [True]

    def send(metrics):
        if gone:
            raise OSError("no route to host")
        sent.extend(metrics)

    first = Outbox(send, file)
    with pytest.warns(UserWarning, match="metrics cannot be sent and are kept in .*no route to host"):
        until(lambda: first.put([("a", 1.0, 2, 3)]) or file.exists())
    begin = time.monotonic()
    assert not first.flush(30)
    assert time.monotonic() - begin < 10  # an attempt, not the whole time
    gone.clear()
    second = Outbox(send, file)
    second.put([("c", 7.0, 8, 9)])
    assert second.flush(30)
    assert {name for name, *_ in sent} == {"a", "c"}
    assert not file.exists()
