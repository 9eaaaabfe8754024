"""Measures arms side by side: times of the first and of all tokens, and the peak of memory beside its prediction."""

import functools
from typing import Any

import torch

from evaluation.decoding.arms import Arms, Run
from evaluation.decoding.clock import seconds, synchronise
from evaluation.speed import percentiles
from llmslm.generation.engine import DecodeEngine
from llmslm.generation.memory import Front, LiveBytes, Memory, predict, predict_with

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
    engine, device = arms.engine(system), arms.batch.ids.device
    if engine.decoder is None:
        return {}
    engine.forget()
    predicted = _predicted(arms, system, engine, new)
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


def _predicted(arms: Arms, system: str, engine: DecodeEngine, new: int) -> Memory:
    """What the engine says of itself, and of what comes in front of it in llm_to_slm."""
    (batch, length), decoder = arms.batch.ids.shape, engine.decoder
    assert decoder is not None
    if system != "llm_to_slm":
        return predict(engine.model, decoder, engine.call_sizes(batch, length, new))
    module = arms.models.front()
    front = Front(module, "forward", {"ids": arms.batch.ids, "mask": arms.batch.mask})
    call_of = functools.partial(engine.call_sizes, batch, max_new_tokens=new, embedded=True)
    return predict_with(front, call_of, engine.model, decoder)[0]
