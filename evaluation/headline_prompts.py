"""Prompts without targets for the headline experiment: the LLM writes labels for texts that it was not trained on.

    python -m evaluation.headline_prompts --data runs/headline/data --out runs/headline/prompts

Writes en_it.parquet (texts of this release of Debian and others, in no split of the translation), spliced.parquet
(texts that nobody wrote: each the beginning of one and the end of another), summary.parquet (descriptions of other
releases) and recombined.parquet (descriptions whose paragraphs come from two). What is held out of either task is in
none of them. Needs apt and the network.
"""

import argparse
import hashlib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random

import pyarrow.parquet as pq

from evaluation.headline_data import HELD_OUT, LANGUAGE, SUMMARY, TAGS, TRANSLATION, Rows, rows_of, tagged, write_rows
from llmslm.data.sources import DebianSummary
from llmslm.data.sources.base import SPLITS, Split
from llmslm.errors import UserError

RELEASES = ("trixie", "sid")
"""Whose packages have further texts; sid's change from day to day."""
MAX_CHARS = 750
"""Of a text to translate: the shortest of those that do not fit into the recipe's 256 tokens has 767."""
SPLICED = 150_000
RECOMBINED = 200_000
JOINTS = ("for", "of", "to", "with", "from", "in", "by", "on", "using", "that", "which", "and")
"""Words at which texts are joined."""


def prepare(out: Path, data: Path) -> dict[str, int]:
    """Write the prompts beyond a prepared folder; return their numbers by file."""
    translation, summary = ({split: _untagged(data / name / f"{split}.parquet") for split in SPLITS} for name in TAGS)
    sources = [DebianSummary(release=release, **HELD_OUT) for release in RELEASES]
    others = [row for source in sources for row in rows_of(source, "train")]
    known = {row["prompt"] for rows in translation.values() for row in rows} | _held_out(summary)
    found = dict.fromkeys(text for row in (*summary["train"], *others) for text in _texts(row))
    new = [text for text in found if text not in known and len(text) <= MAX_CHARS]
    spliced = splices([row["prompt"] for row in translation["train"]] + new, SPLICED)
    described = [row["prompt"] for row in summary["train"]]
    seen = {*described, *_held_out(summary)}
    further = _without(dict.fromkeys(row["prompt"] for row in others), seen)
    prompts: Mapping[str, tuple[str, Iterable[str]]] = {
        TRANSLATION: (LANGUAGE, new),
        "spliced": (LANGUAGE, _without(spliced, known | set(new))),
        SUMMARY: (SUMMARY, further),
        "recombined": (SUMMARY, _without(recombined(described + further, RECOMBINED), seen | set(further))),
    }
    return {name: write_rows(out / f"{name}.parquet", _as_rows(*given)) for name, given in prompts.items()}


def _untagged(path: Path) -> Rows:
    """Read a task's split, its texts as they were before they were told apart by a tag.

    Raises:
        UserError: if they were not.
    """
    rows: Rows = pq.read_table(path).to_pylist()
    tag = f"{TAGS[path.parent.name]}: "
    if not all(row["prompt"].startswith(tag) for row in rows):
        raise UserError(f"prompts in {path} do not begin with {tag!r}: remove its folder, and run make headline-data")
    return [row | {"prompt": row["prompt"].removeprefix(tag)} for row in rows]


def splices(texts: Sequence[str], count: int, seed: int = 1) -> list[str]:
    """Return texts that begin as one of `texts` and end as another, joined at a preposition that both have.

    Args:
        texts: what is joined; each begins as many, wherever it can be cut.
        count: how many at most.
        seed: of the choice.
    """
    words = [text.split() for text in texts]
    cuts = [[at for at, word in enumerate(row) if word in JOINTS and 0 < at < len(row) - 1] for row in words]
    ends: dict[str, list[tuple[int, int]]] = {joint: [] for joint in JOINTS}
    for number, places in enumerate(cuts):
        for at in places:
            ends[words[number][at]].append((number, at))
    random = Random(seed)
    made: dict[str, None] = {}
    for number in random.choices([number for number, places in enumerate(cuts) if places], k=2 * count):
        at = random.choice(cuts[number])
        other, behind = random.choice(ends[words[number][at]])
        text = " ".join(words[number][:at] + words[other][behind:])
        if other != number and len(text) <= MAX_CHARS:
            made[text] = None
    return list(made)[:count]


def recombined(texts: Sequence[str], count: int, seed: int = 1) -> list[str]:
    """Return texts of paragraphs that begin as one of `texts` and end as that one or another, or stop before.

    Args:
        texts: of one paragraph or more, each a line.
        count: how many at most.
        seed: of the choice.
    """
    random = Random(seed)
    split = [text.split("\n") for text in texts]
    made: dict[str, None] = {}
    for first, other in zip(random.choices(split, k=2 * count), random.choices(split, k=2 * count), strict=True):
        begin = first[: random.randint(1, len(first))]
        end = other[random.randint(1, len(other)) :]
        text = "\n".join([*begin, *(line for line in end if line not in begin)])
        if len(text) <= MAX_CHARS:
            made[text] = None
    return list(made)[:count]


def _held_out(summary: Mapping[Split, Rows]) -> set[str]:
    """Validation's and test's texts of the summaries, whole and by paragraph."""
    return {text for split in SPLITS[1:] for row in summary[split] for text in (row["prompt"], *_texts(row))}


def _texts(row: Mapping[str, str]) -> list[str]:
    return [text for text in (*row["prompt"].split("\n"), row["target"]) if text]


def _without(texts: Iterable[str], known: Container[str]) -> list[str]:
    return [text for text in texts if text not in known]


def _as_rows(tag: str, texts: Iterable[str]) -> Rows:
    return [tagged(tag, {"id": hashlib.sha256(text.encode()).hexdigest()[:16], "prompt": text}) for text in texts]


def main(args: list[str] | None = None) -> None:
    """Write them from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/headline/prompts"), metavar="DIR")
    parser.add_argument("--data", type=Path, default=Path("runs/headline/data"), metavar="DIR")
    options = parser.parse_args(args)
    print(json.dumps(prepare(options.out, options.data), indent=2))


if __name__ == "__main__":
    main()
