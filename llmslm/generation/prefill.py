"""The prompt's single pass: it fills the caches of a state and gives the logits of the first new token."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslm.generation.plan import Decoder
from llmslm.generation.state import DecodeState
from llmslm.generation.step import fill_cross_cache
from llmslm.models.packing import additive_mask, document_mask


def causal_mask(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (batch, 1, length, length) of a left-padded prompt; `valid` (batch, length) is true where attended.

    Padding sees itself: a row that sees nothing would be NaN, and NaN reaches other rows through the values.
    """
    length = valid.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    seen = seen & valid[:, None, :] | torch.eye(length, dtype=torch.bool, device=valid.device)
    return additive_mask(seen, dtype)[:, None]


def prompt_positions(attention_mask: Tensor) -> Tensor:
    """Positions (batch, length) counted over attended tokens; padding on the left has position 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


class Passed(NamedTuple):
    """What a pass over right-padded prompts gives to verified decoding.

    states: (batch, prompt_len, width), of the layer that feeds a projector; None where none does.
    last: (batch, vocabulary), the logits of what follows each row; of an encoder-decoder's encoder its last states.
    cache: keys and values (batch, kv_heads, capacity, head_dim) of each layer; None of an encoder.
    """

    states: Tensor | None
    last: Tensor
    cache: Iterable[tuple[Tensor, Tensor]] | Tensor | None


class CausalPrefill:
    """The pass of a decoder-only model over its prompt.

    Args:
        model: the model as it came; its own forward is used, whatever its family.
        decoder: gives the dtype of masks.
        state: whose caches are filled.
    """

    def __init__(self, model: PreTrainedModel, decoder: Decoder, state: DecodeState) -> None:
        self.model, self.state = model, state
        self.dtype = decoder.embedding.dtype

    def __call__(self, prompt: Tensor, attention_mask: Tensor) -> Tensor:
        """Read ids (batch, length) or embeddings (batch, length, width), left-padded; logits (batch, vocabulary).

        The state stands at the prompt's last token, as behind a step.
        """
        state, length = self.state, attention_mask.shape[1]
        attended = attention_mask.long()
        positions = attended.cumsum(dim=1) - attended  # of what is left-padded, as `prompt_positions`
        logits = self.last_logits(prompt, attention_mask, positions)
        state.valid[:, :length].copy_(attention_mask)
        state.position.copy_(positions[:, -1])
        state.slot.fill_(length - 1)
        if state.seen is not None and prompt.dim() == 2:
            counts = torch.zeros_like(state.seen, dtype=torch.long).scatter_add_(1, prompt, attended)
            state.seen.copy_(counts > 0)
        return logits

    def last_logits(self, prompt: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Fill the caches; logits (batch, vocabulary) of what follows."""
        state, length = self.state, attention_mask.shape[1]
        name = "input_ids" if prompt.dim() == 2 else "inputs_embeds"
        output = self.model(
            **{name: prompt},
            attention_mask=causal_mask(attention_mask.bool(), self.dtype),
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        for index, layer in enumerate(output.past_key_values.layers):
            state.cache[index, 0, :, :, :length].copy_(layer.keys)
            state.cache[index, 1, :, :, :length].copy_(layer.values)
        logits: Tensor = output.logits[:, -1].contiguous()
        return logits


class EncodedPrefill:
    """What an encoder-decoder model does before its first token: encode if need be, then keys and values of the states.

    Args:
        model: the model as it came; its own encoder is used.
        decoder: has the cross-attentions.
        state: whose caches are filled.
        start: the token that decoding starts with.
    """

    def __init__(self, model: PreTrainedModel, decoder: Decoder, state: DecodeState, start: int) -> None:
        self.model, self.decoder, self.state, self.start = model, decoder, state, start

    def __call__(self, prompt: Tensor, attention_mask: Tensor) -> None:
        """Read ids (batch, length) or the encoder's states (batch, length, width); the mask's 1 means attend."""
        state = self.state
        if prompt.dim() == 2:
            encoder, seen = self.model.get_encoder(), attention_mask
            if state.device.type == "cuda":  # else a prompt without padding warms up other kernels than are captured
                documents = attention_mask.long() - 1
                seen = additive_mask(document_mask(documents, documents), self.decoder.embedding.dtype)
            prompt = encoder(input_ids=prompt, attention_mask=seen).last_hidden_state
        fill_cross_cache(self.decoder, state, prompt)
        length = attention_mask.shape[1]
        if length < state.encoder_capacity:
            state.encoder_valid[:, length:].fill_(False)
        # A row that may see nothing sees all of its padding: else it would be NaN.
        most = attention_mask.amax(dim=1, keepdim=True)
        torch.ge(attention_mask, most, out=state.encoder_valid[:, :length])
        state.token.fill_(self.start)
        if state.seen is not None:
            state.seen[:, self.start] = True
