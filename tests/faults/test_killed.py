"""Kill a run at any moment: it resumes from the last whole checkpoint with the losses of one that was never killed."""

import json
import signal
from pathlib import Path

import pytest

from llmslm.callbacks.safeguard import REQUEUE
from llmslm.resume import fault, newest
from tests.processes import SLM, Run, until
from tests.unit import toy

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with data, a recipe and the losses of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"val_check_interval": 5, "limit_val_batches": 2, "num_sanity_val_steps": 0}
    recipe = toy.write_recipe(folder, max_steps=STEPS, **settings)
    run = fit(folder, recipe, "whole")
    assert run.wait() == 0, run.text
    assert len(losses(folder, "whole")) == STEPS
    return folder


def fit(folder, recipe, name, *args, callbacks=(), environment=None):
    """Start a run that saves each second step and notes its losses."""
    all_callbacks = [{"class_path": "tests.probe.Losses", "init_args": {"file": name}}, *callbacks]
    fixed = ["--model.system=slm", f"--model.slm.config={json.dumps(SLM)}", f"--trainer.default_root_dir={name}"]
    fixed += [
        "--model.schedule=constant",
        "--safeguard.every_n_steps=2",
        "--ckpt_path=last",
        f"--trainer.callbacks={json.dumps(all_callbacks)}",
    ]
    variables = {"LLMSLM_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    return Run(["fit", "--config", recipe, *fixed, *args], folder, variables | (environment or {}), name)


def losses(folder, name):
    """Loss by micro-batch; one that was run twice must have had the same loss twice."""
    found = {}
    for line in Path(folder / f"{name}.0.txt").read_text().splitlines():
        number, loss = line.split()
        assert found.setdefault(number, loss) == loss
    return found


def resume(folder, name, *args):
    """Start the killed run again, to its end, and compare all its losses with those of the whole run."""
    run = fit(folder, str(folder / "toy.yaml"), name, *args)
    assert run.wait() == 0, run.text
    assert losses(folder, name) == losses(folder, "whole")
    return run.text


@pytest.mark.parametrize("moment", ["half", "renamed", "after"])
def test_sigkill_while_a_checkpoint_is_written(folder, moment):
    killer = {"class_path": "tests.probe.KillWhileSaving", "init_args": {"step": 6, "moment": moment}}
    run = fit(folder, str(folder / "toy.yaml"), moment, callbacks=[killer])
    assert run.wait() == -signal.SIGKILL, run.text
    left = newest(folder / moment / "checkpoints")
    assert left.name == {"half": "last.ckpt", "renamed": "last.ckpt", "after": "resume-6.ckpt"}[moment]
    assert "whole" not in resume(folder, moment)
    assert not list((folder / moment / "checkpoints").glob(".*"))


@pytest.mark.parametrize("after", [1, 6])
def test_sigkill_at_some_moment(folder, after):
    name = f"some{after}"
    run = fit(folder, str(folder / "toy.yaml"), name)
    file = folder / f"{name}.0.txt"
    until(lambda: file.exists() and file.read_text().count("\n") >= after)
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    resume(folder, name)


@pytest.mark.parametrize(("warning", "moment"), [(signal.SIGTERM, "training"), (signal.SIGUSR1, "validation")])
def test_a_warning_saves_and_asks_to_be_queued_again(folder, warning, moment):
    slow = {"class_path": "tests.probe.SlowValidation", "init_args": {"file": moment}}
    run = fit(folder, str(folder / "toy.yaml"), moment, "--safeguard.every_n_steps=1000", callbacks=[slow])
    file = folder / f"{moment}.0.txt"
    if moment == "training":
        until(lambda: file.exists() and file.read_text().count("\n") >= 3)
    else:
        until((folder / "validation.begun").exists)
    run.send(warning)
    assert run.wait() == REQUEUE, run.text
    assert "go on with --ckpt_path last" in run.text
    done = len(losses(folder, moment))
    assert done == 5 if moment == "validation" else done < STEPS
    assert newest(folder / moment / "checkpoints").name == f"resume-{done}.ckpt"
    resume(folder, moment)


def test_a_warning_after_training_is_no_loss(folder):
    """Lightning gives the signals back before the system is saved, which the next start does."""
    slow = {"class_path": "tests.probe.SlowEnd", "init_args": {"file": "end"}}
    run = fit(folder, str(folder / "toy.yaml"), "end", callbacks=[slow])
    until((folder / "end.begun").exists)
    run.send(signal.SIGTERM)
    run.send(signal.SIGUSR1)
    assert run.wait(25) == REQUEUE, run.text
    assert not (folder / "end" / "system").exists()
    resume(folder, "end")
    assert (folder / "end" / "system" / "system.json").exists()


def test_stopped_between_two_batches_of_a_step(folder):
    """A validation may come in the middle of accumulated gradients, which no checkpoint holds."""
    recipe, steps = str(folder / "toy.yaml"), ["--trainer.accumulate_grad_batches=2", "--trainer.max_steps=6"]
    assert fit(folder, recipe, "accumulated", *steps).wait() == 0
    slow = {"class_path": "tests.probe.SlowValidation", "init_args": {"file": "between"}}
    run = fit(folder, recipe, "between", *steps, callbacks=[slow])
    until((folder / "between.begun").exists)
    run.send(signal.SIGTERM)
    assert run.wait() == REQUEUE, run.text
    assert len(losses(folder, "between")) == 5
    run = fit(folder, recipe, "between", *steps)
    assert run.wait() == 0, run.text
    assert losses(folder, "between") == losses(folder, "accumulated")
    assert len(losses(folder, "between")) == STEPS


def test_a_broken_checkpoint_is_passed_over(folder):
    name = "broken"
    assert fit(folder, str(folder / "toy.yaml"), name, "--trainer.max_steps=8").wait() == 0
    checkpoints = folder / name / "checkpoints"
    first = newest(checkpoints)
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    first.write_bytes(content)
    with pytest.warns(UserWarning, match="is broken"):
        second = newest(checkpoints)
    second.write_bytes(second.read_bytes()[:-1000])
    assert "is damaged" in fault(first)
    assert "not a zip file" in fault(second)
    text = resume(folder, name)
    assert f"{first.name} is broken" in text
    assert f"{second.name} is broken" in text
    run = fit(folder, str(folder / "toy.yaml"), "other", f"--ckpt_path={first}")
    assert run.wait() == 1
    assert "cannot be used" in run.text
