"""The examples that systems are evaluated on: prompts with references, from a recipe's source or a file."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmslm.errors import UserError

if TYPE_CHECKING:
    from evaluation.tasks import Task
    from llmslm.data.sources import Source, Split

FILES = (".jsonl", ".parquet")
TARGETS = ("target", "reference")


@dataclass(frozen=True)
class Examples:
    """A split of a data source, or a part of it."""

    task: str
    """Short name, for records and file names."""
    split: str
    fingerprint: str
    """Content hash of the source."""
    original: int | None
    """Examples in the split; None for a stream that was not read to its end."""
    ids: list[str]
    prompts: list[str]
    references: list[str]
    version: int = 1
    """Of the task."""

    def __len__(self) -> int:
        return len(self.ids)

    def hashes(self) -> dict[str, str]:
        """Return content hashes of prompts and references, each with its ids."""
        return {
            "prompts": text_hash(self.ids, self.prompts),
            "references": text_hash(self.ids, self.references),
        }


def text_hash(ids: Sequence[str], texts: Sequence[str]) -> str:
    """Hash texts with their ids, whatever their order (sha256, hex)."""
    lines = sorted(json.dumps([name, text]) for name, text in zip(ids, texts, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load_examples(data: str, split: "Split", limit: int | None, seed: int) -> Examples:
    """Load the examples to evaluate on.

    Args:
        data: a recipe (name or YAML path), whose data source is taken, or a JSONL or Parquet file with prompt
            and target (or reference).
        split: train, validation or test; a single file is its own split.
        limit: evaluate at most so many, drawn with `seed` (of a stream: its first ones).
        seed: of the draw.

    Raises:
        UserError: if the data cannot be read, is empty, or two examples share an id.
    """
    from llmslm.data.sources import TextFiles

    source = _file_source(data, split) if data.endswith(FILES) else _recipe_source(data)
    task = Path(data).stem if isinstance(source, TextFiles) else source.name
    return read_source(source, task, split, limit, seed)


def load_task_examples(name: str, task: "Task", limit: int | None, seed: int) -> Examples:
    """Load the examples of a task; see `load_examples`."""
    return replace(read_source(task.source, name, task.split, limit, seed), version=task.version)


def read_source(source: "Source", task: str, split: "Split", limit: int | None, seed: int) -> Examples:
    """Read a split of a source.

    Raises:
        UserError: if it has no examples, or two of them share an id.
    """
    from llmslm.data.sources.base import load_pairs

    source.prepare()
    rows, original = _take(load_pairs(source, split), limit, seed)
    ids, prompts, references = ([str(row[key]) for row in rows] for key in ("id", "prompt", "target"))
    if not ids:
        raise UserError(f"{task} has no examples in its {split} split (--data, --split)")
    if len(set(ids)) < len(ids):
        twice = next(name for name, count in Counter(ids).items() if count > 1)
        raise UserError(f"{task}: id {twice!r} appears twice in the {split} split; expected unique ids")
    return Examples(task, split, source.fingerprint(), original, ids, prompts, references)


def _recipe_source(data: str) -> "Source":
    from llmslm.recipe import load_source

    return load_source(data)


def _file_source(data: str, split: "Split") -> "Source":
    from llmslm.data.sources import TextFiles

    if not Path(data).is_file():
        raise UserError(f"there is no file {data}; expected a JSONL or Parquet file with prompt and target (--data)")
    return TextFiles(**{split: data}, target_column=_target_column(Path(data)))


def _target_column(path: Path) -> str:
    """Name the column of the references, which files call target or reference."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as lines:
            first = next((line for line in lines if line.strip()), "")
        try:
            columns = set(json.loads(first or "{}"))
        except (json.JSONDecodeError, TypeError):
            return TARGETS[0]  # the source names the broken line
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            columns = set(pq.read_schema(path).names)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is no Parquet file, or a broken one: {error} (--data)") from error
    return next((name for name in TARGETS if name in columns), TARGETS[0])


def _take(dataset: Any, limit: int | None, seed: int) -> tuple[list[dict[str, Any]], int | None]:
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        stream: Iterable[dict[str, Any]] = dataset if limit is None else dataset.take(limit)
        rows = list(stream)
        return rows, len(rows) if limit is None else None
    original = len(dataset)
    if limit is not None and limit < original:
        dataset = dataset.shuffle(seed=seed).select(range(limit))
    return list(dataset), original
