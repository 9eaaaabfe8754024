"""What a decode step reads and writes: static caches, positions, the tokens so far; and its size rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from llmslm.generation.words import StepWords

if TYPE_CHECKING:
    from llmslm.generation.sampling import Sampling


@dataclass(frozen=True)
class CacheShape:
    """Sizes of one model's caches: layers, heads of keys and values, their width, the vocabulary."""

    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    cross_heads: int = 0

    def bytes(self, batch: int, capacity: int, encoder_capacity: int, element_size: int) -> int:
        """Bytes of keys and values for this many rows and positions."""
        positions = self.kv_heads * capacity + self.cross_heads * encoder_capacity
        return 2 * self.layers * batch * positions * self.head_dim * element_size


def prompt_bucket(length: int) -> int:
    """Length that a prompt is padded to on an accelerator, so that few graphs serve all lengths."""
    width = 32 if length <= 256 else 128
    return -(-length // width) * width


def padded_batch(batch: dict[str, Tensor], length: Callable[[str, int], int], *, left: bool) -> dict[str, Tensor]:
    """Pad the prompts of a composition's batch, (rows, tokens, ...) each.

    Args:
        batch: of the codec, by name.
        length: what a tensor's name and tokens are padded to.
        left: whether the slm's own side is padded on the left, as decoder-only models want it.
    """
    padded = {}
    for name, value in batch.items():
        missing = length(name, value.shape[1]) - value.shape[1]
        sides = (missing, 0) if left and name in ("input_ids", "attention_mask") else (0, missing)
        padded[name] = F.pad(value, (0, 0, *sides) if value.dim() == 3 else sides) if missing else value
    return padded


def capacity_bucket(length: int) -> int:
    """Positions of a cache that must hold `length`: a power of two, since a step reads only what is filled."""
    return max(256, 1 << (length - 1).bit_length())


class DecodeState:
    """All that changes from token to token, in buffers that keep their place for as long as a graph uses them.

    Args:
        shape: the model's cache sizes.
        batch: rows.
        capacity: positions of the self-attention cache, prompt included.
        encoder_capacity: positions of the cross-attention cache; 0 for decoder-only models.
        mode: "plain", "greedy" or "sampled", see `TokenRules.mode`.
        penalise: whether tokens seen so far are kept, for a repetition penalty.
        device: where it lies.
        dtype: of keys and values.
    """

    def __init__(
        self,
        shape: CacheShape,
        *,
        batch: int,
        capacity: int,
        encoder_capacity: int,
        mode: str,
        penalise: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.batch, self.capacity, self.encoder_capacity, self.mode = batch, capacity, encoder_capacity, mode
        self.device = device
        wide = (shape.layers, 2, batch, shape.kv_heads, capacity, shape.head_dim)
        # Zeros, not empty: a masked position's weight of 0 times an uninitialised NaN would be NaN.
        self.cache = torch.zeros(wide, device=device, dtype=dtype)
        cross = (shape.layers if encoder_capacity else 0, 2, batch, shape.cross_heads, encoder_capacity)
        self.cross = torch.zeros((*cross, shape.head_dim), device=device, dtype=dtype)
        self.valid = torch.zeros(batch, capacity, device=device, dtype=torch.bool)
        self.encoder_valid = torch.zeros(batch, encoder_capacity, device=device, dtype=torch.bool)

        def counter(dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(batch, device=device, dtype=dtype)

        self.token, self._counters = counter(), torch.zeros(3, batch, device=device, dtype=torch.long)
        self.position, self.slot, self.step = self._counters
        self.finished = counter(torch.bool)
        self.out = torch.zeros(batch, capacity, device=device, dtype=torch.long)
        self.seen = torch.zeros(batch, shape.vocabulary, device=device, dtype=torch.bool) if penalise else None
        self.min_new = torch.zeros((), device=device, dtype=torch.long)
        self.max_new = torch.zeros((), device=device, dtype=torch.long)
        self.temperature = torch.ones((), device=device)
        self.top_k = torch.zeros((), device=device, dtype=torch.long)
        self.top_p = torch.ones((), device=device)
        self.penalty = torch.ones((), device=device)
        self.generator = torch.Generator(device=device)
        self._asked: tuple[int, int, float] | None = None

    @functools.cached_property
    def words(self) -> StepWords:
        """What the device tells the host of its tokens; made where a loop runs ahead of the host's looks."""
        return StepWords(self.batch, self.capacity, self.device)

    def ask(self, *, min_new: int, max_new: int, sampling: Sampling | None, penalty: float) -> None:
        """Note what a call wants; what the last one wanted, too, is there already."""
        asked = (min_new, max_new, penalty)
        if asked != self._asked:
            self.min_new.fill_(min_new)
            self.max_new.fill_(max_new)
            self.penalty.fill_(penalty)
            self._asked = asked
        if sampling is not None and self.mode == "sampled":
            self.temperature.fill_(sampling.temperature)
            self.top_k.fill_(sampling.top_k or torch.iinfo(torch.long).max)
            self.top_p.fill_(sampling.top_p)
            self.generator.manual_seed(sampling.seed)

    def forget(self) -> None:
        """Forget the last call's tokens; positions and caches are set by the prefill."""
        self._counters.zero_()
        self.finished.zero_()
        self.valid.fill_(True)
        if self.seen is not None:
            self.seen.zero_()

    def advance(self, token: Tensor, *, eos: Tensor, pad: int) -> None:
        """Take `token` (batch,) as each row's next one; rows that have ended take `pad` and stay where they are."""
        token = torch.where(self.finished, pad, token)
        self.out.scatter_(1, self.step[:, None], token[:, None])
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        if eos.numel():
            self.finished |= (token[:, None] == eos).any(dim=1)
        self.token.copy_(token)
        self.step += 1

    def move_on(self) -> None:
        """The last token has been read: the next one has the next place."""
        self.slot += 1
        self.position += 1

    def tokens(self, ends: Sequence[int], max_new: int) -> Tensor:
        """The tokens produced, (batch, new_len) on the CPU: up to the last one that any row needed."""
        out = self.out[:, :max_new].cpu()
        if not ends:
            return out.clone()
        ended = torch.isin(out, torch.tensor(ends))
        first = torch.where(ended.any(dim=1), ended.int().argmax(dim=1), max_new - 1)
        return out[:, : int(first.max()) + 1].clone()
