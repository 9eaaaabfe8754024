"""The shapes that are timed, and systems of them with random weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from llmslm.generation.int8 import to_int8

SYSTEMS = ("llm", "slm", "llm_to_slm")
_T5 = {"decoder_start_token_id": 0}
_T5_LARGE = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16, **_T5}
_T5_3B = {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32, **_T5}
_LLAMA_SMALL = {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1408, "tie_word_embeddings": True}
_LLAMA_HEADLINE = {"vocab_size": 16384, "tie_word_embeddings": True}
_LLAMA_1B = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 4}

SHAPES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config()),
    "t5-small": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "t5-large": lambda: T5ForConditionalGeneration(T5Config(**_T5_LARGE)),
    "t5-3b": lambda: T5ForConditionalGeneration(T5Config(**_T5_3B)),
    "llama-4x512": lambda: LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, **_LLAMA_SMALL)
    ),
    "llama-4x256": lambda: LlamaForCausalLM(  # the SLM of recipes/headline
        LlamaConfig(
            hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, **_LLAMA_HEADLINE
        )
    ),
    "llama-24x576": lambda: LlamaForCausalLM(  # its LLM
        LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=9, **_LLAMA_HEADLINE
        )
    ),
    "llama-22x2048": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=22, num_attention_heads=32, **_LLAMA_1B)),
}


class Front(nn.Module):
    """What llm_to_slm computes before its SLM decodes: the LLM's states, projected and added to the SLM's embeddings.

    Args:
        llm: encodes.
        slm: decodes.
    """

    def __init__(self, llm: PreTrainedModel, slm: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = llm.get_encoder() if llm.config.is_encoder_decoder else llm.base_model
        self.slm = slm
        hidden = slm.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(llm.config.hidden_size, hidden), nn.ReLU(), nn.Linear(hidden, hidden))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What the SLM starts from, (batch, length, width): prompt embeddings, or its encoder's states of them."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        embeds: Tensor = self.slm.get_input_embeddings()(ids) + self.projector(states)
        if not self.slm.config.is_encoder_decoder:
            return embeds
        encoded: Tensor = self.slm.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return encoded


class Models:
    """The models of one LLM and SLM, made as they are asked for; llm_to_slm uses those of the other two.

    Args:
        llm: name of its shape.
        slm: name of its shape.
        device: where they go.
        dtype: "float32", "bfloat16", or "int8" for 8-bit weights beside float32.
    """

    def __init__(self, llm: str, slm: str, device: torch.device, dtype: str) -> None:
        self.names = {"llm": llm, "slm": slm, "llm_to_slm": f"{llm}-to-{slm}"}
        self.device, self.dtype = device, dtype
        self._made: dict[str, Any] = {}

    def model(self, system: str) -> PreTrainedModel:
        """The model that produces the tokens of a system."""
        name = "llm" if system == "llm" else "slm"
        return self._get(name, SHAPES[self.names[name]])

    def front(self) -> Front:
        """What llm_to_slm does before its SLM decodes."""
        llm, slm = self.model("llm"), self.model("slm")
        return self._get("front", lambda: Front(llm, slm))

    def float_model(self, system: str) -> PreTrainedModel:
        """A twin in float32 of a model whose weights have 8 bits, for what must do its own conversion."""
        return (
            self.model(system)
            if self.dtype != "int8"
            else build(SHAPES[self.names[system]], self.device, torch.float32)
        )

    def _get(self, name: str, factory: Callable[[], nn.Module]) -> Any:
        if name not in self._made:
            dtype = torch.float32 if self.dtype == "int8" else getattr(torch, self.dtype)
            self._made[name] = build(factory, self.device, dtype)
            if self.dtype == "int8":
                to_int8(self._made[name])
        return self._made[name]


def build(factory: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """A model with random weights, made in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return factory().eval()
    finally:
        torch.set_default_dtype(before)
