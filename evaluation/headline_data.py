"""The data of the headline experiment, as Parquet files: two tasks, and a mixture that the LLM is pretrained on.

    python -m evaluation.headline_data --out runs/headline/data
    python -m evaluation.headline_data --out runs/headline/prompts --beyond runs/headline/data

Needs apt and the network, but no GPU: a machine without them trains from a copy of the folder. The mixture holds the
training pairs of both tasks and those of further languages; what is held out of either task is in no part of it.
Docstrings, for the second pair of models, are those of the packages that are installed here. The second command writes
prompts without targets, for the LLM to translate: English texts in no split of the translation, of the summaries and of
other releases of Debian.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
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
HELD_OUT: Any = {"held_out_percent": 4}
"""Of the source packages, in validation and in test: over 2,000 test examples of either task."""
FURTHER_RELEASES = ("trixie", "sid")
"""Whose packages have further texts; sid's change from day to day."""
MAX_CHARS = 750
"""Of a further prompt: the shortest of those that do not fit into the recipe's 256 tokens has 767."""


def prepare(out: Path) -> dict[str, int]:
    """Write a folder each task, a Parquet file a split, and sizes.json; return the sizes."""
    sources: dict[str, BuiltSource] = {
        TRANSLATION: DebianTranslation(LANGUAGE, **HELD_OUT),
        SUMMARY: DebianSummary(**HELD_OUT),
        DOCSTRINGS: Docstrings(),
    }
    parts = {name: {split: _rows(source, split) for split in SPLITS} for name, source in sources.items()}
    parts[PRETRAIN] = {
        "train": mixture(parts[TRANSLATION], parts[SUMMARY]),
        "validation": [_tagged(LANGUAGE, row) for row in parts[TRANSLATION]["validation"]],
    }
    files = {f"{name}/{split}": rows for name, splits in parts.items() for split, rows in splits.items()}
    sizes = {name: write_rows(out / f"{name}.parquet", rows) for name, rows in files.items()}
    write_text(out / "sizes.json", json.dumps(sizes, indent=2) + "\n")
    return sizes


def mixture(translation: dict[Split, Rows], summary: dict[Split, Rows]) -> Rows:
    """Return tagged training pairs: each language from English, the task's into English too, and synopses."""
    held_out = {row[c] for part in (translation, summary) for s in SPLITS[1:] for row in part[s] for c in COLUMNS}
    pairs = [(row["prompt"], LANGUAGE, row) for row in translation["train"]]
    pairs += [(row["prompt"], "en", {"prompt": row["target"], "target": row["prompt"]}) for _, _, row in pairs]
    pairs += [(row["prompt"], SUMMARY, row) for row in summary["train"]]
    for language in FURTHER:
        pairs += [(row["prompt"], language, row) for row in _rows(DebianTranslation(language, **HELD_OUT), "train")]
    kept = [pair for pair in pairs if held_out.isdisjoint(pair[2][column] for column in COLUMNS)]
    kept.sort(key=lambda pair: pair[:2])  # what is made of one text stands together, which compresses
    return [_tagged(tag, row) for _, tag, row in kept]


def further_prompts(
    translation: dict[Split, Rows], summary: dict[Split, Rows], others: Sequence[dict[str, str]] = ()
) -> Rows:
    """Return the summaries' training texts, paragraph by paragraph, as prompts that the translation has not.

    What is held out of either task is none either, and no text is longer than the recipes read to the end.

    Args:
        translation: by split.
        summary: by split.
        others: training rows of further summaries.
    """
    known = {row["prompt"] for rows in translation.values() for row in rows}
    known |= {text for split in SPLITS[1:] for row in summary[split] for text in (row["prompt"], *_texts(row))}
    found = dict.fromkeys(text for row in (*summary["train"], *others) for text in _texts(row))
    kept = [text for text in found if text not in known and len(text) <= MAX_CHARS]
    return [{"id": hashlib.sha256(text.encode()).hexdigest()[:16], "prompt": text} for text in kept]


def prepare_prompts(out: Path, data: Path) -> dict[str, int]:
    """Write train.parquet, the further prompts beyond a prepared folder; return its size."""
    translation, summary = (
        {split: pq.read_table(data / name / f"{split}.parquet").to_pylist() for split in SPLITS}
        for name in (TRANSLATION, SUMMARY)
    )
    others = [DebianSummary(release=release, **HELD_OUT) for release in FURTHER_RELEASES]
    rows = further_prompts(translation, summary, [row for source in others for row in _rows(source, "train")])
    return {"train": write_rows(out / "train.parquet", rows)}


def _texts(row: dict[str, str]) -> list[str]:
    return [text for text in (*row["prompt"].split("\n"), row["target"]) if text]


def _rows(source: BuiltSource, split: Split) -> Rows:
    return list(source.load(split))


def _tagged(tag: str, row: dict[str, str]) -> dict[str, str]:
    return {"prompt": f"{tag}: {row['prompt']}", "target": row["target"]}


def write_rows(path: Path, rows: Rows) -> int:
    """Write rows as one small Parquet file and return their number."""
    with file_aside(path) as aside:
        pq.write_table(pa.Table.from_pylist(rows), aside, compression="zstd", compression_level=19)
    return len(rows)


def main(args: list[str] | None = None) -> None:
    """Prepare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/headline/data"), metavar="DIR")
    parser.add_argument(
        "--beyond", type=Path, metavar="DIR", help="write prompts that the prepared data in DIR has not, nothing else"
    )
    options = parser.parse_args(args)
    sizes = prepare(options.out) if options.beyond is None else prepare_prompts(options.out, options.beyond)
    print(json.dumps(sizes, indent=2))


if __name__ == "__main__":
    main()
