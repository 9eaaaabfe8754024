"""Measures arms side by side: times of the first and of all tokens, and the peak of memory beside its prediction."""

from typing import Any

import torch

from evaluation.decoding.arms import Arms, Run
from evaluation.decoding.clock import seconds, synchronise
from evaluation.speed import percentiles
from llmslm.generation.memory import LiveBytes, predict

Row = dict[str, Any]


def measure(
    runs: dict[tuple[str, str], Run], new: int, warmups: int, repeats: int, device: torch.device
) -> dict[tuple[str, str], Row]:
    """Time a first token and all tokens, the runs in turns; seconds, by key of the run."""
    for run in runs.values():
        for _ in range(warmups):
            run(new)
        run(1)
    first: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    total: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            first[key].append(seconds(lambda run=run: run(1), device))  # type: ignore[misc]
            total[key].append(seconds(lambda run=run: run(new), device))  # type: ignore[misc]
    return {key: _times(first[key], total[key], new) for key in runs}


def _times(first: list[float], total: list[float], new: int) -> Row:
    per_token = [(end - start) / (new - 1) for start, end in zip(first, total, strict=True)]
    return {"ttft_s": percentiles(first), "tpot_s": percentiles(per_token), "total_s": percentiles(total)}


def memory(arms: Arms, system: str, new: int) -> Row:
    """Predict what a system on the engine adds to its weights at the peak, and measure it on a fresh engine state.

    On the CPU the bytes of tensors are counted, on CUDA those of PyTorch's allocator.
    """
    engine, ids, device = arms.engine(system), arms.batch.ids, arms.batch.ids.device
    if engine.decoder is None or system == "llm_to_slm":
        return {}
    engine.forget()
    batch, length = ids.shape
    predicted = predict(engine.model, engine.decoder, engine.call_sizes(batch, length, new))
    run = arms.run(system, "engine")
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(new)
        measured = torch.cuda.max_memory_allocated(device) - before
    else:
        with LiveBytes() as live:
            run(new)
        measured = live.peak
    whole = predicted.weights + measured
    return {
        "predicted_bytes": predicted.total,
        "measured_bytes": whole,
        "predicted_added_bytes": predicted.added,
        "measured_added_bytes": measured,
        "ratio": predicted.total / whole,
        "added_ratio": predicted.added / measured if measured else None,
    }
