"""Datasets of the Hugging Face hub, or local folders in its format, by `datasets.load_dataset`; streaming too."""

import hashlib
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset

from llmslm.data.sources.base import Source, Split
from llmslm.errors import UserError


class HubDataset(Source):
    """A dataset by its hub name or local folder.

    Args:
        path: hub name ("wmt14", "abisee/cnn_dailymail") or folder.
        config_name: configuration of the dataset ("de-en", "3.0.0").
        revision: commit, tag or branch of the hub repository.
        prompt_column: column of the given text; a dot reaches into a nested column ("translation.en").
        target_column: column of the text to produce.
        extra_prompt_column: second part of the prompt ("input" in Alpaca), appended on a line of its own where not empty.
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
        self.splits: dict[str, str] = {"train": train, "validation": validation, "test": test}
        self.streaming = streaming

    def prepare(self) -> None:
        """Download into the cache of `datasets`; a streamed dataset has nothing to prepare."""
        if not self.streaming:
            self._raw("train")

    def load(self, split: Split) -> Dataset | IterableDataset:
        """Return a split with the columns id, prompt and target.

        Raises:
            UserError: if dataset, split or a column does not exist.
        """
        raw = self._raw(split)
        features = raw.features or {}
        if features:
            for key in ("prompt_column", "target_column", "extra_prompt_column"):
                self._check_column(key, features)
        kwargs: dict[str, Any] = {} if isinstance(raw, IterableDataset) else {"desc": f"reading {split}"}
        return raw.map(self._example, with_indices=True, remove_columns=list(features) or None, **kwargs)

    def fingerprint(self) -> str:
        """Hash what names the data; of a downloaded dataset also the fingerprint that `datasets` computed."""
        parts = [
            self.path,
            self.config_name,
            self.revision,
            self.prompt_column,
            self.target_column,
            str(self.splits),
        ]
        if not self.streaming:
            parts += [self._raw(split)._fingerprint for split in ("train",)]
        return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]

    def _raw(self, split: Split) -> Dataset | IterableDataset:
        try:
            loaded = load_dataset(
                self.path,
                self.config_name,
                split=self.splits[split],
                revision=self.revision,
                streaming=self.streaming,
            )
        except (OSError, ValueError, ConnectionError) as error:
            raise UserError(
                f"dataset {self.path!r} ({self.splits[split]}) cannot be loaded: {str(error).splitlines()[0]} "
                f"(data.source.init_args.path, config_name, {split})"
            ) from error
        assert not isinstance(loaded, DatasetDict | IterableDatasetDict)
        return loaded

    def _check_column(self, key: str, features: Any) -> None:
        column = getattr(self, key)
        if column is not None and column.partition(".")[0] not in features:
            raise UserError(
                f"dataset {self.path!r} has no column {column!r}; found {', '.join(features)} (data.source.init_args.{key})"
            )

    def _example(self, row: dict[str, Any], index: int) -> dict[str, str]:
        prompt = _value(row, self.prompt_column)
        extra = _value(row, self.extra_prompt_column) if self.extra_prompt_column else ""
        target = _value(row, self.target_column)
        return {
            "id": str(row.get("id", index)),
            "prompt": f"{prompt}\n{extra}" if extra else prompt,
            "target": target,
        }


def _value(row: dict[str, Any], column: str) -> str:
    """Follow a dotted column name into nested values."""
    value: Any = row
    for part in column.split("."):
        value = value[part]
    return str(value)
