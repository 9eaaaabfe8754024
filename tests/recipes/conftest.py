"""Stand-ins for everything that a recipe names: tiny models, tokenizers and datasets in local folders."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
)

from llmslm.data.sources.debian import running_release

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "t5": lambda ids: T5Config(decoder_start_token_id=0, **T5, **ids),
    "gpt2": lambda ids: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=1024, **ids),
    "qwen": lambda ids: Qwen2Config(**LLAMA, **ids),
    "smollm": lambda ids: LlamaConfig(**LLAMA, **ids),
}


def byte_tokenizer(reverse: bool, wrap: bool) -> PreTrainedTokenizerFast:
    """One token a byte; `reverse` makes it a different tokenizer, `wrap` ends prompts with </s> as T5's does."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {symbol: 3 + i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if wrap:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>" if wrap else None, bos_token="<s>", eos_token="</s>"
    )


def make_model(source: str, folder: Path) -> str:
    """A tiny model of the family that a hub name speaks of, with a tokenizer of its own."""
    family = next(name for name in FAMILIES if name in source.lower())
    tokenizer = byte_tokenizer(reverse=family != "t5", wrap=family == "t5")
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = FAMILIES[family](ids)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    target = folder / source.replace("/", "--")
    auto.from_config(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def make_dataset(init_args: dict, folder: Path) -> str:
    """A folder of JSONL files in the hub's format with the columns and splits that a recipe names."""
    target = folder / "dataset"
    target.mkdir()
    for split in ("train", "validation", "test"):
        rows = []
        for i in range(64):
            row: dict = {}
            for key in ("prompt_column", "target_column", "extra_prompt_column"):
                if column := init_args.get(key):
                    outer, _, inner = column.partition(".")
                    text = f"{key[0]} text {i}"
                    if inner:
                        row.setdefault(outer, {})[inner] = text
                    else:
                        row[outer] = text
            rows.append(json.dumps(row))
        (target / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return str(target)


def make_debian_lists(cache: Path, language: str) -> None:
    """Lists as apt leaves them: English and translated descriptions, and the packages' sources."""
    lists = cache / f"debian-lists-{running_release()}"
    lists.mkdir(parents=True)
    for code in {"en", language}:
        stanzas = [
            f"Package: p{i}\nDescription-md5: {i:032x}\nDescription-{code}: {code} synopsis {i}\n"
            f" {code} paragraph one of {i}\n goes on.\n .\n  * verbatim\n .\n {code} paragraph two of {i}\n"
            for i in range(400)
        ]
        (lists / f"mirror_dists_stable_main_i18n_Translation-{code}").write_text("\n".join(stanzas))
    packages = [f"Package: p{i}\nSource: s{i // 2} (1.0)\n" for i in range(400)]
    (lists / "mirror_dists_stable_main_binary-amd64_Packages").write_text("\n".join(packages))


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Folder for stand-ins; caches, runs and MLflow go to the same temporary place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path
