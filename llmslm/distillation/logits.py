"""`llmslm logits`: the LLM's distribution over the target tokens of a recipe's training data, onto the disk."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from llmslm.data import logits as cache
from llmslm.data.datamodule import token_counts, tokenise
from llmslm.data.shards import to_device, write_shards
from llmslm.data.token_rows import TokenRows
from llmslm.distillation.job import Job, add_arguments, claim, load_job
from llmslm.errors import UserError
from llmslm.target_logits import target_logits


def main(args: Sequence[str]) -> None:
    """Run `llmslm logits`.

    Raises:
        UserError: for mistakes in the arguments, the recipe or the data.
    """
    options, overrides = _parser().parse_known_args(args)
    for name in ("top_k", "batch_tokens"):
        if getattr(options, name) < 1:
            key = name.replace("_", "-")
            raise UserError(f"--{key} {getattr(options, name)} was given; expected 1 or more")
    job, folder = load_job(options, overrides), Path(options.out)
    codec = job.system.codec
    codec.text_format = replace(codec.text_format, max_target_tokens=job.max_target_tokens)
    rows = tokenise(job.source, cache.SPLIT, codec)
    if not isinstance(rows, Dataset):
        raise UserError(f"{job.source.name} is streamed, so its logits cannot be found again (data.source)")
    top_k = min(options.top_k, vocabulary_size(job))
    head = {"version": cache.VERSION, "top_k": top_k, "shard_bytes": cache.SHARD_BYTES}
    about = cache.identity(rows, codec.slm_tokenizer, job.identity["data"])
    claim(folder / cache.MANIFEST, head | job.identity | about)
    write_logits(job, rows, folder, top_k, options.batch_tokens)
    sys.stdout.write(f"train on them with --model.distillation.logits {folder}\n")


def write_logits(job: Job, rows: Dataset, folder: Path, top_k: int, batch_tokens: int) -> None:
    """Run the LLM over rows and write what is likeliest at each target token; shards that are there stay.

    Args:
        job: system, and this process's place among the ranks.
        rows: tokenised by the system's codec.
        folder: of the cache.
        top_k: tokens that are kept.
        batch_tokens: padded tokens of a forward.
    """
    system, size = job.system, vocabulary_size(job)
    sides = [name for name in ("prompt_ids", "input_prompt_ids", "target_ids") if name in rows.column_names]
    lengths, sizes = token_counts(rows, ("target_ids",)), token_counts(rows, tuple(sides))

    tokens = TokenRows(rows)

    def compute(batch: list[int]) -> dict[str, Tensor]:
        collated = system.codec.collate(tokens.__getitems__(batch))
        tensors = {name: to_device(tensor, system.device) for name, tensor in collated.items()}
        logits, _ = target_logits(system.model, tensors, system.codec.pad_id)
        return cache.likeliest(logits[:, :size], top_k)

    shards = cache.shards_of(lengths, top_k, cache.SHARD_BYTES)
    dealt = {"batch_tokens": batch_tokens, "rank": job.ranks.rank, "world_size": job.ranks.size}
    with torch.inference_mode():
        write_shards(compute, shards, folder, cache.SPLIT, name="logits of", sizes=sizes, **dealt)


def vocabulary_size(job: Job) -> int:
    """Count the ids that the tokenizer has; models have more, to fill up their matrices, of which none is a token."""
    known = max(job.system.codec.slm_tokenizer.get_vocab().values()) + 1
    return min(known, int(job.system.language_model.config.get_text_config().vocab_size))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmslm logits",
        allow_abbrev=False,
        description=(
            "Store what the LLM finds likely at each target token of a recipe's training data. A stopped call goes on "
            "where it was; under torchrun the ranks share the work. Other arguments override the recipe's keys."
        ),
    )
    add_arguments(parser, "folder of the logits")
    parser.add_argument("--top-k", type=int, default=64, help="tokens kept; of all others the mass; default: 64")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens of a forward; default: 4096")
    return parser
