"""The feature cache: a frozen encoder's states of a data set, written once, read memory-mapped instead of the LLM.

A folder holds manifest.json (which encoder, layer, tokens and data) and, per split, shards of consecutive examples:
safetensors with one bf16 tensor `states` (tokens of the shard, width). The tokens of each example, and so its shard,
follow from the data and `shard_bytes` in the manifest.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from llmslm.data.codec import Codec, pad
from llmslm.data.shards import Shards, StoredRows, missing_shards, to_device, write_shards
from llmslm.data.token_rows import TokenRows
from llmslm.errors import UserError
from llmslm.models.encoder import Encoder, Layers, pad_right
from llmslm.models.source import system_of
from llmslm.writing import write_text

MANIFEST = "manifest.json"
VERSION = 2
"""1 had shards of as many examples, however long they are."""
SHARD_BYTES = 256 * 2**20
"""A shard is made in the memory of the encoder's device, and may exceed this by one example."""
ON_DEVICE = 1 / 8
"""Share of a GPU's memory that a split's states may take there; a larger split is read from disk, batch by batch."""
_STATE_BYTES = 2  # bf16
_SAMPLE = 1 << 20  # bytes of a weight file that tell it from another
_OPTIONS = ("layer", "quantization", "revision")  # of the encoder, in a recipe
_DECIDED_BY = {
    "data": "data.source",
    "tokens": "tokenizer, data.prompt_template, data.max_prompt_tokens, data.truncate_prompt",
    "examples": "data.source",
}


class StoredEncoder(Encoder):
    """Stands for an encoder whose states are on disk: what a composition asks of it, without its weights.

    Args:
        folder: of the cache.

    Raises:
        UserError: if there is no complete cache of a version that is known.
    """

    def __init__(self, folder: Path) -> None:
        nn.Module.__init__(self)
        self.manifest = read_manifest(folder)
        encoder = self.manifest["encoder"]
        self.folder = folder
        self.layer, self.quantization = encoder["layer"], encoder["quantization"]
        self._config = AutoConfig.for_model(**encoder["config"])
        self._known: dict[tuple[int, ...], Tensor] = {}

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the encoder that wrote the states."""
        return self._config

    @property
    def width(self) -> int:
        """Width of the states: of all wanted layers, side by side."""
        return int(self.manifest["encoder"]["width"])

    @property
    def max_positions(self) -> int | None:
        """See `Encoder.max_positions`."""
        limit: int | None = self.manifest["encoder"]["max_positions"]
        return limit

    def content_hash(self) -> str:
        """The content hash of the encoder that wrote the states."""
        return str(self.manifest["encoder"]["hash"])

    def learn(self, prompts: Iterable[Sequence[int]], states: Iterable[Tensor]) -> None:
        """Take the states (prompt_len, width) of prompts, by their tokens; what is learned can be read."""
        self._known.update(zip(map(tuple, prompts), states, strict=True))

    def forward(
        self, prompt_ids: Tensor, prompt_attention_mask: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Give the states of prompts that were learned; see `Encoder.forward`.

        Raises:
            UserError: for any other prompt: there are no weights.
        """
        prompt_ids, mask = pad_right(prompt_ids, prompt_attention_mask)
        lengths = mask.sum(dim=1).tolist()
        found = [self._known.get(tuple(row[:length])) for row, length in zip(prompt_ids.tolist(), lengths, strict=True)]
        hidden = torch.zeros(*prompt_ids.shape, self.width, dtype=torch.bfloat16, device=prompt_ids.device)
        for row, states in zip(hidden, found, strict=True):
            if states is None:
                raise UserError(f"the states in {self.folder} stand for the encoder, which cannot read other prompts")
            row[: len(states)] = states
        return hidden, mask

    def embed_tokens(self, *_: Any) -> Tensor:
        """Refuse: there are no weights.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"model.alignment reads the LLM's embeddings, which the features in {self.folder} do not hold; set "
            "model.alignment to llmslm.models.alignment.Offsets, or leave model.encoder.features out"
        )


class StoredStates(StoredRows):
    """The states of a split, by example: `hidden_states` (prompt_len, width) in bf16.

    Args:
        folder: of the cache.
        split: for example "train".
        lengths: (examples,), encoder tokens of each example.
    """

    def __init__(self, folder: Path, split: str, lengths: np.ndarray) -> None:
        manifest = read_manifest(folder)
        self.width = int(manifest["encoder"]["width"])
        shards = Shards(lengths, self.width * _STATE_BYTES, manifest["shard_bytes"])
        super().__init__(folder, split, shards, {"states": "hidden_states"})

    def fits(self, device: torch.device) -> bool:
        """Say whether a GPU has room for all of them: they may take `ON_DEVICE` of its memory."""
        if device.type != "cuda":
            return False
        needed = (int(self.shards.ends[-1]) + 1) * self.width * _STATE_BYTES
        return needed <= ON_DEVICE * torch.cuda.get_device_properties(device).total_memory

    def table(self, device: torch.device) -> Tensor:
        """Bring all states to a device: (tokens + 1, width), those of one example behind another, the last row zero.

        A batch then travels as ids and row numbers. Its states are a hundred times their bytes, and copying them from
        process to process takes longer than a small slm's step.
        """
        table = torch.zeros(int(self.shards.ends[-1]) + 1, self.width, dtype=torch.bfloat16, device=device)
        for number in range(len(self.shards)):
            members = self.shards.members(number)
            rows = slice(int(self.shards.ends[members.start]), int(self.shards.ends[members.stop]))
            table[rows] = self.shard(number)["hidden_states"]
        return table


class StateNumbers:
    """Stands for the states of a split whose table is on the GPU: `state_numbers` are an example's rows there."""

    def __init__(self, states: StoredStates) -> None:
        self._ends = states.shards.ends

    def __getitem__(self, example: int) -> dict[str, np.ndarray]:
        """Return (tokens,) numbers of rows."""
        return {"state_numbers": np.arange(self._ends[example], self._ends[example + 1])}


def shards_of(encoder: Encoder, lengths: np.ndarray) -> Shards:
    """Divide a split of which each example has so many encoder tokens, (examples,)."""
    return Shards(lengths, encoder.hidden_size * _layer_count(encoder.layer) * _STATE_BYTES, SHARD_BYTES)


def write_features(
    encoder: Encoder,
    codec: Codec,
    rows: Dataset,
    shards: Shards,
    folder: Path,
    split: str,
    *,
    batch_tokens: int = 16_384,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Write the shards of a split that are this rank's and not there yet; each appears when it is complete.

    Args:
        encoder: reads the prompts.
        codec: padding id of its tokenizer.
        rows: with prompt_ids.
        shards: `shards_of` them.
        folder: of the cache.
        split: for example "train".
        batch_tokens: padded tokens of a forward.
        rank: this process.
        world_size: number of processes.
    """
    device, prompts = next(encoder.parameters()).device, TokenRows(rows.select_columns("prompt_ids"))

    def compute(batch: list[int]) -> dict[str, Tensor]:
        ids, mask = pad([row["prompt_ids"] for row in prompts.__getitems__(batch)], codec.encoder_pad_id)
        real = to_device(mask.flatten().nonzero().squeeze(1), device)
        hidden, _ = encoder(to_device(ids, device), to_device(mask, device))
        return {"states": hidden.flatten(0, 1).index_select(0, real).to(torch.bfloat16)}

    dealt = {"batch_tokens": batch_tokens, "rank": rank, "world_size": world_size}
    write_shards(compute, shards, folder, split, name="encoding", sizes=shards.lengths, **dealt)


def write_manifest(
    folder: Path, encoder: Encoder, source: str, revision: str | None, splits: dict[str, dict[str, Any]]
) -> None:
    """Write what the cache belongs to, before its shards; one that is there must say the same.

    Args:
        folder: of the cache.
        encoder: that reads.
        source: hub name or folder that it came from.
        revision: commit of the hub repository.
        splits: `identity` of each, and how many `shards` it has.

    Raises:
        UserError: if the folder holds the states of something else.
    """
    config = encoder.config.to_dict()
    about = {
        "source": fingerprint_of(source),
        "revision": revision,
        "hash": encoder.content_hash(),
        "layer": encoder.layer,
        "quantization": encoder.quantization,
        "max_positions": encoder.max_positions,
        "width": encoder.hidden_size * _layer_count(encoder.layer),
        "config": config | {"model_type": encoder.config.model_type},
    }
    head = {"version": VERSION, "shard_bytes": SHARD_BYTES}
    manifest = json.loads(json.dumps(head | {"encoder": about, "splits": splits}, default=str))
    path = folder / MANIFEST
    if path.is_file():
        stored = _parsed(path)
        for name in (*_OPTIONS, "hash"):
            _same(folder, f"encoder ({name})", stored["encoder"][name], manifest["encoder"][name])
        _same(folder, "data", stored["splits"], manifest["splits"])
    write_text(path, json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what a cache belongs to.

    Raises:
        UserError: if there is no cache, it is not complete, or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no features: write them with llmslm features --out (model.encoder.features)")
    manifest = _parsed(path)
    for split, about in manifest["splits"].items():
        count = about["shards"]
        if missing := missing_shards(folder, split, count):
            raise UserError(
                f"{folder} lacks {missing} of {count} shards of {split}: run llmslm features again, it goes on"
            )
    return manifest


def _parsed(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest["version"] != VERSION:
        raise UserError(
            f"{path} has version {manifest['version']}, this llmslm reads {VERSION}: write the features again with "
            "llmslm features --out (model.encoder.features)"
        )
    return manifest


def check(folder: Path, source: str, options: Mapping[str, Any], split: str, about: dict[str, Any]) -> None:
    """Refuse a cache that does not belong to a recipe.

    The encoder's weights may be gone from a local source, since they are not needed: they are then taken as the same.

    Args:
        folder: of the cache.
        source: the recipe's encoder.
        options: the recipe's `layer`, `quantization` and `revision`.
        split: which is wanted.
        about: the `identity` of the recipe's split.

    Raises:
        UserError: naming what differs.
    """
    manifest = read_manifest(folder)
    place = Path(system_of(source))
    if not place.exists() or _weight_files(place):
        _same(folder, "encoder (model.encoder.source)", manifest["encoder"]["source"], fingerprint_of(source))
    for name in _OPTIONS:
        _same(folder, f"{name} (model.encoder.{name})", manifest["encoder"][name], options[name])
    stored = manifest["splits"].get(split)
    if stored is None:
        raise UserError(
            f"{folder} has features of {' and '.join(manifest['splits'])}, none of {split}; leave "
            "model.encoder.features out, and the LLM reads it"
        )
    for name, value in about.items():
        _same(folder, f"{split} {name} ({_DECIDED_BY[name]})", stored[name], value)


def identity(rows: Dataset, codec: Codec, data: str) -> dict[str, Any]:
    """Name what decides about the states of a split beside the encoder: data, tokens and number of examples."""
    return {"data": data, "tokens": codec.prompt_signature(), "examples": len(rows)}


def fingerprint_of(source: str) -> str:
    """Name a source: a hub name as it is, a local folder or file by the sizes and samples of its weights."""
    path = Path(system_of(source))
    if not path.exists():
        return source
    digest = hashlib.blake2b(digest_size=16)
    for file in _weight_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for place in (0, size // 2, max(0, size - _SAMPLE)):
                opened.seek(place, os.SEEK_SET)
                digest.update(opened.read(_SAMPLE))
    return digest.hexdigest()


def _weight_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))


def _layer_count(layer: Layers) -> int:
    return len(layer) if isinstance(layer, list) else 1


def _same(folder: Path, what: str, stored: Any, wanted: Any) -> None:
    if stored != wanted:
        raise UserError(
            f"the features in {folder} are of another {what}: {str(stored)[:80]!r}, here it is {str(wanted)[:80]!r}; "
            "write others with llmslm features --out (model.encoder.features)"
        )
