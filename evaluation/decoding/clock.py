"""The clock of the measurements, and the bandwidth that their floor is reckoned with."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes, the device synchronised around it."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def bandwidth(device: torch.device) -> float:
    """Bytes per second: of a large copy, read and written, on a GPU; of reading on the CPU. The median of 10.

    A copy on a CPU may read what it writes, so that its bytes are not known; a decode step reads.
    """
    size = 2**31 if device.type == "cuda" else 2**28
    source = torch.ones(size // 4, device=device)
    if device.type == "cuda":
        target = torch.empty_like(source)
        times = [seconds(lambda: target.copy_(source), device) for _ in range(11)]
        return 2 * size / statistics.median(times[1:])
    return size / statistics.median([seconds(source.sum, device) for _ in range(11)][1:])
