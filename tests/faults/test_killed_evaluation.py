"""An evaluation under torchrun of which one rank is killed: the same command, on more ranks, ends as if nothing was."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from evaluation.cli import main
from evaluation.predictions import read_partial
from evaluation.record import read_record
from tests.processes import until
from tests.unit.evaluation.test_systems import bare

EXAMPLES, BATCH = 37, 2
SLOW = """
import os, time
from pathlib import Path

from evaluation.peers import PretrainedSystem


class Slow(PretrainedSystem):
    '''A real model that takes its time, and notes who asked it for what.'''

    def generate(self, prompts, **settings):
        with Path("asked.txt").open("a") as file:
            file.write("".join(f"{os.getpid()} {prompt}\\n" for prompt in prompts))
        time.sleep(0.05)
        return super().generate(prompts, **settings)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GIT_DIR", os.devnull)  # a commit made meanwhile is other code, which predicts anew
    Path("slow_system.py").write_text(SLOW)
    arguments = {"source": bare(tmp_path / "model", "gpt2"), "name": "slow"}
    Path("slow.yaml").write_text(yaml.safe_dump({"class_path": "slow_system.Slow", "init_args": arguments}))
    rows = [
        {"prompt": "ab" * (1 + index % 9) + str(index), "target": "cd" * (1 + index % 4)} for index in range(EXAMPLES)
    ]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def command(out):
    numbers = ["--batch-size", str(BATCH), "--max-new-tokens", "6", "--runs", "0", "--resamples", "20"]
    return ["compare", "--systems", "slow.yaml", "--data", "data.jsonl", "--out", out, *numbers]


def start(ranks, out):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun has it, while the process alone has all cores
    path = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen([*launcher, "-m", "evaluation", *command(out)], env=environment)


def test_a_killed_rank_costs_no_prediction_and_makes_none_twice(folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # a rank has one
    main(command("alone"))
    torch.set_num_threads(threads)
    Path("asked.txt").unlink()
    shards = Path("out", "predictions")
    job = start(2, "out")
    until(lambda: sum(len(read_partial(path)) for path in shards.glob("*.rank*.jsonl")) >= 6, 120)
    killed = int(Path("asked.txt").read_text().split()[0])
    os.kill(killed, signal.SIGKILL)
    assert job.wait(60) != 0
    rows = [row for path in shards.glob("*.jsonl") for row in read_partial(path)]
    assert 6 <= len(rows) < EXAMPLES
    Path("asked.txt").unlink()
    assert start(3, "out").wait(120) == 0
    asked = Path("asked.txt").read_text().splitlines()
    assert len(asked) == len({line.split()[1] for line in asked}) == EXAMPLES - len(rows)
    assert len({line.split()[0] for line in asked}) == min(3, math.ceil(len(asked) / BATCH))
    alone, resumed = (read_record(Path(out, "data.slow.record.json")) for out in ("alone", "out"))
    for key in ("scores", "hashes", "length", "predictions"):
        assert resumed[key] == alone[key]
    files = [Path(out, alone["predictions"]).read_bytes() for out in ("alone", "out")]
    assert files[0] == files[1]
    assert [path.name for path in shards.iterdir()] == [Path(alone["predictions"]).name]
