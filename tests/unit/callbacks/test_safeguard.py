"""Warnings of a batch system outside of training, when a checkpoint is due, and what a step or run leaves behind."""

import math
import os
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from llmslm import training
from llmslm.callbacks import safeguard
from llmslm.callbacks.safeguard import REQUEUE, WARNINGS, requeued_when_warned
from tests.unit import toy

FUSED = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.fused=true"]


@pytest.fixture
def _handlers():
    before = [(warning, signal.getsignal(warning)) for warning in WARNINGS]
    yield
    for warning, handler in before:
        signal.signal(warning, handler)


@requeued_when_warned()
def run(warning):
    """Be warned, and again on the way out."""
    try:
        os.kill(os.getpid(), warning)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("warning", WARNINGS)
def test_a_warning_ends_with_the_code_that_requeues_and_a_second_one_changes_nothing(warning):
    with pytest.raises(SystemExit) as stopped:
        run(warning)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == REQUEUE


@pytest.mark.usefixtures("_handlers")
def test_signals_are_given_back():
    before = [signal.getsignal(warning) for warning in WARNINGS]
    with requeued_when_warned():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(warning) for warning in WARNINGS] == before


class Hours(Callback):
    """A clock that goes on by ten seconds a batch."""

    now = 0.0

    def on_train_batch_start(self, *_):
        Hours.now += 10


@pytest.mark.parametrize(
    ("options", "steps"),
    [([], [7, 14]), (FUSED, [8, 16]), ([*FUSED, "--safeguard.every_n_steps=7"], [7, 14])],
)
def test_time_is_up_once_a_checkpoint(workdir, monkeypatch, options, steps):
    saved = []
    monkeypatch.setattr(safeguard, "time", SimpleNamespace(monotonic=lambda: Hours.now))
    monkeypatch.setattr(safeguard.Safeguard, "save", lambda self, trainer: record(self, trainer, saved))
    recipe = toy.write_recipe(workdir, max_steps=20, limit_val_batches=0)
    training.run(
        ["fit", "--config", recipe, "--model.system=slm", "--safeguard.every_minutes=1", *options],
        callbacks=[Hours()],
    )
    assert saved == steps


def record(guard, trainer, saved):
    saved.append(trainer.global_step)
    guard._saved_at = Hours.now


class Weights(LightningModule):
    """Weights that fall by a step each, but for steps that are not finite, or an exception."""

    def __init__(self, optimizer, bad=(), boom=None):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.ones(5000))
        self.make, self.bad, self.boom = optimizer, bad, boom

    def training_step(self, batch, index):
        if index == self.boom:
            raise RuntimeError("boom")
        return (self.weights * batch["x"]).mean() * 5000 * (math.nan if index in self.bad else 1)

    def configure_optimizers(self):
        return self.make(self.parameters())

    def fit(self, guard, folder, **trainer):
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(accelerator="cpu", callbacks=[guard], default_root_dir=folder, **quiet, **trainer)
        trainer.fit(self, DataLoader([{"x": torch.ones(1)}] * 20))


@pytest.mark.filterwarnings("ignore")  # Lightning's on loaders; the skipped step itself
@pytest.mark.parametrize("fused", [False, True])
def test_a_first_step_that_is_skipped_leaves_no_trace(tmp_path, fused):
    module = Weights(partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=fused), bad=[0])
    module.fit(safeguard.Safeguard(), tmp_path, max_steps=3)
    assert module.weights.detach() == pytest.approx(torch.full((5000,), 0.71))


@pytest.mark.filterwarnings("ignore")
def test_another_run_begins_anew(tmp_path):
    guard, make = safeguard.Safeguard(), partial(torch.optim.AdamW, fused=True)
    with pytest.raises(RuntimeError, match="boom"):
        Weights(make, bad=[1], boom=3).fit(guard, tmp_path, max_steps=4, accumulate_grad_batches=2)
    assert not guard._batches
    Weights(make).fit(guard, tmp_path, max_steps=4, accumulate_grad_batches=2)
    assert guard.skipped == 0
