"""Several processes share the predictions: the same files and scores on 1, 2 and 3 of them, also after a kill."""

import json
import math
import os
import socket

import pytest
import torch
from dummy import DummySystem, Scored

from evaluation.compare import Settings, compare
from evaluation.ranks import join_ranks, leave_ranks
from evaluation.record import read_record
from evaluation.systems import Arm

FAST = {"max_new_tokens": 16, "batch_size": 3, "runs": 0, "resamples": 50}


class PaddedSystem(DummySystem):
    """Likelihoods depend on the rest of the batch, as floating point does under padding."""

    def log_likelihood(self, prompts, targets):
        longest = max(len(text) for text in targets)
        return [Scored(math.sqrt(longest + len(text)), len(text.split())) for text in targets]


def work(rank, size, port, out, examples, fails_after):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = join_ranks()
    arms = [Arm(PaddedSystem("llm", 0.9, fails_after), "a")]
    try:
        paths = compare(arms, examples, Settings(out=out, **FAST), ranks)
    except KeyboardInterrupt:
        os._exit(9)
    assert len(paths) == (1 if rank == 0 else 0)
    leave_ranks(ranks)


def run(size, out, examples, fails_after=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (size, port, out, examples, fails_after), nprocs=size)


@pytest.fixture(scope="module")
def alone(examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    (path,) = compare([Arm(PaddedSystem("llm", 0.9), "a")], examples, Settings(out=out, **FAST))
    return path


def check_same(out, alone):
    record, expected = read_record(out / alone.name), read_record(alone)
    for key in ("scores", "hashes", "length", "predictions"):
        assert record[key] == expected[key]
    files = [folder / expected["predictions"] for folder in (out, alone.parent)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [path.name for path in files[0].parent.iterdir()] == [files[0].name]


def test_three_ranks_with_uneven_shares_score_the_same(examples, alone, tmp_path):
    run(3, tmp_path, examples)
    check_same(tmp_path, alone)


def test_killed_on_two_ranks_goes_on_alone(examples, alone, tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 9"):
        run(2, tmp_path, examples, fails_after=2)
    shards = list((tmp_path / "predictions").glob("*.rank*.jsonl"))
    rows = [json.loads(line) for path in shards for line in path.read_text().splitlines()]
    assert 0 < len(rows) < len(examples)
    system = PaddedSystem("llm", 0.9)
    compare([Arm(system, "a")], examples, Settings(out=tmp_path, **FAST))
    assert system.calls == math.ceil((len(examples) - len(rows)) / 3)
    check_same(tmp_path, alone)


def test_tasks_of_slurm_are_ranks(monkeypatch):
    seen = []
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123"}
    for name, value in (slurm | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}).items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, timeout: seen.append(backend))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    assert join_ranks().local_rank == 1
    assert seen == ["gloo"]
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "15123")
