"""The logit cache: an LLM's distribution over each target token of a data set, written once, read memory-mapped.

A folder holds manifest.json (which LLM, vocabulary, targets and data) and shards of consecutive training examples:
safetensors with `tokens` (target tokens of the shard, k) int32, the LLM's likeliest tokens, and `log_probs` (target
tokens of the shard, k + 1) float16, their log-probabilities and, last, that of all others together.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmslm.data.shards import Shards, StoredRows, missing_shards
from llmslm.data.sources.base import Split
from llmslm.errors import UserError

MANIFEST = "manifest.json"
VERSION = 1
SPLIT: Split = "train"
SHARD_BYTES = 256 * 2**20
"""A shard is made in the memory of the LLM's device, and may exceed this by one example."""
COLUMNS = {"tokens": "llm_tokens", "log_probs": "llm_log_probs"}
"""Tensors in the files, and what they are called in rows and batches."""
_LEAST = -1e4  # of a log-probability: float16 has no smaller number that is safe to add to


def shards_of(lengths: np.ndarray, top_k: int, limit: int) -> Shards:
    """Divide examples of so many target tokens, (examples,): int32 ids and float16 values."""
    return Shards(lengths, top_k * 4 + (top_k + 1) * 2, limit)


def likeliest(logits: Tensor, top_k: int) -> dict[str, Tensor]:
    """Reduce logits (n, vocabulary) to the k likeliest tokens and the log of the remaining mass, as they are stored.

    With k = vocabulary nothing remains, and log_probs are (n, k).
    """
    log_probs = logits.float().log_softmax(1)
    top = log_probs.topk(top_k, dim=1)
    values = top.values
    if top_k < logits.shape[1]:
        others = log_probs.scatter(1, top.indices, -torch.inf).logsumexp(1, keepdim=True)
        values = torch.cat([values, others], 1)
    return {"tokens": top.indices.int(), "log_probs": values.clamp_min(_LEAST).half()}


def identity(rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: str) -> dict[str, Any]:
    """Name what decides about which logits are wanted: data, vocabulary, target tokens and number of examples."""
    column = rows.with_format("arrow")[:]["target_ids"]
    digest = hashlib.blake2b(digest_size=16)
    for values in (pc.list_value_length(column), pc.list_flatten(column)):
        digest.update(values.to_numpy().astype(np.int64).tobytes())
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "data": data,
        "targets": digest.hexdigest(),
        "examples": len(rows),
    }


def stored_logits(folder: Path, lengths: np.ndarray, about: dict[str, Any]) -> StoredRows:
    """Open a cache for a recipe's training rows.

    Args:
        folder: of the cache.
        lengths: (examples,), target tokens of each example.
        about: the `identity` of the rows.

    Raises:
        UserError: if there is none, it is not complete, or it does not belong to the recipe.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no logits: write them with llmslm logits --out (model.distillation.logits)")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["version"] != VERSION:
        raise UserError(
            f"{path} has version {manifest['version']}, this llmslm reads {VERSION}: write the logits again with "
            "llmslm logits --out (model.distillation.logits)"
        )
    _check(folder, manifest, about)
    shards = shards_of(lengths, manifest["top_k"], manifest["shard_bytes"])
    if missing := missing_shards(folder, SPLIT, len(shards)):
        raise UserError(f"{folder} lacks {missing} of {len(shards)} shards: run llmslm logits again, it goes on")
    return StoredRows(folder, SPLIT, shards, COLUMNS)


def _check(folder: Path, manifest: dict[str, Any], about: dict[str, Any]) -> None:
    if manifest["vocabulary"] != about["vocabulary"]:
        raise UserError(
            f"the LLM of the logits in {folder} writes in another vocabulary than the slm, so they cannot be compared "
            "token by token; take an slm with the LLM's tokenizer, or let the LLM write targets (llmslm label) and "
            "leave model.distillation.logits out"
        )
    for name, value in about.items():
        if manifest[name] != value:
            raise UserError(
                f"the logits in {folder} are of other {name}: {str(manifest[name])!r}, here it is {str(value)!r}; "
                "write others with llmslm logits --out (model.distillation.logits)"
            )
