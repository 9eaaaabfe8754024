"""One model of a verified pair, after its prompt: it reads tokens at each row's own place and can take them back."""

import functools
from typing import Any

import torch
from torch import Tensor

from llmslm.generation.block import BlockStep
from llmslm.generation.dispatch import step_for
from llmslm.generation.plan import Decoder
from llmslm.generation.state import DecodeState
from llmslm.generation.step import TorchStep, fill_cross_cache


class Side:
    """A decoder over caches that hold its prompt. Token 0 of each row is its start; new tokens count from 1.

    Args:
        decoder: the model's decoder.
        state: caches of this batch.
        base: (batch,) positions of the tokens 0.
        start: (batch,) ids of the tokens 0; None where they have no id and have been read.
        prompt_positions: what the largest base can be.
    """

    def __init__(
        self, decoder: Decoder, state: DecodeState, base: Tensor, start: Tensor | None, prompt_positions: int
    ) -> None:
        self.state, self.base, self.start, self.prompt_positions = state, base, start, prompt_positions
        self.known, self.bytes_read = decoder.embedding.shape[0], decoder.decoding_bytes()
        self.first_logits: Tensor | None = None
        self._block = BlockStep(decoder, state)
        self._decoder = decoder
        state.valid.fill_(True)

    def read(self, tokens: Tensor, index: Tensor, largest: int) -> Tensor:
        """Read the tokens of these indices; logits (batch, new, vocabulary) of what follows each.

        Args:
            tokens: (batch, new).
            index: (batch, new), consecutive along a row.
            largest: no index is above it.
        """
        if self.start is not None:
            tokens = torch.where(index == 0, self.start[:, None], tokens)
        # A token that this model does not know is read as its last one: only a draft's chance suffers.
        tokens, positions = tokens.clamp(max=self.known - 1), index + self.base[:, None]
        if tokens.numel() > 1 or tokens.device.type != "cpu":
            return self._block.read(tokens, positions, self.prompt_positions + largest + 1)
        self.state.token.copy_(tokens[:, 0])
        self.state.position.copy_(positions[:, 0])
        return self._single.logits(int(positions))[:, None]

    @functools.cached_property
    def _single(self) -> TorchStep:
        """The step for one token, faster than a block of one; on CUDA, and with more rows, it wants other caches."""
        return step_for(self._decoder, self.state)

    @property
    def first_index(self) -> int:
        """The first token that can be read."""
        return 0 if self.start is not None else 1


def causal_side(decoder: Decoder, past: Any, mask: Tensor, places: int, prompt_ids: Tensor | None = None) -> Side:
    """Take over the cache of a decoder-only model's pass over right-padded prompts.

    Args:
        decoder: of the model.
        past: the pass's cache, (batch, kv_heads, prompt_len, head_dim) keys and values a layer.
        mask: (batch, prompt_len), 1 = a real token.
        places: number of new tokens to make room for.
        prompt_ids: (batch, prompt_len); None where the prompt was not read as ids.
    """
    batch, length = mask.shape
    state = _state(decoder, batch, length + places, 0, mask.device)
    for index, layer in enumerate(past.layers):
        state.cache[index, 0, :, :, :length].copy_(layer.keys)
        state.cache[index, 1, :, :, :length].copy_(layer.values)
    base = mask.sum(dim=1) - 1
    start = None if prompt_ids is None else prompt_ids.gather(1, base[:, None])[:, 0]
    return Side(decoder, state, base, start, length - 1)


def encoded_side(decoder: Decoder, states: Tensor, mask: Tensor, places: int, start_token: int) -> Side:
    """Begin an encoder-decoder model's decoding from its encoder's states (batch, prompt_len, width)."""
    batch, length = mask.shape
    state = _state(decoder, batch, places, length, mask.device)
    fill_cross_cache(decoder, state, states)
    state.encoder_valid.copy_(mask.bool())
    base = torch.zeros(batch, dtype=torch.long, device=mask.device)
    return Side(decoder, state, base, torch.full_like(base, start_token), 0)


def _state(decoder: Decoder, batch: int, capacity: int, encoder_capacity: int, device: torch.device) -> DecodeState:
    return DecodeState(
        decoder.shape,
        batch=batch,
        capacity=capacity,
        encoder_capacity=encoder_capacity,
        mode="plain",
        penalise=False,
        device=device,
        dtype=decoder.embedding.dtype,
    )
