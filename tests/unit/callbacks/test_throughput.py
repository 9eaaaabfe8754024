"""Training speed: what is counted, and that a run logs it, packed or not."""

import csv

import pytest

from llmslm.callbacks.throughput import FlopCount, matmul_weights
from llmslm.data.codec import BatchSizes
from llmslm.models.fusion import ReplaceEncoder
from llmslm.training import run
from tests import tiny
from tests.unit import toy
from tests.unit.models.compositions import compose


def test_operations_are_those_of_the_weights_that_a_token_meets():
    model = tiny.build("llama")
    head = 32 * tiny.VOCABULARY
    body = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert matmul_weights(model) == body + head
    count = FlopCount.of(model)
    sizes = BatchSizes(examples=2, prompt=10, target=4, encoder_prompt=0, slots=20)
    assert count.of_batch(sizes) == 6 * (14 * body + 4 * head)


def test_the_projector_meets_each_state(tmp_path):
    model = compose("llama", "t5", tmp_path, ReplaceEncoder)
    sizes = BatchSizes(examples=2, prompt=0, target=0, encoder_prompt=10, slots=20)
    frozen, front = matmul_weights(model.encoder), matmul_weights(model.projector)
    assert front > 0
    assert FlopCount.of(model).of_batch(sizes) == 2 * 10 * frozen + 6 * 10 * front


@pytest.mark.parametrize("packed", [True, False])
def test_a_run_logs_its_speed(tmp_path, monkeypatch, packed):
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    recipe = toy.write_recipe(tmp_path, log_every_n_steps=2, default_root_dir=str(tmp_path / "run"))
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
    run(["fit", "--config", recipe, "--model.system=slm", *logger, *(["--data.pack_tokens=64"] if packed else [])])
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/tokens_per_s"]]
    assert [int(row["step"]) for row in rows] == [1, 3]
    assert all(float(row["train/tokens_per_s"]) > 0 and float(row["train/tflops_per_s"]) > 0 for row in rows)
    assert all(0 <= float(row["train/padding_share"]) < 0.5 for row in rows)
    assert all(float(row["train/loss"]) > 0 for row in rows)
