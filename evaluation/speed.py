"""Speed and memory of systems that are compared: interleaved runs, two modes that are never mixed.

*fixed*: every prediction has exactly the same number of tokens, the cost of the machine. *natural*: the end
of sequence is allowed, what a user feels; it means little for a system that stops early, so the length ratio
stands beside it.

Time to the first token is that of tokenise, encode, project, prefill and first token. Time per output token
is (end - first token) / (n - 1), n the steps of the batch. The device is synchronised before a call and after it; the
first token is read when the system says that it is known. The systems take turns prompt by prompt, and the first rounds
are not counted: they take the prompts of those that are, so that nothing is compiled or captured for a length while the
clock counts.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from evaluation.largest_batch import largest_batch
from evaluation.systems import EvaluatedSystem

Mode = Literal["fixed", "natural"]
MODES: tuple[Mode, ...] = ("natural", "fixed")
WARM = 2
"""Uncounted rounds at most for what transformers decodes without compiling: it is slow, and captures nothing."""
LARGEST: Literal["largest"] = "largest"
BatchSize = int | Literal["largest"]
WARMUPS = 10
RUNS = 10


@dataclass
class Timings:
    """The measured runs of one system in one mode."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Tokens produced in each run, all rows together."""

    def add(self, timing: "Timing") -> None:
        """Keep one run; one of a single token says nothing of the time per further token."""
        self.ttft_s.append(timing.ttft_s)
        self.total_s.append(timing.total_s)
        self.tokens.append(timing.tokens)
        if timing.steps > 1:
            self.tpot_s.append((timing.total_s - timing.ttft_s) / (timing.steps - 1))

    def summary(self) -> dict[str, Any]:
        """Return percentiles of the times, and the throughput over all runs."""
        return {
            "ttft_s": percentiles(self.ttft_s),
            "tpot_s": percentiles(self.tpot_s),
            "total_s": percentiles(self.total_s),
            "tokens_per_s": sum(self.tokens) / sum(self.total_s),
            "tokens": sum(self.tokens),
        }


@dataclass(frozen=True)
class Timing:
    """One call of generate."""

    ttft_s: float
    total_s: float
    steps: int
    """Tokens of the longest row: the decoding steps that the batch took."""
    tokens: int
    """Tokens of all rows."""


def measure_speed(
    systems: Mapping[str, EvaluatedSystem],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_sizes: Sequence[BatchSize] = (1,),
    warmups: int = WARMUPS,
    runs: int = RUNS,
) -> dict[str, list[dict[str, Any]]]:
    """Time systems side by side.

    Args:
        systems: by name; all are loaded, so that they can take turns.
        prompts: each run takes the next `batch_size` of them, the same for every system; they are cycled.
        max_new_tokens: budget of the natural mode, length of the fixed mode.
        batch_sizes: each is measured in both modes; "largest" stands for each system's own, of `largest_batch`.
        warmups: rounds that are not counted; `WARM` at most where transformers decodes without a static cache.
        runs: rounds that are.

    Returns:
        Of each system, one entry a mode and batch size.
    """
    entries: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    sweep = [_sizes(systems, asked, prompts, max_new_tokens) for asked in batch_sizes]
    uncounted = {name: _warmups(system, warmups) for name, system in systems.items()}
    total = sum(uncounted[name] + runs for sizes in sweep for name in sizes for _ in MODES)
    with tqdm(total=total, desc="measure speed", unit="run", delay=1) as bar:
        for sizes, mode in product(sweep, MODES):
            timings = {name: Timings() for name in sizes}
            timed = {name: batches(prompts, size, runs) for name, size in sizes.items()}
            for turn in range(-warmups, runs):
                for name in sizes:
                    if turn < -uncounted[name]:
                        continue
                    timing = time_generate(systems[name], timed[name][turn % runs], max_new_tokens, mode)
                    if turn >= 0:
                        timings[name].add(timing)
                    bar.update()
            for name, size in sizes.items():
                settings = {"mode": mode, "batch_size": size, "max_new_tokens": max_new_tokens}
                entries[name].append(settings | {"warmups": uncounted[name], "runs": runs} | timings[name].summary())
    return entries


def _warmups(system: EvaluatedSystem, warmups: int) -> int:
    """Count the rounds before the clock; a static cache has transformers compile and capture for its sizes."""
    compiles = "cache_implementation" in getattr(system, "generation_settings", {})
    return min(warmups, WARM) if getattr(system, "decoder", None) == "generate" and not compiles else warmups


def batches(prompts: Sequence[str], batch_size: int, runs: int) -> list[list[str]]:
    """Deal prompts out to the runs of a measurement; they are cycled."""
    return [[prompts[(run * batch_size + row) % len(prompts)] for row in range(batch_size)] for run in range(runs)]


def _sizes(
    systems: Mapping[str, EvaluatedSystem], asked: BatchSize, prompts: Sequence[str], max_new_tokens: int
) -> dict[str, int]:
    """Return each system's batch size; systems of which the largest cannot be told are left out of that one."""
    if asked != LARGEST:
        return dict.fromkeys(systems, asked)
    found = {name: largest_batch(system, prompts, max_new_tokens) for name, system in systems.items()}
    return {name: size for name, size in found.items() if size is not None}


def time_generate(system: EvaluatedSystem, prompts: Sequence[str], max_new_tokens: int, mode: Mode) -> Timing:
    """Time one batch from its texts to its last token."""
    first: list[float] = []

    def mark() -> None:  # of a token that is known: to wait for what is launched behind it would count that, too
        first.append(time.perf_counter())

    synchronize(system)
    start = time.perf_counter()
    generations = system.generate(
        prompts,
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens if mode == "fixed" else 0,
        on_first_token=mark,
    )
    synchronize(system)
    end = time.perf_counter()
    counts = [generation.tokens for generation in generations]
    return Timing((first[0] if first else end) - start, end - start, max(counts), sum(counts))


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, p50, p90 and p99; nulls where nothing was measured."""
    if not values:
        return dict.fromkeys(("mean", "p50", "p90", "p99"))
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"mean": float(np.mean(values)), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def synchronize(system: EvaluatedSystem) -> None:
    """Wait until the system's accelerator has done what was asked of it; a CPU has always done so."""
    device = getattr(system, "device", None)
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
