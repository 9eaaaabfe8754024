"""Tiny random models of each family, as configs and as folders in the hub's format."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MBartConfig,
    ModernBertConfig,
    MT5Config,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SmolLM3Config,
    T5Config,
    T5GemmaConfig,
)

VOCABULARY = 97
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_BART = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}

CONFIGS: dict[str, PreTrainedConfig] = {
    "t5": T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0, **_IDS),
    "bart": BartConfig(
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **_BART,
        **_IDS,
    ),
    "llama": LlamaConfig(num_hidden_layers=3, **_LLAMA, **_IDS),
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **_IDS),
    "qwen2": Qwen2Config(num_hidden_layers=3, **_LLAMA, **_IDS),
}
FAMILIES = list(CONFIGS)

_BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_GEMMA = {**_LLAMA, "head_dim": 8, "num_hidden_layers": 3}
ENCODERS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_BERT, **_IDS, max_position_embeddings=64),
    "roberta": RobertaConfig(**_BERT, **_IDS, max_position_embeddings=64),
    "modernbert": ModernBertConfig(
        **_BERT, **_IDS, sep_token_id=2, cls_token_id=1, global_attn_every_n_layers=2, local_attention=4
    ),
    "mt5": MT5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0, **_IDS),
    "t5gemma": T5GemmaConfig(encoder=dict(**_GEMMA, **_IDS), decoder=dict(**_GEMMA, **_IDS), **_IDS),
    "opt": OPTConfig(
        hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, **_IDS
    ),
    "gemma": GemmaConfig(**_GEMMA, **_IDS),
    "flan-t5": T5Config(  # and T5 1.1
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        **_IDS,
    ),
    "mbart": MBartConfig(
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **_BART,
        **_IDS,
    ),
    "qwen3": Qwen3Config(head_dim=8, num_hidden_layers=3, **_LLAMA, **_IDS),
    "gemma2": Gemma2Config(**_GEMMA, **_IDS),  # windows in every other layer
    "smollm3": SmolLM3Config(num_hidden_layers=3, **_LLAMA, **_IDS),  # SmolLM 1 and 2 are Llamas
    "minilm-bert": BertConfig(**{**_BERT, "num_attention_heads": 8}, **_IDS, type_vocab_size=2),
}


def build(family: str, **changes) -> PreTrainedModel:
    """A random model whose predictions are far from ties, so that rounding cannot flip a token."""
    config = (CONFIGS | ENCODERS)[family]
    config = type(config).from_dict(config.to_dict() | changes)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto = AutoModelForMaskedLM if "bert" in family else auto
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "relative" not in name:
                parameter.normal_(std=0.15)
    return model


def folder(family: str, path: Path) -> str:
    """Save a random model of the family under `path` and return its folder."""
    target = path / family
    build(family).save_pretrained(target)
    return str(target)


def prompts(rows: int = 3, longest: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (rows, longest) of different lengths, with their mask."""
    ids = torch.randint(3, VOCABULARY, (rows, longest))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, longest - 2 * row :] = 0
    return ids * mask, mask
