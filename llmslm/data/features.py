"""The feature cache: a frozen encoder's states of a data set, written once, read memory-mapped instead of the LLM.

A folder holds manifest.json (which encoder, layer, tokens and data) and, per split, shards of consecutive examples:
safetensors with one bf16 tensor `states` (tokens of the shard, width). The tokens of each example, and so its shard,
follow from the data and `shard_bytes` in the manifest.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig

from llmslm.data.codec import Codec, pad
from llmslm.errors import UserError
from llmslm.models.encoder import Encoder, Layers
from llmslm.writing import file_aside, write_text

MANIFEST = "manifest.json"
VERSION = 2
"""1 had shards of as many examples, however long they are."""
SHARD_BYTES = 256 * 2**20
"""A shard is made in memory, and may exceed this by one example."""
_STATE_BYTES = 2  # bf16
_SAMPLE = 1 << 20  # bytes of a weight file that tell it from another
_OPTIONS = ("layer", "quantization", "revision")  # of the encoder, in a recipe


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

    def forward(self, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: there are no weights.

        Raises:
            UserError: always.
        """
        raise UserError(f"the states in {self.folder} stand for the encoder, which cannot read other prompts")

    embed_tokens = forward  # type: ignore[assignment]


class Shards:
    """Where the states of each example of a split lie.

    Args:
        lengths: (examples,), encoder tokens of each example.
        width: of the states.
        limit: bytes of a shard; the example with which it is reached is its last.
    """

    def __init__(self, lengths: np.ndarray, width: int, limit: int) -> None:
        self.lengths = lengths
        self.width = width
        self.ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        numbers = self.ends[:-1] * width * _STATE_BYTES // limit
        self._firsts = np.append(np.flatnonzero(np.diff(numbers, prepend=-1)), len(lengths))

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def members(self, shard: int) -> range:
        """Return the examples of a shard."""
        return range(int(self._firsts[shard]), int(self._firsts[shard + 1]))

    def rows(self, example: int) -> tuple[int, slice]:
        """Return an example's shard, and its rows there."""
        shard = int(np.searchsorted(self._firsts, example, side="right")) - 1
        first = int(self.ends[self._firsts[shard]])
        return shard, slice(int(self.ends[example]) - first, int(self.ends[example + 1]) - first)


class StoredStates:
    """The states of a split, by example.

    Args:
        folder: of the cache.
        split: for example "train".
        lengths: (examples,), encoder tokens of each example.
    """

    def __init__(self, folder: Path, split: str, lengths: np.ndarray) -> None:
        manifest = read_manifest(folder)
        self.folder, self.split = folder, split
        self.shards = Shards(lengths, manifest["encoder"]["width"], manifest["shard_bytes"])
        self._open: dict[int, Any] = {}

    def __getitem__(self, example: int) -> Tensor:
        """Return (prompt_len, width) states in bf16."""
        shard, rows = self.shards.rows(example)
        if shard not in self._open:
            path = shard_path(self.folder, self.split, shard)
            self._open[shard] = safe_open(path, framework="pt").get_slice("states")
        states: Tensor = self._open[shard][rows]
        return states

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open files behind: a worker opens its own."""
        return self.__dict__ | {"_open": {}}


class RowsWithStates(torch.utils.data.Dataset):
    """Tokenised rows with `hidden_states` beside them.

    Args:
        rows: of a split.
        states: of the same.
    """

    def __init__(self, rows: Dataset, states: StoredStates) -> None:
        self.rows, self.states = rows, states

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, examples: list[int]) -> list[dict[str, Any]]:
        """Return some rows; torch's loader asks for those of a batch together."""
        rows = self.rows.__getitems__(examples)
        return [row | {"hidden_states": self.states[i]} for row, i in zip(rows, examples, strict=True)]


def shards_of(encoder: Encoder, lengths: np.ndarray) -> Shards:
    """Divide a split of which each example has so many encoder tokens, (examples,)."""
    return Shards(lengths, encoder.hidden_size * _layer_count(encoder.layer), SHARD_BYTES)


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
    device = next(encoder.parameters()).device
    mine = {shard: shard_path(folder, split, shard) for shard in range(rank, len(shards), world_size)}
    total = sum(len(shards.members(shard)) for shard in mine)
    with tqdm(total=total, desc=f"encoding {split}", unit="example", disable=rank > 0) as progress:
        for shard, path in mine.items():
            members = shards.members(shard)
            if path.is_file():
                progress.update(len(members))
                continue
            states = torch.empty(int(shards.lengths[members].sum()), shards.width, dtype=torch.bfloat16)
            for batch in _batches(members, shards.lengths, batch_tokens):
                ids, mask = pad([row["prompt_ids"] for row in rows.__getitems__(batch)], codec.encoder_pad_id)
                hidden, _ = encoder(ids.to(device), mask.to(device))
                for example, row in zip(batch, hidden.to(torch.bfloat16).cpu(), strict=True):
                    states[shards.rows(example)[1]] = row[: shards.lengths[example]]
                progress.update(len(batch))
            with file_aside(path) as aside:
                save_file({"states": states}, aside)


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
        for name in ("hash", *_OPTIONS):  # the hash is of weights: mixes of other layers may share it
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
        wanted = range(about["shards"])
        missing = sum(not shard_path(folder, split, shard).is_file() for shard in wanted)
        if missing:
            raise UserError(
                f"{folder} lacks {missing} of {len(wanted)} shards of {split}: run llmslm features again, it goes on"
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
    if not Path(source).exists() or _weight_files(Path(source)):
        _same(folder, "encoder (model.encoder.source)", manifest["encoder"]["source"], fingerprint_of(source))
    for name in _OPTIONS:
        _same(folder, f"{name} (model.encoder.{name})", manifest["encoder"][name], options[name])
    stored = manifest["splits"].get(split)
    if stored is None:
        raise UserError(f"{folder} has no features of {split}: run llmslm features again (model.encoder.features)")
    for name, value in about.items():
        _same(folder, f"{split} {name}", stored[name], value)


def identity(rows: Dataset, codec: Codec, data: str) -> dict[str, Any]:
    """Name what decides about the states of a split beside the encoder: data, tokens and number of examples."""
    return {"data": data, "tokens": codec.prompt_signature(), "examples": len(rows)}


def fingerprint_of(source: str) -> str:
    """Name a source: a hub name as it is, a local folder or file by the sizes and samples of its weights."""
    path = Path(source)
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


def shard_path(folder: Path, split: str, shard: int) -> Path:
    """Name a shard's file."""
    return folder / split / f"{shard:05d}.safetensors"


def _same(folder: Path, what: str, stored: Any, wanted: Any) -> None:
    if stored != wanted:
        raise UserError(
            f"the features in {folder} are of another {what}: {str(stored)[:80]!r}, here it is {str(wanted)[:80]!r}; "
            "write others with llmslm features --out (model.encoder.features)"
        )


def _batches(examples: range, lengths: np.ndarray, tokens: int) -> Iterator[list[int]]:
    """Group examples of similar length, longest first, up to so many padded tokens."""
    batch: list[int] = []
    for example in sorted(examples, key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
