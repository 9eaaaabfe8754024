"""Local files of prompts and targets: JSONL (one object a line) or Parquet."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from llmslm.data.sources.base import Source, Split
from llmslm.errors import UserError


class TextFiles(Source):
    """Examples in local files, one file a split.

    Args:
        train: path of a .jsonl or .parquet file.
        validation: the same.
        test: the same.
        prompt_column: column of the given text.
        target_column: column of the text to produce.
    """

    name = "files"

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        prompt_column: str = "prompt",
        target_column: str = "target",
    ) -> None:
        self.paths: dict[str, str | None] = {"train": train, "validation": validation, "test": test}
        self.prompt_column = prompt_column
        self.target_column = target_column

    def prepare(self) -> None:
        """Read all files once, so that a mistake in the last one shows before the training starts."""
        for split in ("train", "validation", "test"):
            if self.paths[split] is not None:
                self.load(split)  # type: ignore[arg-type]

    def load(self, split: Split) -> Dataset:
        """Read a split; ids are line or row numbers, from 1.

        Raises:
            UserError: for a missing file or column, a broken line, an empty text or a file without rows.
        """
        given = self.paths[split]
        if given is None:
            raise UserError(f"there is no {split} file; set data.source.init_args.{split}")
        path = Path(given)
        if not path.is_file():
            raise UserError(f"{path} does not exist (data.source.init_args.{split})")
        if path.suffix == ".jsonl":
            rows = self._read_jsonl(path)
        elif path.suffix == ".parquet":
            rows = self._read_parquet(path)
        else:
            raise UserError(f"{path} is neither .jsonl nor .parquet (data.source.init_args.{split})")
        if not rows:
            raise UserError(f"{path} has no rows (data.source.init_args.{split})")
        ids, prompts, targets = zip(*rows, strict=True)
        return Dataset.from_dict({"id": list(ids), "prompt": list(prompts), "target": list(targets)})

    def fingerprint(self) -> str:
        """Hash the files' bytes."""
        digest = hashlib.sha256()
        for split, path in sorted(self.paths.items()):
            if path is not None and Path(path).is_file():
                digest.update(split.encode() + hashlib.sha256(Path(path).read_bytes()).digest())
        return digest.hexdigest()[:16]

    def _read_jsonl(self, path: Path) -> list[tuple[str, str, str]]:
        rows = []
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno})"
                    ) from error
                if not isinstance(record, dict):
                    raise UserError(
                        f"{path}, line {number}: expected an object, found {type(record).__name__}"
                    )
                rows.append(self._row(path, f"line {number}", str(record.get("id", number)), record))
        return rows

    def _read_parquet(self, path: Path) -> list[tuple[str, str, str]]:
        try:
            records = pq.read_table(path).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
        rows = enumerate(records, start=1)
        return [
            self._row(path, f"row {number}", str(record.get("id", number)), record) for number, record in rows
        ]

    def _row(self, path: Path, place: str, name: str, record: dict[str, Any]) -> tuple[str, str, str]:
        texts = []
        for key, column in (("prompt_column", self.prompt_column), ("target_column", self.target_column)):
            if column not in record:
                raise UserError(
                    f"{path}, {place}: no column {column!r}; found {', '.join(record) or 'none'} "
                    f"(data.source.init_args.{key})"
                )
            if not isinstance(record[column], str) or not record[column].strip():
                raise UserError(f"{path}, {place}: {column} is empty or no text; every example needs one")
            texts.append(record[column])
        return name, texts[0], texts[1]
