"""torchrun on two nodes, one rank of which is killed: it starts all again, from the checkpoint."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.faults.test_lost_rank import command, lines
from tests.processes import free_port, until
from tests.unit import toy


def test_two_nodes_under_torchrun_start_again_from_the_checkpoint(tmp_path):
    """Two agents on loopback, one rank each; one rank is killed once."""
    toy.write_recipe(tmp_path)
    args = command(
        tmp_path, 1, 8, 0.3, "--trainer.num_nodes=2", '--trainer.strategy={"class_path": "llmslm.parallel.Fsdp"}'
    )
    port = free_port()
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    environment = os.environ | {"LLMSLM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), environment.get("PYTHONPATH")]))
    logs = [(tmp_path / f"node{node}.log").open("w") for node in range(2)]
    agents = [
        subprocess.Popen([*agent, "-m", "tests.command", *args], cwd=tmp_path, env=environment, stdout=log, stderr=log)
        for log in logs
    ]
    try:
        until(lambda: lines(tmp_path / "losses.1.txt") >= 2, 60)
        first = set((tmp_path / "pids").read_text().split())
        os.kill(int(next(iter(first))), signal.SIGKILL)
        codes = [process.wait(90) for process in agents]
    finally:
        for process in agents:
            process.kill()
        for log in logs:
            log.close()
    text = "".join((tmp_path / f"node{node}.log").read_text() for node in range(2))
    assert codes == [0, 0], text
    assert "Restored all states from the checkpoint at run/checkpoints/resume-" in text
    steps = {}
    for rank in range(2):
        for line in (tmp_path / f"losses.{rank}.txt").read_text().splitlines():
            step, loss = line.split()
            assert steps.setdefault((rank, step), loss) == loss  # the same loss before and after
    assert len(steps) == 16
    assert len(set((tmp_path / "pids").read_text().split())) >= 4
