"""Local files of prompts, with targets or without: JSONL (one object a line) or Parquet."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmslm.data.sources.base import SPLITS, BuiltSource, Example, Split
from llmslm.errors import UserError

_VERSION = 1  # raise it when the reading changes: cached data is then built again
_Record = tuple[str, dict[str, Any]]
"""Where a record stands ("line 3"), and its fields."""


class TextFiles(BuiltSource):
    """Examples in local files, one or several a split.

    An example's id is its `id` field, or else the number of its line or row: 3, or 2:3 in a split's second file.

    Args:
        train: path of a .jsonl or .parquet file, or a list of such paths, read one after another.
        validation: the same.
        test: the same.
        prompt_column: column of the given text.
        target_column: column of the text to produce; null for prompts alone, whose targets are to be written by an LLM.
        cache_dir: see `BuiltSource`.
    """

    name = "files"

    def __init__(
        self,
        train: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        prompt_column: str = "prompt",
        target_column: str | None = "target",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(cache_dir)
        given: dict[Split, str | list[str] | None] = {"train": train, "validation": validation, "test": test}
        self.paths: dict[Split, list[Path]] = {
            split: [Path(path) for path in ([paths] if isinstance(paths, str) else paths)]
            for split, paths in given.items()
            if paths is not None
        }
        self.prompt_column = prompt_column
        self.target_column = target_column

    def key(self) -> dict[str, Any]:
        """The files' bytes and the columns."""
        digests = {
            split: [_digest(path, split) for path in self.paths[split]] for split in SPLITS if split in self.paths
        }
        # Of a single file the digest alone, as before there could be several: its data keeps its name in the cache.
        files = {split: found[0] if len(found) == 1 else found for split, found in digests.items()}
        return {"version": _VERSION, "files": files, "columns": [self.prompt_column, self.target_column]}

    def build(self) -> dict[Split, list[Example]]:
        """Read all files, so that a mistake in the last one shows before the training starts.

        Raises:
            UserError: for a missing column, a broken line, an empty text, an id given twice or a file without rows.
        """
        return {split: self._read(split) for split in SPLITS if split in self.paths}

    def load(self, split: Split) -> Any:
        """Return a split.

        Raises:
            UserError: if there is no file for it, or its file is at fault.
        """
        if split not in self.paths:
            raise UserError(f"there is no {split} file; set data.source.init_args.{split}")
        return super().load(split)

    def _read(self, split: Split) -> list[Example]:
        examples: list[Example] = []
        places: dict[str, str] = {}
        for number, path in enumerate(self.paths[split], start=1):
            records = read_jsonl(path) if path.suffix == ".jsonl" else self._parquet(path)
            before = len(examples)
            examples.extend(self._examples(path, records, places, "" if number == 1 else f"{number}:"))
            if len(examples) == before:
                raise UserError(f"{path} has no rows (data.source.init_args.{split})")
        if not examples:
            raise UserError(f"an empty list of files was given (data.source.init_args.{split})")
        return examples

    def _examples(
        self, path: Path, records: Iterable[_Record], places: dict[str, str], prefix: str
    ) -> Iterator[Example]:
        """Check records and name them; `places` has the ids of the split so far, and where they stand."""
        for place, record in records:
            self._check_columns(f"{path}, {place}", record)
            for column in self._columns:
                if not isinstance(record[column], str) or not record[column].strip():
                    raise UserError(f"{path}, {place}: {column} is empty or no text; every example needs one")
            given = record.get("id")
            name = str(given) if given is not None else prefix + place.rpartition(" ")[2]
            if name in places:
                raise UserError(f"{path}, {place}: id {name!r} is also that of {places[name]}; expected unique ids")
            places[name] = f"{path}, {place}"
            target = None if self.target_column is None else record[self.target_column]
            yield {"id": name, "prompt": record[self.prompt_column], "target": target}

    @property
    def _columns(self) -> list[str]:
        return [self.prompt_column] if self.target_column is None else [self.prompt_column, self.target_column]

    def _check_columns(self, place: str, found: Iterable[str]) -> None:
        for key, column in zip(("prompt_column", "target_column"), self._columns, strict=False):
            if column not in found:
                raise UserError(
                    f"{place}: no column {column!r}; found {', '.join(found) or 'none'} (data.source.init_args.{key})"
                )

    def _parquet(self, path: Path) -> Iterator[_Record]:
        try:
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                self._check_columns(str(path), names)
                columns = [name for name in ("id", *self._columns) if name in names]
                batches = file.iter_batches(columns=columns)
                records = (record for batch in batches for record in batch.to_pylist())
                yield from ((f"row {number}", record) for number, record in enumerate(records, start=1))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _digest(path: Path, split: Split) -> str:
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path} is neither .jsonl nor .parquet (data.source.init_args.{split})")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror} (data.source.init_args.{split})") from error


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each object of a JSON Lines file stands ("line 3"), and its fields; empty lines are skipped.

    Raises:
        UserError: for a line that is no object, at the time when it is reached.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not UTF-8 ({error.reason}, byte {error.start + 1})") from error
            except json.JSONDecodeError as error:
                raise UserError(f"{place}: not valid JSON ({error.msg}, column {error.colno})") from error
            if not isinstance(record, dict):
                raise UserError(f"{place}: expected an object, found {type(record).__name__}")
            yield f"line {number}", record
