"""Under SLURM's variables: two nodes of one task each find each other, save on SIGTERM and go on when queued again."""

import json
import signal

from llmslm.callbacks.safeguard import REQUEUE
from tests.processes import Run, free_port, until
from tests.unit import toy


def srun(folder, port, name, *args):
    """Start the tasks as srun would, by its variables."""
    losses = [{"class_path": "tests.probe.Losses", "init_args": {"file": "losses", "seconds": 0.05}}]
    fixed = ["--model.system=slm", "--trainer.default_root_dir=run", "--trainer.devices=1", "--trainer.num_nodes=2"]
    fixed += [f"--trainer.callbacks={json.dumps(losses)}", "--trainer.limit_val_batches=0", "--ckpt_path=last"]
    fixed += ['--trainer.strategy={"class_path": "llmslm.parallel.Fsdp"}', "--model.schedule=constant"]
    tasks = []
    for rank in range(2):
        slurm = {"JOB_ID": 4711, "JOB_NAME": "train", "NTASKS": 2, "NNODES": 2, "NTASKS_PER_NODE": 1}
        slurm |= {"PROCID": rank, "NODEID": rank, "LOCALID": 0, "NODELIST": "127.0.0.1"}
        environment = {f"SLURM_{key}": str(value) for key, value in slurm.items()} | {"MASTER_PORT": str(port)}
        environment |= {"LLMSLM_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
        command = ["fit", "--config", str(folder / "toy.yaml"), *fixed, *args]
        tasks.append(Run(command, folder, environment, f"{name}{rank}"))
    return tasks


def test_a_job_at_its_time_limit_is_queued_again_and_goes_on(tmp_path):
    toy.write_recipe(tmp_path, max_steps=100)
    tasks = srun(tmp_path, free_port(), "first")
    file = tmp_path / "losses.1.txt"
    until(lambda: (file.exists() and file.read_text().count("\n") >= 3) or not tasks[0].process.is_alive())
    tasks[1].send(signal.SIGTERM)  # one is enough: the tasks decide together
    assert [task.wait(60) for task in tasks] == [REQUEUE, REQUEUE], tasks[0].text
    done = file.read_text().count("\n")
    assert (tmp_path / "run" / "checkpoints" / f"resume-{done}.ckpt" / "seal.json").exists()
    tasks = srun(tmp_path, free_port(), "second", f"--trainer.max_steps={done + 2}")
    assert [task.wait(60) for task in tasks] == [0, 0], tasks[0].text
    assert f"Restored all states from the checkpoint at run/checkpoints/resume-{done}.ckpt" in tasks[0].text
    assert [int(line.split()[0]) for line in file.read_text().splitlines()] == list(range(1, done + 3))
