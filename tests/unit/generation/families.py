"""Tiny random models of each family that the engine has a step for."""

from collections.abc import Callable

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY, PAD, EOS, BOS = 61, 0, 1, 2
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    **_IDS,
}
_OPT = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    **_IDS,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, **_IDS}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "decoder_start_token_id": BOS,
    "scale_embedding": True,
    **_IDS,
}

BUILD: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_LLAMA, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_LLAMA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_LLAMA, head_dim=16)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**_LLAMA, no_rope_layers=[1, 0])),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_LLAMA, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=BOS, **_IDS)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_OPT)),
    "opt-post-norm": lambda: OPTForCausalLM(OPTConfig(**_OPT, do_layer_norm_before=False)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "t5-gated": lambda: T5ForConditionalGeneration(
        T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**_T5)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**_BART)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**_BART)),
}


def tiny(family: str) -> PreTrainedModel:
    """A model whose greedy tokens vary: random weights of the usual scale repeat one token."""
    torch.manual_seed(0)
    model = BUILD[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def prompts(model: PreTrainedModel, batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of mixed lengths, padded on the side that the model wants."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    missing = torch.randint(0, length, (batch,), generator=generator)
    missing[0] = 0
    place = torch.arange(length)[None]
    kept = place < length - missing[:, None] if model.config.is_encoder_decoder else place >= missing[:, None]
    return {"input_ids": ids.masked_fill(~kept, PAD), "attention_mask": kept.long()}


def by_generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **kwargs: int) -> torch.Tensor:
    """New tokens of greedy `generate()`, on the CPU."""
    ids = model.generate(**inputs, do_sample=False, **kwargs).cpu()
    return ids[:, 1:] if model.config.is_encoder_decoder else ids[:, inputs["input_ids"].shape[1] :]
