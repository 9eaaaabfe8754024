"""Sample predictions of the systems side by side, and whether the files still are what was scored."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.examples import text_hash
from evaluation.leaderboard.rows import Row
from evaluation.predictions import read_predictions
from llmslm.errors import UserError

CHANGED = "predictions differ from the record"
UNREADABLE = "predictions unreadable"


@dataclass(frozen=True)
class Sample:
    """One example with what each system made of it."""

    id: str
    prompt: str
    reference: str
    predictions: dict[str, str]
    """By the labels of the rows."""

    def by_text(self) -> dict[str, list[str]]:
        """Group the systems that wrote the same."""
        groups: dict[str, list[str]] = {}
        for system, text in self.predictions.items():
            groups.setdefault(text, []).append(system)
        return groups


def read_samples(rows: Sequence[Row], count: int = 12) -> list[Sample]:
    """Choose examples that all systems of a task predicted, at random but always the same ones.

    A row whose predictions are not those that were scored is marked and left out; so is, without a mark, one whose file
    is not there (it need not be kept), and one of other examples than the first row's.

    Args:
        rows: of one task and machine; the path in a record's `predictions` must be one from here.
        count: examples to choose.
    """
    tables = {row.label: table for row in rows if (table := _read(row)) and _same_examples(row, rows[0])}
    if not tables:
        return []
    shared = set.intersection(*(set(table) for table in tables.values()))
    first = next(iter(tables.values()))
    chosen = sorted(shared, key=lambda name: hashlib.sha256(name.encode()).digest())[:count]
    return [
        Sample(
            name,
            first[name]["prompt"],
            first[name]["reference"],
            {system: table[name]["prediction"] for system, table in tables.items()},
        )
        for name in chosen
    ]


def _same_examples(row: Row, other: Row) -> bool:
    return bool(row.record["hashes"]["references"] == other.record["hashes"]["references"])


def _read(row: Row) -> dict[str, dict[str, Any]] | None:
    path = Path(row.record["predictions"])
    if not path.is_file():
        return None
    try:
        lines = read_predictions(path)
    except UserError:
        row.marks.append(UNREADABLE)
        return None
    found = text_hash([line["id"] for line in lines], [line["prediction"] for line in lines])
    if found != row.record["hashes"]["predictions"]:
        row.marks.append(CHANGED)
        return None
    return {line["id"]: line for line in lines}
