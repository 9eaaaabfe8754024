"""A full disk: one clear line, nothing half-written, and what was whole stays whole."""

import json
import os
import subprocess

import pytest

from llmslm.resume import fault, newest
from tests.processes import Run
from tests.unit import toy


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 700 kB: room for some checkpoints of the toy, not for all."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(tmp_path, small_disk):
    recipe = toy.write_recipe(tmp_path, max_steps=8, limit_val_batches=1)
    fixed = ["--model.system=slm", f"--trainer.default_root_dir={small_disk}", "--checkpoint.save_top_k=-1"]
    environment = {"LLMSLM_CACHE": str(tmp_path / "cache"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    run = Run(["fit", "--config", recipe, *fixed], tmp_path, environment)
    assert run.wait() == 1, run.text
    line = run.text.strip().splitlines()[-1]
    assert line.startswith("llmslm: error: the disk is full: ")
    assert "--ckpt_path last" in line
    checkpoints = small_disk / "checkpoints"
    assert not list(checkpoints.glob(".*"))
    assert newest(checkpoints) is not None
    assert all(fault(path) is None for path in checkpoints.glob("*.ckpt"))
    assert json.dumps(run.text).count("Traceback") == 0


def test_no_room_for_mlflows_database(tmp_path, small_disk):
    logger = {"class_path": "llmslm.callbacks.tracking.MlflowLogger"}
    args = ["--model.system=slm", f"--trainer.logger={json.dumps(logger)}"]
    store = f"sqlite:///{small_disk}/mlflow.db"
    environment = {"LLMSLM_CACHE": str(tmp_path / "cache"), "MLFLOW_TRACKING_URI": store}
    run = Run(["fit", "--config", toy.write_recipe(tmp_path), *args], tmp_path, environment)
    assert run.wait() == 1, run.text
    line = run.text.strip().splitlines()[-1]
    assert line.startswith(f"llmslm: error: the disk is full: MLflow cannot write to {store}; ")
    assert "MLFLOW_TRACKING_URI" in line
    assert "Traceback" not in run.text
    assert not list(small_disk.glob("mlflow.db")), "half of its tables would be there, and never the rest"
