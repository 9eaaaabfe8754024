"""Peak memory of a system: its own weights, and what one batch adds to them at its peak.

Several systems are loaded at once so that they can take turns, so neither the device's nor the process's
total says what one of them needs. Weights are counted by their bytes. What generation adds is measured: on a
GPU by the peak of PyTorch's allocator, on Linux by the peak of the resident set, which the kernel resets on
request; freed heap is handed back first, or the batch would grow into it unseen. Where neither is possible
nothing is reported.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.systems import EvaluatedSystem

NOT_MEASURED = {"bytes": None, "weight_bytes": None, "method": None}
_PROCESS = Path("/proc/self")


def peak_memory(system: EvaluatedSystem, batch: Sequence[str], *, max_new_tokens: int) -> dict[str, Any]:
    """Measure the peak memory of a batch of exactly `max_new_tokens` tokens.

    Returns:
        `bytes` (weights plus the batch's peak), `weight_bytes`, and `method`; all null where it cannot be
        measured.
    """
    device = getattr(system, "device", None)
    on_gpu = device is not None and device.type == "cuda"
    if not on_gpu and not _can_reset_peak():
        return dict(NOT_MEASURED)
    system.generate(batch, max_new_tokens=1)  # copies of weights are made, and weights that a file backs are read
    made = getattr(system, "__dict__", {})
    for name in made.keys() & {"engine", "verified_engine", "_prompt_pass"}:
        made[name].forget()  # caches and graphs of earlier calls, in which the batch would find room
    added_on, what = (_added_on_gpu, "CUDA allocator") if on_gpu else (_added_on_cpu, "resident set")
    added, weights = added_on(system, batch, max_new_tokens), weight_bytes(system)
    method = f"weights + peak growth of the {what}, batch {len(batch)}"
    return {"bytes": weights + added, "weight_bytes": weights, "method": method}


def weight_bytes(system: EvaluatedSystem) -> int:
    """Count the bytes that a system's weights take, once each; 0 for a system without a torch module.

    Those of a system that drafts for it count too, and the copies of weights that engines and encoders have.
    """
    from llmslm.generation.memory import weight_bytes as with_copies

    owners: list[Any] = [system, getattr(system, "draft", None)]
    models = [owner.model for owner in owners if hasattr(owner, "model")]
    copies = [
        with_copies(engine.model, engine.decoder) - _stored_bytes([engine.model])
        for engine in _engines(system)
        if engine.decoder is not None
    ]
    prompt_pass = getattr(system, "__dict__", {}).get("_prompt_pass")
    if prompt_pass is not None and prompt_pass.stack is not None:
        encoder = prompt_pass.model.encoder
        copies.append(with_copies(encoder, prompt_pass.stack) - _stored_bytes([encoder]))
    return _stored_bytes(models) + sum(copies)


def _stored_bytes(models: Sequence[Any]) -> int:
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _engines(system: EvaluatedSystem) -> list[Any]:
    """Find the decode engines that a system has made so far."""
    made = getattr(system, "__dict__", {})
    if "verified_engine" in made:
        return list(made["verified_engine"].engines)
    return [made["engine"]] if "engine" in made else []


def _added_on_gpu(system: EvaluatedSystem, batch: Sequence[str], max_new_tokens: int) -> int:
    import torch

    device = getattr(system, "device", None)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    system.generate(batch, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens)
    return int(torch.cuda.max_memory_allocated(device) - before)


def _added_on_cpu(system: EvaluatedSystem, batch: Sequence[str], max_new_tokens: int) -> int:
    ctypes.CDLL(None).malloc_trim(0)
    _reset_peak()
    before = resident_bytes()
    system.generate(batch, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens)
    return max(0, _status_bytes("VmHWM") - before)


def _can_reset_peak() -> bool:
    try:
        _reset_peak()
    except OSError:
        return False
    return hasattr(ctypes.CDLL(None), "malloc_trim")


def _reset_peak() -> None:
    """Make the kernel forget the highest resident set so far (Linux, proc(5))."""
    (_PROCESS / "clear_refs").write_text("5", encoding="ascii")


def resident_bytes() -> int:
    """Bytes of this process that lie in memory (Linux)."""
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    for line in (_PROCESS / "status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0
