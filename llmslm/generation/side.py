"""One model of a verified pair, after its prompt: it reads tokens at each row's own place and can take them back."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmslm.generation.block import BlockStep
from llmslm.generation.dispatch import step_for
from llmslm.generation.graphs import Captured
from llmslm.generation.plan import Decoder
from llmslm.generation.state import DecodeState
from llmslm.generation.step import TorchStep, fill_cross_cache

_WIDTHS = (1, 2, 5, 9, 17)  # of blocks where shapes are fixed


class Side:
    """A decoder over caches that hold its prompt. Token 0 of each row is its start; new tokens count from 1.

    Args:
        decoder: the model's decoder.
        batch: rows.
        capacity: positions, prompt and tokens that may be taken back included.
        encoder_capacity: positions of the encoder's states; 0 for decoder-only models.
        fixed: whether a few shapes must do for all blocks, and all of the caches is looked at, as CUDA graphs want it.
    """

    def __init__(self, decoder: Decoder, batch: int, capacity: int, encoder_capacity: int, *, fixed: bool) -> None:
        device = decoder.embedding.device
        self.decoder, self.fixed = decoder, fixed
        self.state = DecodeState(
            decoder.shape,
            batch=batch,
            capacity=capacity,
            encoder_capacity=encoder_capacity,
            mode="plain",
            penalise=False,
            device=device,
            dtype=decoder.embedding.dtype,
        )
        self.state.valid.fill_(True)
        self.first_logits: Tensor | None = None
        """(batch, vocabulary) of the first new token, where the prompt's pass gave them."""
        self.base = torch.zeros(batch, dtype=torch.long, device=device)
        """(batch,) positions of the tokens 0."""
        self.start: Tensor | None = None
        """(batch,) ids of the tokens 0; None where they have no id and have been read."""
        self._prompt_length = 1
        self._block = BlockStep(decoder, self.state)
        self._captured = Captured(functools.partial(self._block.read, length=capacity), device)

    def take_prompt(self, past: Any, mask: Tensor, prompt_ids: Tensor | None = None) -> None:
        """Begin from a decoder-only model's pass over right-padded prompts.

        Args:
            past: the pass's cache, (batch, kv_heads, prompt_len, head_dim) keys and values a layer.
            mask: (batch, prompt_len), 1 = a real token.
            prompt_ids: (batch, prompt_len); None where the prompt was not read as ids.
        """
        length = self._prompt_length = mask.shape[1]
        for index, layer in enumerate(past.layers):
            self.state.cache[index, 0, :, :, :length].copy_(layer.keys)
            self.state.cache[index, 1, :, :, :length].copy_(layer.values)
        self.base = mask.sum(dim=1) - 1
        self.start = None if prompt_ids is None else prompt_ids.gather(1, self.base[:, None])[:, 0]

    def take_states(self, states: Tensor, mask: Tensor, start_token: int) -> None:
        """Begin an encoder-decoder model's decoding from its encoder's states (batch, prompt_len, width)."""
        fill_cross_cache(self.decoder, self.state, states)
        self.state.encoder_valid.fill_(False)
        self.state.encoder_valid[:, : mask.shape[1]].copy_(mask.bool())
        self.start = torch.full_like(self.base, start_token)

    @property
    def first_index(self) -> int:
        """The first token that can be read."""
        return 0 if self.start is not None else 1

    def read(self, tokens: Tensor, index: Tensor, largest: int) -> Tensor:
        """Read the tokens of these indices; logits (batch, new, vocabulary) of what follows each, until the next call.

        Args:
            tokens: (batch, new).
            index: (batch, new), consecutive along a row.
            largest: no index is above it.
        """
        if self.start is not None:
            tokens = torch.where(index == 0, self.start[:, None], tokens)
        # A token that this model does not know is read as its last one: only a draft's chance suffers.
        tokens, positions = tokens.clamp(max=self.decoder.embedding.shape[0] - 1), index + self.base[:, None]
        new, on_cuda = tokens.shape[1], tokens.device.type == "cuda"
        if tokens.numel() == 1 or (new == 1 and on_cuda):
            return self._read_one(tokens, positions)
        if not self.fixed:
            return self._block.read(tokens, positions, self._prompt_length + largest)
        more = next(width for width in _WIDTHS if width >= new) - new
        behind = positions[:, -1:] + torch.arange(1, more + 1, device=tokens.device)
        logits: Tensor = self._captured(F.pad(tokens, (0, more)), torch.cat([positions, behind], dim=1))
        return logits[:, :new]

    def _read_one(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Read a token a row by the engine's step, which on the CPU wants all rows at one place: there is one row."""
        state = self.state
        state.token.copy_(tokens[:, 0])
        for place in (state.position, state.slot):
            place.copy_(positions[:, 0])
        if state.device.type == "cuda":
            logits: Tensor = self._captured_step()
            return logits[:, None]
        return self._step.logits(int(positions))[:, None]

    @functools.cached_property
    def _step(self) -> TorchStep:
        return step_for(self.decoder, self.state)

    @functools.cached_property
    def _captured_step(self) -> Captured:
        return Captured(functools.partial(self._step.logits, 0), self.state.device)
