"""The contract of a data source, and the cache that the built ones share."""

import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict

from datasets import Dataset, Features, IterableDataset, Value, load_from_disk

from llmslm.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
FEATURES = Features({"id": Value("string"), "prompt": Value("string"), "target": Value("string")})


class Example(TypedDict):
    """One pair of texts with a name that stays the same from run to run."""

    id: str
    prompt: str
    target: str | None
    """None in data of prompts alone, all of whose examples are without one."""


class Source(ABC):
    """Examples of three splits, as datasets with the string columns id, prompt and target, null in prompts alone."""

    name: str
    """Short name for records and leaderboards."""

    @abstractmethod
    def prepare(self) -> None:
        """Build or download what `load` needs; safe to call again. Called on one process of each node."""

    @abstractmethod
    def load(self, split: Split) -> Dataset | IterableDataset:
        """Return a split.

        Raises:
            UserError: if it does not exist.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a content hash of the data."""


class BuiltSource(Source):
    """A source that is computed once and kept in the cache folder, under a name made of all that decides about it.

    Args:
        cache_dir: where built data is kept; default: $LLMSLM_CACHE, or ~/.cache/llmslm.
    """

    def __init__(self, cache_dir: str | None = None) -> None:
        self.cache_dir = Path(cache_dir) if cache_dir else cache_folder()

    @abstractmethod
    def key(self) -> dict[str, Any]:
        """Return everything that decides about the content, in plain types."""

    @abstractmethod
    def build(self) -> dict[Split, list[Example]]:
        """Compute the splits that there are."""

    @cached_property
    def folder(self) -> Path:
        """The folder of this source with these settings."""
        text = json.dumps(self.key(), sort_keys=True)
        return self.cache_dir / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def prepare(self) -> None:
        """Build the splits, aside, and rename them when they are complete."""
        if self.folder.is_dir():
            return
        splits = self.build()
        aside = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.part")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self._write(splits, aside)
            if not self.folder.is_dir():  # another process may have been quicker
                aside.rename(self.folder)
        except OSError as error:
            if not self.folder.is_dir():
                raise UserError(
                    f"{self.name} data cannot be written to {self.cache_dir}: {error} (data.source.init_args.cache_dir)"
                ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _write(self, splits: dict[Split, list[Example]], folder: Path) -> None:
        for split, examples in splits.items():
            if not examples:
                continue  # `datasets` cannot load an empty one
            columns = {key: [example[key] for example in examples] for key in ("id", "prompt", "target")}
            Dataset.from_dict(columns, features=FEATURES).save_to_disk(folder / split)
        rows = {split: len(examples) for split, examples in splits.items()}
        described = self.key() | {"fingerprint": content_hash(splits), "rows": rows}
        (folder / "source.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    def load(self, split: Split) -> Dataset:
        """Return a split of the built data, memory-mapped.

        Raises:
            UserError: if the split is empty.
        """
        self.prepare()
        if not (self.folder / split).is_dir():
            raise UserError(f"the {split} split of {self.name} has no rows (data.source)")
        loaded = load_from_disk(self.folder / split)
        assert isinstance(loaded, Dataset)
        return loaded

    def fingerprint(self) -> str:
        """Return the content hash that was computed when the data was built."""
        self.prepare()
        described = json.loads((self.folder / "source.json").read_text(encoding="utf-8"))
        return str(described["fingerprint"])


def has_targets(dataset: Dataset | IterableDataset) -> bool:
    """Whether a split's examples have targets: all of them, or none. Streams have, and are not read for it."""
    return not isinstance(dataset, Dataset) or len(dataset) == 0 or dataset[0]["target"] is not None


def load_pairs(source: Source, split: Split) -> Dataset | IterableDataset:
    """Load a split to learn from or to compare with.

    Raises:
        UserError: if it does not exist, or is of prompts alone.
    """
    dataset = source.load(split)
    if not has_targets(dataset):
        raise UserError(
            f"the {split} split of {source.name} has prompts alone; expected targets too: name their column "
            "(data.source.init_args.target_column), or let an LLM write them (llmslm label)"
        )
    return dataset


def cache_folder() -> Path:
    """Return the folder for data that can be built again: $LLMSLM_CACHE, or ~/.cache/llmslm."""
    return Path(os.environ.get("LLMSLM_CACHE") or Path.home() / ".cache" / "llmslm")


def content_hash(splits: dict[Split, list[Example]]) -> str:
    """Hash the texts of all splits in their order."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for example in splits.get(split, []):
            for part in (split, example["id"], example["prompt"], example["target"] or ""):
                digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def split_by_group(group: str, held_out_percent: int = 5) -> Split:
    """Assign a whole group (a package) to one split by the hash of its name."""
    bucket = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 100
    if bucket < held_out_percent:
        return "test"
    return "validation" if bucket < 2 * held_out_percent else "train"


def drop_seen(examples: Iterable[Example], seen: Iterable[Example]) -> list[Example]:
    """Keep the examples whose prompt and target both do not occur in `seen`."""
    prompts, targets = set(), set()
    for example in seen:
        prompts.add(example["prompt"])
        targets.add(example["target"])
    return [e for e in examples if e["prompt"] not in prompts and e["target"] not in targets]


def take(examples: list[Example], limit: int | None) -> list[Example]:
    """Take at most `limit` examples, chosen by the hash of their ids, in the order that they had."""
    if limit is None or len(examples) <= limit:
        return examples
    chosen = sorted(examples, key=lambda example: hashlib.sha256(example["id"].encode()).digest())[:limit]
    ids = {example["id"] for example in chosen}
    return [example for example in examples if example["id"] in ids]
