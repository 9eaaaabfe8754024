"""The leaderboard through a real MLflow server on loopback, over SQLite and over PostgreSQL, and back from it."""

import importlib.util
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from test_systems import FORMAT, saved

from evaluation.arms import load_arms
from evaluation.cli import main
from evaluation.compare import Settings, compare
from evaluation.leaderboard import build
from evaluation.record import find_records, read_record
from evaluation.systems import Arm
from evaluation.tracking import log_comparison
from llmslm.system import System

POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
FAST = {"max_new_tokens": 16, "batch_size": 8, "warmups": 0, "runs": 1, "resamples": 20}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def sqlite():
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/mlflow.db"


@contextmanager
def postgresql():
    """A cluster of our own; the server refuses to run as root, so it then runs as the package's user."""
    root = os.geteuid() == 0
    before = ["runuser", "-u", "postgres", "--"] if root else []
    folder, port = Path(tempfile.mkdtemp()), free_port()
    if root:
        shutil.chown(folder, "postgres", "postgres")
    call = {"check": True, "capture_output": True, "cwd": folder}
    subprocess.run([*before, POSTGRES / "initdb", "-D", folder / "data", "-U", "mlflow", "-A", "trust", "-N"], **call)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    start = [POSTGRES / "pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log", "-o", options, "start"]
    subprocess.run([*before, *start], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    try:
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*before, POSTGRES / "pg_ctl", "-D", folder / "data", "-m", "immediate", "stop"], **call)
        shutil.rmtree(folder)


def has_postgres():
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        return False
    return POSTGRES is not None and importlib.util.find_spec("psycopg2") is not None


needs_postgres = pytest.mark.skipif(not has_postgres(), reason="needs Debian's postgresql and the package psycopg2")


@pytest.fixture(
    scope="module", params=[sqlite, pytest.param(postgresql, marks=needs_postgres)], ids=["sqlite", "postgresql"]
)
def server(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with request.param() as store:
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        stores = ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
        with (folder / "server.log").open("w") as log:
            process = subprocess.Popen([*command, *stores], stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, folder / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 15)
            process.wait(20)


def wait_for(address, process, log):
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(log.read_text()[-2000:])


def test_the_leaderboard_goes_in_and_comes_back(server, dummy, examples, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    out = tmp_path / "out"
    compare([Arm(dummy("llm", 0.95)), Arm(dummy("slm", 0.4))], examples, Settings(out=out, **FAST))
    main(["leaderboard", str(out), "--out", str(tmp_path / "board")])
    assert f"in {server}" in capsys.readouterr().out
    main(["leaderboard", "--from-mlflow", "llmslm", "--out", str(tmp_path / "again")])
    for name in ("leaderboard.md", "leaderboard.csv", "leaderboard.html"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "board" / name).read_text(), name
    back = {record["system"]: record for record in map(read_record, find_records([tmp_path / "again"]))}
    assert back["slm"]["scores"] == read_record(out / "copying.slm.record.json")["scores"]
    with pytest.raises(SystemExit, match="1"):
        main(["leaderboard", "--from-mlflow", "no-such", "--out", str(tmp_path / "none")])
    assert "has no evaluation in experiment 'no-such'" in capsys.readouterr().err


def test_a_system_is_registered_once_and_loads_again(server, examples, tmp_path, monkeypatch):
    """In full: the store's client, the artifacts over HTTP, and the model in a process that knows nothing of it."""
    folder = saved(tmp_path, "llm", "gpt2")
    settings = Settings(out=tmp_path / "out", runs=0, resamples=10, max_new_tokens=6)
    (path,) = compare(load_arms({"llm": folder}, "cpu", "float32"), examples, settings)
    board = build([path], tmp_path / "board")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setattr("evaluation.tracking.EXPERIMENT", "models")
    run_id = log_comparison(board).child_run_ids[0]
    log_comparison(board)
    client = MlflowClient(server)
    (version,) = client.search_model_versions("name='copying-llm'")
    assert version.run_id == run_id
    assert version.tags["llmslm.checkpoint"] == read_record(path)["hashes"]["checkpoint"]
    local = client.download_artifacts(run_id, "record.json", str(tmp_path))
    assert json.loads(Path(local).read_text())["system"] == "llm"
    made = tmp_path / "made.json"
    code = (
        "import json, mlflow, pathlib, sys\n"
        "model = mlflow.pyfunc.load_model('models:/copying-llm/1')\n"
        "made = model.predict(json.loads(sys.argv[1]), params=None)\n"
        "pathlib.Path(sys.argv[2]).write_text(json.dumps(made))\n"
    )
    call = [sys.executable, "-W", "ignore", "-c", code, json.dumps(examples.prompts[:2]), str(made)]
    subprocess.run(call, check=True, timeout=200, env={**os.environ, "MLFLOW_TRACKING_URI": server})
    expected = System.load(folder).generate(examples.prompts[:2], max_new_tokens=FORMAT.max_target_tokens)
    assert json.loads(made.read_text()) == [each.text for each in expected]
