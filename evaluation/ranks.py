"""The processes that share an evaluation: one by default, many under torchrun or srun.

Predictions are gathered as Python objects over gloo, so that the ranks need no common file system. Gathering is
collective: all ranks call it in the same order.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(days=1)
"""How long a rank waits for slower ones; that one has died shows at once, by its closed connection."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that share the work."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Place on this node: which of its GPUs to use."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def gather_all(self, value: Any) -> list[Any]:
        """Return every rank's value on every rank, in the order of the ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """Return the first rank's value on every rank."""
        return self.gather_all(value if self.is_first else None)[0]


def join_ranks() -> Ranks:
    """Join the other processes that torchrun (or srun with several tasks) started; alone, there is nothing to join."""
    environment = os.environ
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        environment.setdefault("MASTER_ADDR", environment["SLURM_LAUNCH_NODE_IPADDR"])
        environment.setdefault("MASTER_PORT", str(15000 + int(environment["SLURM_JOB_ID"]) % 20000))
    size = int(environment.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), int(environment.get("LOCAL_RANK", "0")))


def leave_ranks(ranks: Ranks) -> None:
    """Part from the other processes."""
    if ranks.size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()
