"""The largest batch that fits beside what is loaded, as far as the decode engine can foretell it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evaluation.systems import EvaluatedSystem, decoded_by_engine

if TYPE_CHECKING:
    from llmslm.system import System

_USED = 0.9
"""Of the memory that is free: what libraries set aside is not foretold."""


def largest_batch(system: EvaluatedSystem, prompts: Sequence[str], max_new_tokens: int) -> int | None:
    """Return the largest power of two that fits, at most the number of prompts.

    Fitting is foretold for rows as long as the longest prompt, and on a GPU tried.

    Args:
        system: any; None is returned of one that does not decode by the engine, which alone foretells what it needs.
        prompts: of which batches are made.
        max_new_tokens: that every row gets.
    """
    decoded = decoded_by_engine(system)
    if decoded is None:
        return None
    lengths = [sum(map(len, row.values())) for row in decoded.codec.encode(prompts)]
    longest = prompts[lengths.index(max(lengths))]
    size = _foretold(decoded, longest, len(prompts), max_new_tokens)
    while decoded.device.type == "cuda" and size > 1 and not _runs(decoded, [longest] * size, max_new_tokens):
        size //= 2
    return size


def _foretold(system: "System", prompt: str, most: int, max_new_tokens: int) -> int:
    """Double the batch while what it needs is free."""
    from llmslm.generation.memory import available_bytes

    free, size = available_bytes(system.device), 1
    while free is not None and 2 * size <= most:
        memory = system.predicted_memory([prompt] * (2 * size), max_new_tokens)
        if memory is None or memory.added > _USED * free:
            break
        size *= 2
    return size


def _runs(system: "System", prompts: list[str], max_new_tokens: int) -> bool:
    import torch

    from llmslm.errors import UserError

    try:
        system.generate(prompts, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens)
    except (torch.OutOfMemoryError, UserError):
        system.engine.forget()
        torch.cuda.empty_cache()
        return False
    return True
