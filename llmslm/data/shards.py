"""Tensors of each token of a data set on disk: written once, shard by shard, and read memory-mapped.

A shard is a safetensors file with the rows of consecutive examples, one row a token. Which examples lie in which shard,
and where, follows from the tokens of each example and the limit of a shard's bytes.
"""

import os
import platform
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from llmslm.writing import file_aside

_WRITERS = 2
"""Shards that are written at once, while another one is computed; each waits in the host's memory."""


class Shards:
    """Where the rows of each example of a split lie.

    Args:
        lengths: (examples,), rows of each example.
        row_bytes: of one row, all its tensors together.
        limit: bytes of a shard; the example with which it is reached is its last.
    """

    def __init__(self, lengths: np.ndarray, row_bytes: int, limit: int) -> None:
        self.lengths = lengths
        self.ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        numbers = self.ends[:-1] * row_bytes // limit
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

    def places(self, shard: int, examples: Sequence[int]) -> np.ndarray:
        """Return the rows of some of a shard's examples in it, one example behind another."""
        lengths = self.lengths[examples]
        starts = self.ends[examples] - self.ends[self._firsts[shard]]
        before: np.ndarray = np.cumsum(lengths) - lengths
        places: np.ndarray = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
        return places


class StoredRows:
    """The stored tensors of a split, by example.

    Args:
        folder: of the cache.
        split: for example "train".
        shards: of the split.
        names: the tensors in the files, and what they are called here.
    """

    def __init__(self, folder: Path, split: str, shards: Shards, names: Mapping[str, str]) -> None:
        self.folder, self.split, self.shards, self.names = folder, split, shards, names
        self._open: dict[int, dict[str, Tensor]] = {}

    def __getitem__(self, example: int) -> dict[str, Tensor]:
        """Return an example's tensors, (tokens, ...) each, over the file itself."""
        shard, rows = self.shards.rows(example)
        return {name: tensor[rows] for name, tensor in self.shard(shard).items()}

    def shard(self, number: int) -> dict[str, Tensor]:
        """Return the tensors of a shard's examples, one behind another, over the file itself."""
        if number not in self._open:
            file = safe_open(shard_path(self.folder, self.split, number), framework="pt")
            self._open[number] = {name: file.get_tensor(stored) for stored, name in self.names.items()}
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open files behind: a worker opens its own."""
        return self.__dict__ | {"_open": {}}


class RowsWithStored(torch.utils.data.Dataset):
    """Tokenised rows with stored tensors beside them.

    Args:
        rows: of a split.
        stored: `StoredRows` of the same, or what stands for them: tensors or arrays of an example, by name.
    """

    def __init__(self, rows: Any, stored: Any) -> None:
        self.rows, self.stored = rows, stored

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, examples: list[int]) -> list[dict[str, Any]]:
        """Return some rows; torch's loader asks for those of a batch together."""
        rows = self.rows.__getitems__(examples)
        return [row | self.stored[i] for row, i in zip(rows, examples, strict=True)]


def write_shards(
    compute: Callable[[list[int]], Mapping[str, Tensor]],
    shards: Shards,
    folder: Path,
    split: str,
    *,
    name: str,
    sizes: np.ndarray,
    batch_tokens: int = 16_384,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Write the shards of a split that are this rank's and not there yet; each appears when it is complete.

    A shard is put together where its tensors are computed, and written while the next one is computed.

    Args:
        compute: the tensors of a batch's examples, (rows, ...) each, one example behind another.
        shards: of the split.
        folder: of the cache.
        split: for example "train".
        name: of the work, for the progress bar.
        sizes: (examples,), tokens that an example takes in a batch.
        batch_tokens: padded tokens of a batch.
        rank: this process.
        world_size: number of processes.
    """
    mine = {shard: shard_path(folder, split, shard) for shard in range(rank, len(shards), world_size)}
    total = sum(len(shards.members(shard)) for shard in mine)
    bar = tqdm(total=total, desc=f"{name} {split}", unit="example", disable=rank > 0)
    with bar as progress, ThreadPoolExecutor(_WRITERS) as writers:
        writing: deque[Future[None]] = deque()
        for shard, path in mine.items():
            members = shards.members(shard)
            if path.is_file():
                progress.update(len(members))
                continue
            stored: dict[str, Tensor] = {}
            count = int(shards.lengths[members.start : members.stop].sum())
            for batch in _batches(members, sizes, batch_tokens):
                _put(stored, compute(batch), shards.places(shard, batch), count)
                progress.update(len(batch))
            if len(writing) == _WRITERS:
                writing.popleft().result()
            writing.append(writers.submit(_write_whole, _on_host(stored), path))
        for shard_written in writing:
            shard_written.result()


def shard_path(folder: Path, split: str, shard: int) -> Path:
    """Name a shard's file."""
    return folder / split / f"{shard:05d}.safetensors"


def missing_shards(folder: Path, split: str, count: int) -> int:
    """Count those of a split's shards that are not there."""
    return sum(not shard_path(folder, split, shard).is_file() for shard in range(count))


def _write_whole(stored: dict[str, Tensor], path: Path) -> None:
    """Write a shard in a folder of its own, then put it in its place: what a killed run leaves, a later one removes."""
    start, here = f".{path.name}.", platform.node()
    for left in path.parent.glob(f"{start}*.part"):
        host, _, pid = left.name.removeprefix(start).removesuffix(".part").rpartition("-")
        if host == here and not _runs(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    aside = path.with_name(f"{start}{here}-{os.getpid()}.part")
    try:
        with file_aside(aside / path.name) as part:
            save_file(stored, part)  # through a temporary file beside it, which nobody else removes
        (aside / path.name).replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _runs(pid: int) -> bool:
    """Say whether another process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _put(stored: dict[str, Tensor], tensors: Mapping[str, Tensor], places: np.ndarray, total: int) -> None:
    """Copy a batch's rows to their places among `total`; the first batch says of what kind they are."""
    for name, tensor in tensors.items():
        if name not in stored:
            stored[name] = tensor.new_empty(total, *tensor.shape[1:])
        stored[name][to_device(torch.from_numpy(places), tensor.device)] = tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor of the CPU to a device; to a GPU without waiting for what it still does."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _on_host(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring a shard to the host; pinned memory is used again, where new memory would cost as much as the copy."""
    return {
        name: torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows) if rows.is_cuda else rows.cpu()
        for name, rows in stored.items()
    }


def _batches(examples: range, sizes: np.ndarray, tokens: int) -> Iterator[list[int]]:
    """Group examples of similar size, longest first, up to so many padded tokens."""
    batch: list[int] = []
    longest_first = np.argsort(-sizes[examples.start : examples.stop], kind="stable") + examples.start
    for example in longest_first.tolist():
        if batch and (len(batch) + 1) * sizes[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
