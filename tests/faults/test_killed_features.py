"""`llmslm features` killed in the middle goes on where it was; two ranks write what one does, and train from it."""

import json
import signal

import pytest

from tests.processes import Run, free_port, until
from tests.unit import toy

SHARD_BYTES = 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained llm, and the features that one rank wrote in one go."""
    folder = tmp_path_factory.mktemp("features")
    toy.write_recipe(folder)
    run = Run(["fit", "--config", "toy.yaml", "--model.system=llm"], folder, environment(folder), "llm")
    assert run.wait() == 0, run.text
    run = write(folder, "whole")
    assert run.wait() == 0, run.text
    assert len(shards(folder, "whole")) > 8
    return folder


def environment(folder):
    """Caches inside the test's folder."""
    return {"LLMSLM_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}


def write(folder, name, *args, seconds=0.0, rank=None, variables=None):
    """Start `llmslm features` with small shards, each of which takes so many seconds."""
    slow = [
        {"class_path": "tests.probe.SlowShards", "init_args": {"shard_bytes": SHARD_BYTES, "seconds": seconds}},
    ]
    command = ["features", "--config", "toy.yaml", "--out", name, f"--trainer.callbacks={json.dumps(slow)}", *args]
    label = name if rank is None else f"{name}{rank}"
    return Run(command, folder, environment(folder) | (variables or {}), label)


def write_on_two_ranks(folder, name, **settings):
    """Start both ranks of a call, as torchrun does."""
    args = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    port, runs = str(free_port()), []
    for rank in range(2):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
        variables = {key: str(value) for key, value in numbers.items()}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        runs.append(write(folder, name, *args, rank=rank, variables=variables, **settings))
    return runs


def shards(folder, name):
    """The shards of a cache by name, with their content."""
    while True:
        try:
            found = sorted((folder / name).rglob("[0-9]*.saf*"))
            return {str(path.relative_to(folder / name)): path.read_bytes() for path in found}
        except FileNotFoundError:  # what is written was renamed meanwhile
            continue


def test_sigkill_in_the_middle_and_again(folder):
    run = write(folder, "killed", seconds=0.3)
    until(lambda: len(shards(folder, "killed")) >= 3)
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    begun = {path: path.stat().st_mtime_ns for path in (folder / "killed").rglob("[0-9]*.safetensors")}
    assert 3 <= len(begun) < len(shards(folder, "whole"))
    args = ["fit", "--config", "toy.yaml", "--model.encoder.features=killed"]
    run = Run(args, folder, environment(folder), "early")
    assert run.wait() == 1
    assert "run llmslm features again, it goes on" in run.text
    run = write(folder, "killed")
    assert run.wait() == 0, run.text
    assert shards(folder, "killed") == shards(folder, "whole")
    assert {path: path.stat().st_mtime_ns for path in begun} == begun


def test_two_ranks_of_which_one_is_killed_write_what_one_rank_does(folder):
    runs = write_on_two_ranks(folder, "two", seconds=0.3)
    until(lambda: len(shards(folder, "two")) >= 4)
    runs[1].send(signal.SIGKILL)
    assert runs[1].wait() == -signal.SIGKILL
    runs[0].send(signal.SIGKILL)  # as torchrun does
    assert runs[0].wait() == -signal.SIGKILL
    assert 4 <= len(shards(folder, "two")) < len(shards(folder, "whole"))
    runs = write_on_two_ranks(folder, "two")
    assert [run.wait() for run in runs] == [0, 0], "".join(run.text for run in runs)
    assert shards(folder, "two") == shards(folder, "whole")
    run = Run(["fit", "--config", "toy.yaml", "--model.encoder.features=two"], folder, environment(folder), "fit")
    assert run.wait() == 0, run.text
