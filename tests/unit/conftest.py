"""A working folder of its own for tests that run commands."""

import pytest


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """Runs, caches and MLflow's store go to a temporary folder, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path
