"""The least time that decoding can take: bytes of weights and filled caches over the bandwidth of a large copy."""

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from llmslm.generation.engine import DecodeEngine


def copy_bandwidth(device: "torch.device") -> float:
    """Measure bytes per second, read and written, of a large copy: the quickest of 10, for it is a bound."""
    import torch

    size = 2**31 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(11):
        _synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size / min(seconds[1:])


def floor_s(engine: "DecodeEngine", batch: int, prompt: int, new: int, bandwidth: float) -> float:
    """Return the seconds that a token takes at least, on average over the tokens; NaN for a model it cannot read.

    Args:
        engine: of the model that decodes.
        batch: rows decoded at a time.
        prompt: tokens of each prompt.
        new: tokens produced.
        bandwidth: bytes per second.
    """
    decoder = engine.decoder
    if decoder is None:
        return math.nan
    size = decoder.embedding.element_size()
    crossed = bool(decoder.crosses)
    filled = new // 2 + (0 if crossed else prompt)
    return (decoder.decoding_bytes() + decoder.shape.bytes(batch, filled, prompt if crossed else 0, size)) / bandwidth


def _synchronize(device: "torch.device") -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
