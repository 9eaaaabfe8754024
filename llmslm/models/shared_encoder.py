"""The encoder inside a whole LLM: one pass over the prompt serves the projector and the LLM's own decoding."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmslm.models.encoder import Encoder, Layers, layer_list, pad_right
from llmslm.models.packing import additive_mask, document_mask, document_positions


class Reading(NamedTuple):
    """What one pass over prompts gives.

    hidden_states: (batch, prompt_len, hidden_size), right-padded, of the encoder's layer.
    mask: (batch, prompt_len), 1 = a real token.
    last_hidden_state: (batch, prompt_len, hidden_size), of the last layer, after the final norm.
    past_key_values: the cache of a decoder-only LLM; None for an encoder-decoder.
    """

    hidden_states: Tensor
    mask: Tensor
    last_hidden_state: Tensor
    past_key_values: Any


class SharedEncoder(Encoder):
    """An `Encoder` that shares its weights with an LLM, which keeps all its layers and stays usable.

    Args:
        llm: an encoder-decoder or decoder-only language model with its head.
        layer: as for `Encoder`.
    """

    def __init__(self, llm: PreTrainedModel, layer: Layers = "last") -> None:
        nn.Module.__init__(self)
        self.keeps_cache = not llm.config.is_encoder_decoder
        self.quantization = None
        model = llm.base_model if self.keeps_cache else llm.get_encoder()
        self.full_depth = len(layer_list(model))
        self._follow(model, layer, self.full_depth)
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(
        self, prompt_ids: Tensor, prompt_attention_mask: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Encoder.forward`; packed rows are for training, which has no use for the whole LLM."""
        if documents is not None:
            return super().forward(prompt_ids, prompt_attention_mask, documents)
        reading = self.read(prompt_ids, prompt_attention_mask)
        return reading.hidden_states, reading.mask

    @torch.no_grad()
    def read(self, prompt_ids: Tensor, prompt_attention_mask: Tensor, *, one_mask: bool = False) -> Reading:
        """Pass once over prompts (batch, prompt_len), padded on either side.

        Args:
            prompt_ids: (batch, prompt_len) ids of the LLM's tokenizer.
            prompt_attention_mask: (batch, prompt_len), 1 = a real token.
            one_mask: give all layers the same mask in full. Of one of two dimensions transformers asks whether it is
                all ones, except while a CUDA graph is captured, which would hold other kernels than those run before.
        """
        prompt_ids, mask = pad_right(prompt_ids, prompt_attention_mask)
        kwargs: dict[str, Any] = self._full_mask(mask) if one_mask else {"attention_mask": mask}
        if self._takes_use_cache:
            kwargs["use_cache"] = self.keeps_cache
        handles = self._set_hooks()  # for this pass alone: the LLM is used by others too
        try:
            output = self.model(input_ids=prompt_ids, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        states = self._wanted(output.last_hidden_state)
        cache = output.past_key_values if self.keeps_cache else None
        return Reading(states, mask, output.last_hidden_state, cache)

    def _full_mask(self, mask: Tensor) -> dict[str, Tensor]:
        documents = mask - 1
        seen = document_mask(documents, documents, causal=self._is_causal)
        full = {"attention_mask": additive_mask(seen, self.model.dtype)}
        return full | ({"position_ids": document_positions(documents)} if self._takes_positions else {})

    def _read_weights(self) -> dict[str, Tensor]:
        """What an `Encoder` of this layer holds: the LLM's layers above it do not count."""
        layers, keep = layer_list(self.model), max(self.depth, 1)
        prefix = next(name for name, module in self.model.named_modules() if module is layers) + "."
        weights: dict[str, Tensor] = self.model.state_dict()
        above = [n for n in weights if n.startswith(prefix) and int(n.removeprefix(prefix).split(".")[0]) >= keep]
        return {name: tensor for name, tensor in weights.items() if name not in above}
