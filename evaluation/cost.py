"""What a token costs apart from the clock: operations, energy, and the time that reading the weights takes at least."""

import copy
import math
import time
from collections.abc import Sequence
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Any

from evaluation.floor import copy_bandwidth, floor_s
from evaluation.systems import EvaluatedSystem, decoded_by_engine

if TYPE_CHECKING:
    import torch

NOT_MEASURED: dict[str, float | None] = dict.fromkeys(
    ("first_token_flops", "token_flops", "token_joules", "copy_bandwidth_bytes_per_s")
)
COUNTED_TOKENS = 16
_SEEN = 0.1  # of one operation a weight; a decoder does two, one that the counter cannot see next to none
_ENERGY_S = 3.0  # the driver counts energy in steps of about 0.1 s


def measure_cost(system: EvaluatedSystem, prompts: Sequence[str], max_new_tokens: int) -> dict[str, float | None]:
    """Measure what a token of a system costs, batch 1; nulls where that cannot be told, as outside of PyTorch.

    Returns:
        `first_token_flops`, `token_flops`, `token_joules` and `copy_bandwidth_bytes_per_s`.
    """
    device = getattr(system, "device", None)
    if device is None or not hasattr(system, "model"):
        return dict(NOT_MEASURED)
    joules = token_joules(system, prompts[:1], max_new_tokens)
    bandwidth = _bandwidth(device)
    return token_flops(system, prompts[0]) | {"token_joules": joules, "copy_bandwidth_bytes_per_s": bandwidth}


def token_flops(system: EvaluatedSystem, prompt: str) -> dict[str, float | None]:
    """Count floating-point operations by PyTorch's counter; nulls where it sees no work.

    A system with a decode engine is counted by `generate()`, which does the same sums: the engine's own kernels are
    none that PyTorch could count. The verified mode, which `generate()` has not, is not counted.

    Returns:
        `first_token_flops`, the prompt's included, and `token_flops` of each further one.
    """
    if hasattr(system, "verified_engine"):
        return {"first_token_flops": None, "token_flops": None}
    system = copy.copy(system)
    if hasattr(system, "decoder"):
        system.decoder = "generate"
    first = _flops(system, prompt, 1)
    further = (_flops(system, prompt, COUNTED_TOKENS) - first) / (COUNTED_TOKENS - 1)
    seen = further > _SEEN * system.parameters().get("decoding", 0)
    return {"first_token_flops": first if seen else None, "token_flops": further if seen else None}


def _flops(system: EvaluatedSystem, prompt: str, tokens: int) -> float:
    """Count the operations of exactly so many tokens; NaN of a system that produces fewer."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # it does not know the products that a CPU reads prompts by, nor every fused kernel of attention
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    known = {product: _product_flops} if product is not None else {}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=known) as counter:
        made = system.generate([prompt], max_new_tokens=tokens, min_new_tokens=tokens)
    return counter.get_total_flops() if made[0].tokens == tokens else math.nan


def _product_flops(x: Sequence[int], weight: Sequence[int], *_rest: Any, **_settings: Any) -> int:
    """Count a product of shape (..., in) with a matrix (out, in)."""
    return 2 * math.prod(x) * weight[0]


def token_joules(system: EvaluatedSystem, prompts: Sequence[str], max_new_tokens: int) -> float | None:
    """Measure the GPU's energy for each token at fixed length, what it draws at rest included.

    None without a GPU whose driver counts energy, or without the package nvidia-ml-py.
    """
    device = getattr(system, "device", None)
    if device is None or device.type != "cuda":
        return None
    joules = _meter(device)
    if joules is None:
        return None
    start, before, tokens = time.perf_counter(), joules(), 0
    while time.perf_counter() - start < _ENERGY_S:
        made = system.generate(prompts, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens)
        tokens += sum(each.tokens for each in made)
    return (joules() - before) / tokens


def _meter(device: "torch.device") -> Any:
    """Return a function that reads the joules that a GPU has used since the driver was loaded; None if it cannot."""
    import torch

    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # by its own name: CUDA_VISIBLE_DEVICES renumbers the devices for PyTorch alone
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None

    def joules() -> float:
        torch.cuda.synchronize(device)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000

    return joules


def token_floor_s(system: EvaluatedSystem, batches: Sequence[Sequence[str]], max_new_tokens: int) -> float | None:
    """Return the least time a token can take: weights and filled caches read once, at the measured copy bandwidth.

    None for a system that does not decode by the engine, token by token.

    Args:
        system: the system.
        batches: of prompts, equally many in each; the floor is the mean over them.
        max_new_tokens: produced at fixed length.
    """
    decoded = decoded_by_engine(system)
    if decoded is None:
        return None
    lengths = [int(decoded.prefill(batch)["attention_mask"].sum(dim=1).max()) for batch in batches]
    bandwidth = _bandwidth(decoded.device)
    return fmean(floor_s(decoded.engine, len(batches[0]), length, max_new_tokens, bandwidth) for length in lengths)


@cache
def _bandwidth(device: "torch.device") -> float:
    return copy_bandwidth(device)
