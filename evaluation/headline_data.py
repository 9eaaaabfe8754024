"""The data of the headline experiment, as Parquet files: two tasks, and a mixture that the LLM is pretrained on.

    python -m evaluation.headline_data --out runs/headline/data

Needs apt and the network, but no GPU: a machine without them trains from a copy of the folder. The mixture holds the
training pairs of both tasks and those of further languages; what is held out of either task is in no part of it.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmslm.data.sources import DebianSummary, DebianTranslation
from llmslm.data.sources.base import SPLITS, BuiltSource, Example
from llmslm.writing import file_aside, write_text

LANGUAGE = "it"
FURTHER = ("da", "fr", "de", "sk", "pl", "cs", "es")
"""Languages with thousands of pairs, in Latin script: they share the vocabulary."""
SUMMARY = "summary"
HELD_OUT_PERCENT = 4
"""Of the source packages, in validation and in test: over 2,000 test examples of either task."""
TEXTS = ("prompt", "target")


def prepare(out: Path) -> dict[str, int]:
    """Write `en_it/`, `summary/` and `pretrain/`, a Parquet file a split, and sizes.json; return the sizes."""
    tasks: dict[str, BuiltSource] = {"en_it": _translation(LANGUAGE), SUMMARY: DebianSummary(**_HELD_OUT)}
    sizes, held_out = {}, set()
    for name, source in tasks.items():
        for split in SPLITS:
            rows = list(source.load(split))
            sizes[f"{name}/{split}"] = write_rows(out / name / f"{split}.parquet", rows)
            if split != "train":
                held_out |= {row[column] for row in rows for column in TEXTS}
    rows = [row for row in _mixture(tasks) if held_out.isdisjoint(row[column] for column in TEXTS)]
    # Translations of one text stand together, which compresses; training shuffles.
    tagged = [{"prompt": f"{row['tag']}: {row['prompt']}", "target": row["target"]} for row in sorted(rows, key=_text)]
    sizes["pretrain/train"] = write_rows(out / "pretrain" / "train.parquet", tagged)
    write_text(out / "sizes.json", json.dumps(sizes, indent=2) + "\n")
    return sizes


_HELD_OUT: Any = {"held_out_percent": HELD_OUT_PERCENT}


def _translation(language: str) -> BuiltSource:
    return DebianTranslation(language, **_HELD_OUT)


def _mixture(tasks: dict[str, BuiltSource]) -> Iterator[dict[str, str]]:
    """Yield tagged pairs: every language from English, the task's language into English too, and summaries."""
    for language in (LANGUAGE, *FURTHER):
        for row in _train(_translation(language)):
            yield {"tag": language, "prompt": row["prompt"], "target": row["target"]}
            if language == LANGUAGE:
                yield {"tag": "en", "prompt": row["target"], "target": row["prompt"]}
    for row in _train(tasks[SUMMARY]):
        yield {"tag": SUMMARY, "prompt": row["prompt"], "target": row["target"]}


def _train(source: BuiltSource) -> Iterable[Example]:
    rows: Iterable[Example] = source.load("train")
    return rows


def _text(row: dict[str, str]) -> tuple[str, str]:
    """The English text, then the rest: the order of the file."""
    english = row["target"] if row["tag"] == "en" else row["prompt"]
    return english, row["tag"]


def write_rows(path: Path, rows: list[dict[str, str]]) -> int:
    """Write rows as one small Parquet file and return their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
