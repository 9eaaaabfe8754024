"""The LightningModule under a real Trainer, where it differs from Lightning's defaults."""

import pytest

from llmslm.training import run
from tests.unit import toy


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    return toy.write_recipe(tmp_path, default_root_dir=str(tmp_path / "run"), max_steps=2, gradient_clip_val=1.0)


def test_fused_optimizers_clip_in_mixed_precision(recipe):
    fused = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3", "--model.optimizer.fused=true"]
    run(["fit", "--config", recipe, "--model.system=slm", *fused, "--trainer.precision=bf16-mixed"])


def test_all_systems_train_on_packed_rows(recipe, tmp_path):
    for system in ("llm", "slm", "llm_to_slm"):
        root = f"--trainer.default_root_dir={tmp_path / system}"
        run(["fit", "--config", recipe, f"--model.system={system}", "--data.pack_tokens=48", root])
