"""Losses that are not finite: the step is skipped, and many in a row end the run with their batch saved."""

import json

import pytest
import torch

from tests.processes import Run
from tests.unit import toy


def fit(folder, steps, value, name, *args):
    recipe = toy.write_recipe(folder, max_steps=6, limit_val_batches=1)
    callbacks = [
        {"class_path": "tests.probe.Losses", "init_args": {"file": name}},
        {"class_path": "tests.probe.BadLoss", "init_args": {"steps": steps, "value": value}},
    ]
    fixed = ["--model.system=slm", f"--trainer.callbacks={json.dumps(callbacks)}", f"--trainer.default_root_dir={name}"]
    environment = {"LLMSLM_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    return Run(["fit", "--config", recipe, *fixed, *args], folder, environment, name)


FUSED = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.fused=true"]


@pytest.mark.parametrize(("value", "optimizer"), [("nan", []), ("inf", []), ("nan", FUSED)])
def test_the_step_is_skipped_and_counted(tmp_path, value, optimizer):
    run = fit(tmp_path, [2, 5], value, "run", *optimizer)
    assert run.wait() == 0, run.text
    assert all(f"step {step} is skipped: its loss or gradients are not finite" in run.text for step in (2, 5))
    losses = [float.fromhex(line.split()[1]) for line in (tmp_path / "run.0.txt").read_text().splitlines()]
    assert [not torch.tensor(loss).isfinite() for loss in losses] == [False, True, False, False, True, False]
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["Safeguard"]["skipped"] == 2
    optimizer = checkpoint["optimizer_states"][0]["state"]
    assert {int(state["step"]) for state in optimizer.values()} == {4}
    assert all(torch.isfinite(weight).all() for weight in checkpoint["state_dict"].values())


def test_so_is_the_last_step_where_that_is_known_late(tmp_path):
    run = fit(tmp_path, [6], "nan", "run", *FUSED)
    assert run.wait() == 0, run.text
    assert "step 6 is skipped" in run.text


def test_many_in_a_row_end_the_run(tmp_path):
    run = fit(tmp_path, [2, 3, 4], "nan", "run", "--safeguard.bad_steps=3", "--trainer.accumulate_grad_batches=2")
    assert run.wait() == 1
    line = run.text.strip().splitlines()[-1]
    assert line.startswith("llmslm: error: 3 steps in a row had a loss or gradients that are not finite")
    saved = torch.load(tmp_path / "run/bad_batches/rank-0.pt", weights_only=True)
    assert saved["step"] == 4
    assert len(saved["losses"]) == len(saved["batches"]) == 2  # micro-batches
    assert saved["batches"][0]["input_ids"].shape == saved["batches"][0]["labels"].shape
