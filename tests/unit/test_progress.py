"""Steps that do not wait for the device, and the bar that shows their loss all the same."""

import sys
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from llmslm import progress, training
from tests.unit import toy

FUSED = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.fused=true"]


class Waits(TorchDispatchMode):
    """Notes which package or file asks for a value of a tensor."""

    def __init__(self):
        super().__init__()
        self.asking = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in func.name():
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            self.asking.add(frame.f_code.co_filename)
        return func(*args, **(kwargs or {}))


class WatchSteps(Callback):
    """Watches the steps after the first and keeps the bar's metrics."""

    def __init__(self):
        self.waits, self.shown = Waits(), {}

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 1:
            self.waits.__enter__()

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == trainer.max_steps:
            self.waits.__exit__(None, None, None)
            self.shown = trainer.progress_bar_callback.get_metrics(trainer, module)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(progress, "_INTERVAL_S", 1e6)
    return tmp_path


def fit(folder, *args, **trainer):
    recipe = toy.write_recipe(folder, gradient_clip_val=1.0, limit_val_batches=0, enable_progress_bar=True, **trainer)
    watch = WatchSteps()
    fixed = ["fit", "--config", recipe, "--model.system=slm", f"--trainer.default_root_dir={folder}/run"]
    training.run([*fixed, *args], callbacks=[watch])
    return watch


def test_no_step_waits_for_the_device_but_where_transformers_makes_a_mask(folder):
    files = {Path(file).as_posix() for file in fit(folder, *FUSED, max_steps=4).waits.asking}
    assert {file for file in files if "/transformers/" not in file and not file.endswith("data/loader.py")} == set()


@pytest.mark.parametrize("system", ["slm", "llm"])
def test_no_step_of_packed_rows_waits_at_all(folder, system):
    packed = ["--data.pack_tokens=48", "--data.micro_batch_size=1", f"--model.system={system}"]
    files = fit(folder, *FUSED, *packed, max_steps=4).waits.asking
    assert {file for file in files if not file.endswith("data/loader.py")} == set()


def test_the_bar_shows_the_loss(folder):
    watch = fit(folder, max_steps=2)
    assert watch.shown["train/loss"] > 0


def test_a_bar_of_ones_own_shows_it_too(folder):
    bar = '[{"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"}]'
    assert fit(folder, f"--trainer.callbacks={bar}", max_steps=2).shown["train/loss"] > 0
