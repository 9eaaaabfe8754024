"""The benchmark of loss curves: both loops begin with the same weights and learn alike."""

import json

import pytest
import torch
from lightning.pytorch.strategies import Strategy

from evaluation.benchmarks import loss_curve
from tests.unit import toy


def test_both_loops_learn_alike_on_the_device_of_the_fit(workdir, capsys, monkeypatch):
    # After a fit the module is on another device, since Lightning moves it; here on one that computes nothing.
    away = torch.device("meta")
    monkeypatch.setattr(Strategy, "teardown", lambda self: setattr(self.lightning_module, "_device", away))
    recipe = toy.write_recipe(workdir, gradient_clip_val=0.5)
    given = ["--model.system=slm", "--data.pack_tokens=48", "--data.micro_batch_size=2"]
    loss_curve.main(["--config", recipe, "--steps", "12", "--every", "6", "--seeds", "1", "2", "--", *given])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["step"] for row in rows] == [6, 12]
    assert all(abs(row["llmslm"] - row["plain"]) < 0.1 for row in rows)
    # In float32 nothing but the batches differs: not the schedule, the clipping, the mean over targets or the weights.
    assert all(abs(value) < 1e-5 for row in rows for value in row["from_computing"].values())
    assert all(row["from_batches"]["mean"] == pytest.approx(row["same_batches"] - row["plain"]) for row in rows)
    assert rows[0]["plain"] != rows[1]["plain"]
