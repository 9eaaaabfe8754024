"""Datasets of the Hugging Face hub, or local folders in its format, by `datasets.load_dataset`; streaming too."""

import hashlib
import logging
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, load_dataset
from numpy.typing import NDArray

from llmslm.data.sources.base import FEATURES, SPLITS, Source, Split
from llmslm.errors import UserError

COLUMN_KEYS = ("prompt_column", "target_column", "extra_prompt_column")
log = logging.getLogger(__name__)


class HubDataset(Source):
    """A dataset by its hub name or local folder.

    Rows without a prompt or a target are left out, and counted in the log. An example's id is its `id` column, or else
    its row number; in a stream, whose rows have no numbers, the hash of its texts.

    Args:
        path: hub name ("wmt14", "abisee/cnn_dailymail") or folder.
        prompt_column: column of the given text; a dot reaches into a nested column ("translation.en").
        target_column: column of the text to produce.
        config_name: configuration of the dataset ("de-en", "3.0.0").
        revision: commit, tag or branch of the hub repository.
        extra_prompt_column: second part of the prompt ("input" in Alpaca), appended on a line of its own.
        train: name of the training split, slices allowed ("train[:90%]").
        validation: name of the validation split.
        test: name of the test split.
        streaming: read as it goes instead of downloading first.
    """

    def __init__(
        self,
        path: str,
        prompt_column: str,
        target_column: str,
        config_name: str | None = None,
        revision: str | None = None,
        extra_prompt_column: str | None = None,
        train: str = "train",
        validation: str = "validation",
        test: str = "test",
        streaming: bool = False,
    ) -> None:
        self.path = path
        self.name = "-".join(part for part in (path.rstrip("/").rsplit("/", 1)[-1], config_name) if part)
        self.config_name = config_name
        self.revision = revision
        self.prompt_column = prompt_column
        self.target_column = target_column
        self.extra_prompt_column = extra_prompt_column
        self.splits: dict[Split, str] = {"train": train, "validation": validation, "test": test}
        self.streaming = streaming
        self._loaded: dict[Split, Dataset | IterableDataset] = {}

    def prepare(self) -> None:
        """Download into the cache of `datasets`; a streamed dataset has nothing to prepare."""
        if not self.streaming:
            self._raw("train")

    def load(self, split: Split) -> Dataset | IterableDataset:
        """Return a split with the columns id, prompt and target.

        Raises:
            UserError: if dataset, split or a column does not exist, or no row has texts.
        """
        raw = self._raw(split)
        columns = {key: column for key in COLUMN_KEYS if (column := getattr(self, key)) is not None}
        self._check_columns(raw, columns)
        arguments = {"with_indices": True, "fn_kwargs": {"columns": columns}, "features": FEATURES}
        if isinstance(raw, IterableDataset):
            return raw.map(_stream_example, remove_columns=raw.column_names, **arguments).filter(_has_texts)
        examples = raw.map(_example, remove_columns=raw.column_names, desc=f"reading {split}", **arguments)
        kept = np.flatnonzero(_with_texts(examples))
        if len(kept) == len(examples):
            return examples
        empty = len(examples) - len(kept)
        log.warning("%s: left out %d of %d rows of %s, which have no text", self.name, empty, len(examples), split)
        return examples.select(kept)

    def fingerprint(self) -> str:
        """Hash what names the data; of a downloaded dataset also the versions of its files that `datasets` noted."""
        columns = [str(getattr(self, key)) for key in COLUMN_KEYS]
        parts = [self.path, str(self.config_name), str(self.revision), *columns, *self.splits.values()]
        if not self.streaming:
            parts += [self._version(split) for split in SPLITS]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def _version(self, split: Split) -> str:
        try:
            return str(self._raw(split)._fingerprint)
        except UserError:
            return f"no {split}"  # it is no mistake until somebody asks for it

    def _raw(self, split: Split) -> Dataset | IterableDataset:
        if split not in self._loaded:
            self._loaded[split] = self._download(split)
        return self._loaded[split]

    def _download(self, split: Split) -> Dataset | IterableDataset:
        name = self.splits[split]
        try:
            loaded: Dataset | IterableDataset = load_dataset(
                self.path, self.config_name, split=name, revision=self.revision, streaming=self.streaming
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(
                f"dataset {self.path!r} ({name}) cannot be loaded: {reason[:300]} "
                f"(data.source.init_args.path, config_name, revision, {split})"
            ) from error
        return loaded

    def _check_columns(self, raw: Dataset | IterableDataset, columns: dict[str, str]) -> None:
        """Look for the columns in the first row, which has the nested ones too."""
        first = next(iter(raw.take(1)), None)
        if first is None:
            raise UserError(f"dataset {self.path!r} has no rows in {', '.join(self.splits.values())} (data.source)")
        for key, column in columns.items():
            value: Any = first
            for part in column.split("."):
                if not isinstance(value, dict) or part not in value:
                    found = ", ".join(value) if isinstance(value, dict) else "no columns within it"
                    raise UserError(
                        f"dataset {self.path!r} has no column {column!r}: no {part!r}; found {found} "
                        f"(data.source.init_args.{key})"
                    )
                value = value[part]


def _example(row: dict[str, Any], index: int, columns: dict[str, str]) -> dict[str, str]:
    name = row.get("id")
    parts = [_text(row, columns[key]) for key in ("prompt_column", "extra_prompt_column") if key in columns]
    prompt = "\n".join(part for part in parts if part)
    return {
        "id": str(index if name is None else name),
        "prompt": prompt,
        "target": _text(row, columns["target_column"]),
    }


def _stream_example(row: dict[str, Any], index: int, columns: dict[str, str]) -> dict[str, str]:
    """Make an example whose id holds on every rank and worker: each of them counts its rows from 0."""
    example = _example(row, index, columns)
    if row.get("id") is None:
        example["id"] = hashlib.sha256(f"{example['prompt']}\0{example['target']}".encode()).hexdigest()[:16]
    return example


def _with_texts(examples: Dataset) -> NDArray[np.bool_]:
    """Tell for each row whether prompt and target have text, in Arrow, without making Python strings."""
    table = examples.with_format("arrow")[:]
    lengths = [pc.utf8_length(pc.utf8_trim_whitespace(table[name])).to_numpy() for name in ("prompt", "target")]
    return np.minimum(*lengths) > 0


def _has_texts(example: dict[str, str]) -> bool:
    return bool(example["prompt"].strip() and example["target"].strip())


def _text(row: dict[str, Any], column: str) -> str:
    """Follow a dotted column name into nested values; nothing there is no text."""
    value: Any = row
    for part in column.split("."):
        value = None if value is None else value[part]
    return "" if value is None else str(value)
