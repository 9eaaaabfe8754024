"""Rows of ids as arrays over the memory-mapped columns: fetching a batch of them makes no Python list of ids."""

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

Columns = dict[str, tuple[np.ndarray, np.ndarray]]
"""Of each column its ids, one row behind another, and where each row begins and the last one ends."""


class TokenRows:
    """The columns of ids of a tokenised split, by row: an array each, over the file itself.

    Args:
        rows: of the split.
    """

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows
        self._chunks: tuple[np.ndarray, list[Columns]] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, examples: list[int]) -> list[dict[str, np.ndarray]]:
        """Return some rows; torch's loader asks for those of a batch together."""
        if self._chunks is None:
            self._chunks = _open(self._rows)
        firsts, chunks = self._chunks
        numbers = np.searchsorted(firsts, examples, side="right") - 1
        places = np.asarray(examples) - firsts[numbers]
        return [_row(chunks[number], place) for number, place in zip(numbers.tolist(), places.tolist(), strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the arrays behind: a worker opens its own."""
        return self.__dict__ | {"_chunks": None}


def _open(rows: Dataset) -> tuple[np.ndarray, list[Columns]]:
    """Return the first row of each of the table's chunks, and the chunks."""
    table = rows.with_format("arrow")[:]
    names = [field.name for field in table.schema if pa.types.is_list(field.type) or pa.types.is_large_list(field.type)]
    batches = [batch for batch in table.select(names).to_batches() if batch.num_rows]
    chunks = [
        {name: (batch[name].values.to_numpy(), batch[name].offsets.to_numpy()) for name in names} for batch in batches
    ]
    return np.cumsum([0, *(batch.num_rows for batch in batches[:-1])]), chunks


def _row(columns: Columns, place: int) -> dict[str, np.ndarray]:
    return {name: ids[bounds[place] : bounds[place + 1]] for name, (ids, bounds) in columns.items()}
