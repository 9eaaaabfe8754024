"""Checkpoints of a training run: written aside and renamed, checked before use, the newest whole one found.

A checkpoint is a file (torch.save), or a folder of one file a rank (sharded training) that either kind of run reads.
"""

import json
import os
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from llmslm.errors import UserError
from llmslm.writing import is_disk_full

SEAL = "seal.json"
"""In a checkpoint folder: size and checksum of each of its files."""
REST = "meta.pt"
"""In a checkpoint folder: what is not a tensor of model or optimizer; Lightning's name for it."""
LAST = "last"


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, never half-written under their name; reads the folders of sharded runs too."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write aside, flush to the disk, rename.

        Raises:
            UserError: if the disk is full; what was there before stays.
        """
        with replaced(Path(path)) as aside, aside.open("wb") as file:
            torch.save(checkpoint, file)
            flush(file.fileno())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, or the folder of a sharded run with the parts of all its ranks."""
        if Path(path).is_dir():
            return read_folder(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; what was written there takes the name at the end, or is removed after a failure.

    There is one writer of a checkpoint, so what a killed one left is overwritten.

    Raises:
        UserError: if the disk is full.
    """
    aside = aside_of(path)
    remove(aside)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        put(aside, path)
    except Exception as error:
        full = is_disk_full(error) or is_disk_full(error.__context__ or error) or _is_short(path.parent)
        remove(aside)
        if full:
            raise UserError(
                f"the disk is full: the checkpoint {path} was not written; free some space and go on with "
                "--ckpt_path last"
            ) from error
        raise


def put(aside: Path, path: Path) -> None:
    """Rename what was written aside, a file in one step; a folder that has the name steps back first."""
    old = path.with_name(f".{path.name}.old")
    if path.is_dir() or (path.exists() and aside.is_dir()):
        remove(old)
        path.rename(old)
    aside.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    flush(folder)
    os.close(folder)
    remove(old)


def aside_of(path: Path) -> Path:
    """Name the place where `path` is written."""
    return path.with_name(f".{path.name}.part")


def successor(old: Path) -> Path:
    """Name the checkpoint for which `old` stepped back."""
    return old.with_name(old.name.removeprefix(".").removesuffix(".old"))


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed writer has left, but a checkpoint that stepped back for one that never came."""
    for path in [*folder.glob(".*.part"), *(old for old in folder.glob(".*.old") if successor(old).exists())]:
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(descriptor: int) -> None:
    """Wait until a file or folder is on the disk, so that a rename after it means what it says."""
    os.fsync(descriptor)


def checksums(folder: Path, pattern: str) -> dict[str, list[int]]:
    """Flush the matching files of a folder to the disk and return size and crc32 by name."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        with path.open("rb") as file:
            flush(file.fileno())
            crc = 0
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
        found[path.name] = [path.stat().st_size, crc]
    return found


def seal(folder: Path, files: dict[str, list[int]]) -> None:
    """Close a folder: what the seal does not name does not count, and what it names must be there as it was."""
    with (folder / SEAL).open("w", encoding="utf-8") as file:
        json.dump(files, file)
        file.flush()
        flush(file.fileno())


# --- checking and finding ---------------------------------------------------------------------------------------------


def fault(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, file or folder, after reading all of it; None if it is whole."""
    try:
        if path.is_dir():
            return _folder_fault(path)
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return f"{broken} is damaged" if broken else None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return str(error) or type(error).__name__


def newest(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a folder, None if there is none; warn of each broken one.

    All processes of a run choose the same one, as long as nobody writes. One that stepped back counts where the writer
    was killed before its successor had the name.
    """
    paths = [path for path in Path(folder).glob("*.ckpt") if not path.name.startswith(".")]
    paths += [old for old in Path(folder).glob(".*.ckpt.old") if not successor(old).exists()]
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        problem = fault(path)
        if problem is None:
            return path
        warnings.warn(f"the checkpoint {path} is broken ({problem}): the one before it is used", stacklevel=2)
    return None


def resolve(ckpt_path: str | None, folder: str | Path) -> str | None:
    """Turn "last" into the newest whole checkpoint of a folder; None where there is none yet.

    Raises:
        UserError: if another checkpoint was named and is not there, or is broken.
    """
    if ckpt_path == LAST:
        found = newest(folder)
        return None if found is None else str(found)
    if ckpt_path is None or "://" in ckpt_path:
        return ckpt_path
    problem = "it is not there" if not Path(ckpt_path).exists() else fault(Path(ckpt_path))
    if problem:
        raise UserError(
            f"the checkpoint {ckpt_path} cannot be used: {problem}; give another one, or "
            f"--ckpt_path last for the newest whole one of {folder}"
        )
    return ckpt_path


def _folder_fault(folder: Path) -> str | None:
    if not (folder / SEAL).is_file():
        return f"{SEAL} is missing"
    for name, (size, crc) in json.loads((folder / SEAL).read_text(encoding="utf-8")).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or cut off"
        if checksums(folder, name)[name][1] != crc:
            return f"{name} is damaged"
    return None


def _is_short(folder: Path, least: int = 1 << 16) -> bool:
    """Recognise a full disk where torch's error does not say so."""
    return folder.is_dir() and shutil.disk_usage(folder).free < least


# --- sharded folders, read by one process -----------------------------------------------------------------------------


def read_folder(folder: Path) -> dict[str, Any]:
    """Read a sharded checkpoint as the one file that a run on one device would have written.

    Raises:
        UserError: if the folder is no checkpoint.
    """
    if not (folder / REST).is_file():
        raise UserError(f"{folder} is no checkpoint: {REST} is missing (--ckpt_path)")
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    flat: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else 0
        for name, entry in metadata.state_dict_metadata.items()
    }
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is not asked for
        load(flat, storage_reader=reader, planner=planner, no_dist=True)
    paths = metadata.planner_data
    state = _nested({tuple(paths[name]): value for name, value in flat.items()})
    optimizers = [state[key] for key in sorted(key for key in state if key.startswith("optimizer_"))]
    rest: dict[str, Any] = torch.load(folder / REST, map_location="cpu", weights_only=True)
    return rest | {"state_dict": state["state_dict"], "optimizer_states": [numbered(one) for one in optimizers]}


def numbered(optimizer_state: dict[str, Any]) -> dict[str, Any]:
    """Key an optimizer's state by the parameters' numbers, as torch does, instead of by their names."""
    names = [name for group in optimizer_state["param_groups"] for name in group["params"]]
    return _rekeyed(optimizer_state, {name: number for number, name in enumerate(names)}.__getitem__)


def named(optimizer_state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Key an optimizer's state by parameter names, given in the optimizer's order."""
    return _rekeyed(optimizer_state, names.__getitem__)


def _rekeyed(state: dict[str, Any], key: Callable[[Any], Any]) -> dict[str, Any]:
    groups = [group | {"params": [key(one) for one in group["params"]]} for group in state["param_groups"]]
    return {"state": {key(one): value for one, value in state.get("state", {}).items()}, "param_groups": groups}


def _nested(flat: dict[tuple[str | int, ...], Any]) -> dict[str, Any]:
    """Build dictionaries and lists from paths; an integer in a path is a place in a list."""
    root: dict[Any, Any] = {}
    for path, value in flat.items():
        node = root
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return _with_lists(root)


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node and all(isinstance(key, int) for key in node):
        return [_with_lists(node[key]) for key in sorted(node)]
    return {key: _with_lists(value) for key, value in node.items()}
