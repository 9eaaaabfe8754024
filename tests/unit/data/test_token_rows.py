"""Rows of ids as arrays: the same ids as the data set has, from any chunk, shuffled, and in another process."""

import pickle

import numpy as np
from datasets import Dataset, concatenate_datasets

from llmslm.data.token_rows import TokenRows


def data_set(*sizes):
    draw = np.random.default_rng(0)
    parts = [
        {"id": [str(i) for i in range(size)]}
        | {name: [draw.integers(0, 9, draw.integers(1, 5)).tolist() for _ in range(size)] for name in ("a", "b")}
        for size in sizes
    ]
    return concatenate_datasets([Dataset.from_dict(part) for part in parts])


def test_rows_are_those_of_the_data_set():
    rows = data_set(3, 1, 7)
    for data in (rows, rows.shuffle(seed=1), rows.select(range(2, 9))):
        wanted = [*range(len(data))][::-1]
        expected = [{name: row[name] for name in ("a", "b")} for row in data.select(wanted).to_list()]
        for opened in (TokenRows(data), pickle.loads(pickle.dumps(TokenRows(data)))):
            assert len(opened) == len(data)
            found = opened.__getitems__(wanted)
            assert [{name: ids.tolist() for name, ids in row.items()} for row in found] == expected
