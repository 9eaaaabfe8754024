"""The data of the headline experiment, as Parquet files: two tasks, and a mixture that the LLM is pretrained on.

    python -m evaluation.headline_data --out runs/headline/data

Needs apt and the network, but no GPU: a machine without them trains from a copy of the folder. The mixture holds the
training pairs of both tasks and those of further languages; what is held out of either task is in no part of it.
Docstrings, for the second pair of models, are those of the packages that are installed here.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmslm.data.sources import DebianSummary, DebianTranslation, Docstrings
from llmslm.data.sources.base import SPLITS, BuiltSource, Split
from llmslm.writing import file_aside, write_text

Rows = list[dict[str, str]]

COLUMNS = ("prompt", "target")
LANGUAGE = "it"
FURTHER = ("da", "fr", "de", "sk", "pl", "cs", "es")
"""Languages with thousands of pairs, in Latin script: they share the vocabulary."""
TRANSLATION, SUMMARY, DOCSTRINGS, PRETRAIN = "en_it", "summary", "docstrings", "pretrain"
TAGS = {TRANSLATION: LANGUAGE, SUMMARY: SUMMARY}
"""What the prompts of either task begin with, so that one LLM does both."""
HELD_OUT: Any = {"held_out_percent": 4}
"""Of the source packages, in validation and in test: over 2,000 test examples of either task."""


def prepare(out: Path) -> dict[str, int]:
    """Write a folder each task, a Parquet file a split, and sizes.json; return the sizes."""
    sources: dict[str, BuiltSource] = {
        TRANSLATION: DebianTranslation(LANGUAGE, **HELD_OUT),
        SUMMARY: DebianSummary(**HELD_OUT),
        DOCSTRINGS: Docstrings(),
    }
    parts = {name: {split: rows_of(source, split) for split in SPLITS} for name, source in sources.items()}
    mixed = mixture(parts[TRANSLATION], parts[SUMMARY])
    for name, tag in TAGS.items():
        parts[name] = {split: [tagged(tag, row) for row in rows] for split, rows in parts[name].items()}
    parts[PRETRAIN] = {"train": mixed, "validation": parts[TRANSLATION]["validation"]}
    files = {f"{name}/{split}": rows for name, splits in parts.items() for split, rows in splits.items()}
    sizes = {name: write_rows(out / f"{name}.parquet", rows) for name, rows in files.items()}
    write_text(out / "sizes.json", json.dumps(sizes, indent=2) + "\n")
    return sizes


def mixture(translation: dict[Split, Rows], summary: dict[Split, Rows]) -> Rows:
    """Tag training pairs of splits without tags: each language from English, the task's into English, and synopses."""
    held_out = {row[c] for part in (translation, summary) for s in SPLITS[1:] for row in part[s] for c in COLUMNS}
    pairs = [(row["prompt"], LANGUAGE, row) for row in translation["train"]]
    pairs += [(row["prompt"], "en", {"prompt": row["target"], "target": row["prompt"]}) for _, _, row in pairs]
    pairs += [(row["prompt"], SUMMARY, row) for row in summary["train"]]
    for language in FURTHER:
        pairs += [(row["prompt"], language, row) for row in rows_of(DebianTranslation(language, **HELD_OUT), "train")]
    kept = [pair for pair in pairs if held_out.isdisjoint(pair[2][column] for column in COLUMNS)]
    kept.sort(key=lambda pair: pair[:2])  # what is made of one text stands together, which compresses
    return [tagged(tag, {column: row[column] for column in COLUMNS}) for _, tag, row in kept]


def rows_of(source: BuiltSource, split: Split) -> Rows:
    """Return a split's rows."""
    return list(source.load(split))


def tagged(tag: str, row: dict[str, str]) -> dict[str, str]:
    """Say in a row's prompt which task it is of."""
    return row | {"prompt": f"{tag}: {row['prompt']}"}


def write_rows(path: Path, rows: Rows) -> int:
    """Write rows as one small Parquet file and return their number."""
    with file_aside(path) as aside:
        pq.write_table(pa.Table.from_pylist(rows), aside, compression="zstd", compression_level=19)
    return len(rows)


def main(args: list[str] | None = None) -> None:
    """Prepare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/headline/data"), metavar="DIR")
    print(json.dumps(prepare(parser.parse_args(args).out), indent=2))


if __name__ == "__main__":
    main()
