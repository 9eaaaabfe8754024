"""Warnings of a batch system outside of training, and when a checkpoint is due."""

import os
import signal
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback

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


@pytest.mark.parametrize(("optimizer", "steps"), [([], [7, 14]), (FUSED, [8, 16])])
def test_time_is_up_once_a_checkpoint(workdir, monkeypatch, optimizer, steps):
    saved = []
    monkeypatch.setattr(safeguard, "time", SimpleNamespace(monotonic=lambda: Hours.now))
    monkeypatch.setattr(safeguard.Safeguard, "save", lambda self, trainer: record(self, trainer, saved))
    recipe = toy.write_recipe(workdir, max_steps=20, limit_val_batches=0)
    training.run(
        ["fit", "--config", recipe, "--model.system=slm", "--safeguard.every_minutes=1", *optimizer],
        callbacks=[Hours()],
    )
    assert saved == steps


def record(guard, trainer, saved):
    saved.append(trainer.global_step)
    guard._saved_at = Hours.now
