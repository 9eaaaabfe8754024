"""One of several ranks is killed or hangs: the others stop with a clear line."""

import json
import signal
import time

import pytest

from llmslm.callbacks.watch import LOST
from llmslm.resume import newest
from tests.distributed.test_training import torchrun
from tests.processes import Run, free_port, until
from tests.unit import toy


def command(folder, ranks, steps, seconds, *args):
    """The arguments of a run on DDP that saves each step and takes its time."""
    losses = [{"class_path": "tests.probe.Losses", "init_args": {"file": "losses", "seconds": seconds}}]
    fixed = ["--model.system=slm", "--trainer.default_root_dir=run", f"--trainer.callbacks={json.dumps(losses)}"]
    fixed += [f"--trainer.devices={ranks}", f"--trainer.max_steps={steps}", "--model.schedule=constant"]
    fixed += ["--trainer.limit_val_batches=0", "--safeguard.every_n_steps=1", "--ckpt_path=last"]
    return ["fit", "--config", str(folder / "toy.yaml"), *fixed, *args]


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize(
    ("sign", "lost", "watch", "seconds"),
    [
        (signal.SIGKILL, 1, ["--watch.lost_after_s=4"], 30),
        (signal.SIGSTOP, 0, ["--watch.lost_after_s=4"], 30),
        (signal.SIGSTOP, 1, ["--watch.lost_after_s=4"], 30),
        (signal.SIGSTOP, 1, [], 60),  # as a host without power, and with the usual patience
    ],
    ids=["killed", "first_hangs", "last_hangs", "usual"],
)
def test_the_others_stop_and_say_why(tmp_path, sign, lost, watch, seconds):
    toy.write_recipe(tmp_path)
    port, runs = free_port(), []
    for rank in range(2):
        environment = {"LLMSLM_CACHE": str(tmp_path / "cache")} | torchrun(rank, 2, port)
        args = command(tmp_path, 2, 10_000, 0.05, "--trainer.strategy=ddp", *watch)
        runs.append(Run(args, tmp_path, environment, f"rank{rank}"))
    until(lambda: lines(tmp_path / "losses.1.txt") >= 2 or not runs[0].process.is_alive())
    begin = time.monotonic()
    runs[lost].send(sign)
    other = runs[1 - lost]
    code = other.wait(seconds + 30)
    took = time.monotonic() - begin
    print(f"rank {1 - lost} stopped after {took:.1f} s")
    assert took < seconds
    last = other.text.strip().splitlines()[-1]
    assert last.startswith("llmslm: error: "), other.text
    assert "start all again with --ckpt_path last" in last
    if sign == signal.SIGSTOP:
        runs[lost].send(signal.SIGKILL)
        assert code == LOST
        assert f"rank {lost} is lost: " in last
    else:
        assert code in (1, LOST)
        assert "another rank of this run is gone" in last or f"rank {lost} is lost" in last
    assert newest(tmp_path / "run" / "checkpoints") is not None
