"""Run a function on several gloo ranks; the first failure is the test's."""

import os
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from tests.processes import SERVER, free_port


def run_ranks(function, world_size: int, *args, seconds: float = 120):
    """Call function(rank, *args) in `world_size` processes of one group; return the results by rank."""
    port, results = free_port(), SERVER.Queue()
    processes = [
        SERVER.Process(target=_rank, args=(function, rank, world_size, port, results, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=seconds) for _ in processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    for rank, (failure, _) in sorted(found.items()):
        assert failure is None, f"rank {rank}:\n{failure}"
    return [found[rank][1] for rank in range(world_size)]


def _rank(function, rank, world_size, port, results, args):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
        results.put((rank, (None, function(rank, *args))))
        dist.barrier()
    except BaseException:
        results.put((rank, (traceback.format_exc(), None)))
