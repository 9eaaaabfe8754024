"""One model of a verified pair, after its prompt: it reads tokens at each row's own place and can take them back."""

import functools

import torch
from torch import Tensor

from llmslm.generation.dispatch import block_step_for, step_for
from llmslm.generation.plan import Decoder
from llmslm.generation.prefill import Passed
from llmslm.generation.state import DecodeState
from llmslm.generation.step import TorchStep, fill_cross_cache


class Side:
    """A decoder over caches that hold its prompt. Token 0 of each row is its start; new tokens count from 1.

    All buffers keep their place, as CUDA graphs want it.

    Args:
        decoder: the model's decoder.
        batch: rows.
        capacity: positions, prompt and tokens that may be taken back included.
        encoder_capacity: positions of the encoder's states; 0 for decoder-only models.
        first_index: the first token that can be read: 1 where the tokens 0 have no id.
    """

    def __init__(
        self, decoder: Decoder, batch: int, capacity: int, encoder_capacity: int, *, first_index: int = 0
    ) -> None:
        self.decoder, device, dtype = decoder, decoder.embedding.device, decoder.embedding.dtype
        self.state = DecodeState(
            decoder.shape,
            batch=batch,
            capacity=capacity,
            encoder_capacity=encoder_capacity,
            mode="plain",
            penalise=False,
            device=device,
            dtype=dtype,
        )
        self.state.valid.fill_(True)
        self.state.encoder_valid.fill_(True)
        self.base = torch.zeros(batch, dtype=torch.long, device=device)
        """(batch,) positions of the tokens 0."""
        self.start = torch.zeros_like(self.base)
        """(batch,) ids of the tokens 0."""
        self.first_index = first_index
        self.next_logits = torch.zeros(batch, decoder.head.weight.shape[0], dtype=dtype, device=device)
        """(batch, vocabulary) of what follows the last token known, where this is kept."""
        self.block_step = block_step_for(decoder, self.state)
        self._prompt_length = 1

    def take_prompt(self, passed: Passed, mask: Tensor, prompt_ids: Tensor | None = None) -> None:
        """Begin from a decoder-only model's pass over right-padded prompts.

        Args:
            passed: what it gave; it may have filled this side's own cache.
            mask: (batch, prompt_len), 1 = a real token.
            prompt_ids: (batch, prompt_len); None where the prompt was not read as ids.
        """
        length = self._prompt_length = mask.shape[1]
        assert passed.cache is not None
        if passed.cache is not self.state.cache:
            for index, (keys, values) in enumerate(passed.cache):
                self.state.cache[index, 0, :, :, :length].copy_(keys)
                self.state.cache[index, 1, :, :, :length].copy_(values)
        self.next_logits.copy_(passed.last)
        self.base.copy_(mask.sum(dim=1) - 1)
        if prompt_ids is not None:
            self.start.copy_(prompt_ids.gather(1, self.base[:, None])[:, 0])

    def take_states(self, states: Tensor, mask: Tensor, start_token: int) -> None:
        """Begin an encoder-decoder model's decoding from its encoder's states (batch, prompt_len, width)."""
        fill_cross_cache(self.decoder, self.state, states)
        self.state.encoder_valid.fill_(False)
        self.state.encoder_valid[:, : mask.shape[1]].copy_(mask.bool())
        self.start.fill_(start_token)

    def read(self, tokens: Tensor, index: Tensor, largest: int | None = None) -> Tensor:
        """Read the tokens of these indices; logits (batch, new, vocabulary) of what follows each, until the next call.

        Args:
            tokens: (batch, new).
            index: (batch, new), consecutive along a row.
            largest: no index is above it, where the host knows one; the caches are looked at no farther.
        """
        tokens = torch.where(index == 0, self.start[:, None], tokens)
        # A token that this model does not know is read as its last one: only a draft's chance suffers.
        tokens, positions = tokens.clamp(max=self.decoder.embedding.shape[0] - 1), index + self.base[:, None]
        if tokens.numel() == 1 and tokens.device.type == "cpu":
            return self._read_one(tokens, positions)
        length = self.state.capacity if largest is None else self._prompt_length + largest
        return self.block_step.read(tokens, positions, length)

    def _read_one(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Read one token of one row by the engine's step, the faster one."""
        state = self.state
        state.token.copy_(tokens[:, 0])
        for place in (state.position, state.slot):
            place.copy_(positions[:, 0])
        return self._step.logits(int(positions))[:, None]

    @functools.cached_property
    def _step(self) -> TorchStep:
        return step_for(self.decoder, self.state)
