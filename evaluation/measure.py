"""What a system costs to run: times, memory and floor by batch size; operations and energy of a token."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation import cost
from evaluation.memory import peak_memory
from evaluation.speed import BatchSize, batches, measure_speed
from evaluation.systems import EvaluatedSystem

NOT_MEASURED: Mapping[str, Any] = {
    "speed": [],
    **dict.fromkeys(("ttft_s", "tpot_s", "tokens_per_s", "peak_memory_bytes")),
    "peak_memory": {"weight_bytes": None, "method": None},
    "cost": cost.NOT_MEASURED,
}
"""The same fields of a system that is not timed."""


def measure(
    systems: Sequence[EvaluatedSystem],
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_sizes: Sequence[BatchSize],
    warmups: int,
    runs: int,
) -> dict[str, dict[str, Any]]:
    """Measure systems side by side.

    Args:
        systems: all that are compared.
        prompts: what they are timed on.
        max_new_tokens: budget at natural length, length of the fixed mode.
        batch_sizes: see `measure_speed`.
        warmups: rounds that are not counted.
        runs: rounds that are; 0 measures nothing.

    Returns:
        By system, the fields of its record; nothing where nothing was asked for.
    """
    if not runs:
        return {}
    by_name = {system.name: system for system in systems}
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_sizes": batch_sizes}
    speed = measure_speed(by_name, prompts, **sizes, warmups=warmups, runs=runs)
    return {name: _fields(system, prompts, speed[name], max_new_tokens) for name, system in by_name.items()}


def _fields(
    system: EvaluatedSystem, prompts: Sequence[str], entries: list[dict[str, Any]], max_new_tokens: int
) -> dict[str, Any]:
    fixed = sorted((entry for entry in entries if entry["mode"] == "fixed"), key=lambda entry: entry["batch_size"])
    memory: dict[str, Any] = {"weight_bytes": None, "method": None}
    for entry in reversed(fixed):  # the smallest batch comes last: its method stands in the record
        timed = batches(prompts, entry["batch_size"], entry["runs"])
        entry["floor_s"] = cost.token_floor_s(system, timed, max_new_tokens)
        memory = peak_memory(system, max(timed, key=lambda batch: max(map(len, batch))), max_new_tokens=max_new_tokens)
        entry["peak_memory_bytes"] = memory.pop("bytes")
    first = min(entries, key=lambda entry: (entry["batch_size"], entry["mode"] == "fixed"), default=None)
    return {
        "speed": entries,
        "ttft_s": first["ttft_s"]["p50"] if first else None,
        "tpot_s": first["tpot_s"]["p50"] if first else None,
        "tokens_per_s": first["tokens_per_s"] if first else None,
        "peak_memory_bytes": fixed[0]["peak_memory_bytes"] if fixed else None,
        "peak_memory": memory,
        "cost": cost.measure_cost(system, prompts, max_new_tokens),
    }
