"""Targets written by the LLM: its predictions for a source's prompts, as Parquet files that `TextFiles` reads.

A folder holds manifest.json (which LLM, tokens, data and limit), predictions/SPLIT (shards of consecutive examples,
each complete when it appears) and, made of these, SPLIT.parquet, the report labels.json and recipe.yaml, an overlay
that trains on them. A stopped call goes on where it was, and another gate costs no second run of the LLM. The source
may be of prompts alone: then there is no gold target, and nothing to measure a prediction's length by.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Dataset

from llmslm.data.sources.base import SPLITS, Split, has_targets
from llmslm.distillation.job import Job, add_arguments, claim, load_job
from llmslm.errors import UserError
from llmslm.predict_file import Progress, Prompt, Throughput, predict_batch, predict_window
from llmslm.system import Generation
from llmslm.writing import file_aside, write_text

VERSION = 2
SHARD_EXAMPLES = 4096  # what a kill loses at most, and the window that is sorted by length
MANIFEST = "manifest.json"
REPORT = "labels.json"
RECIPE = "recipe.yaml"
FAILURES = ("unfinished", "short", "long", "empty")
FAILURES_ALONE = ("unfinished", "empty")
"""Of predictions that there is no gold target for."""
GATE = (0.5, 2.0)
Failed = Literal["drop", "gold"]
_SHARD = pa.schema(
    {"id": pa.string(), "prompt": pa.string(), "gold_target": pa.string(), "gold_tokens": pa.int64()}
    | {"prediction": pa.string(), "tokens": pa.int64()}
)
_COLUMNS = pa.schema([(name, pa.string()) for name in ("id", "prompt", "target", "gold_target", "gate")])


@dataclass(frozen=True)
class Gate:
    """Which predictions become targets: those that ended and are about as long as the gold target, if there is one.

    Args:
        low: fewest tokens produced per token of the gold target.
        high: most of them.
        limit: tokens of a prediction; one that fills it counts as unfinished.

    Raises:
        UserError: if nothing can pass.
    """

    low: float
    high: float
    limit: int

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise UserError(f"--gate {self.low} {self.high} was given; expected LOW below HIGH, neither negative")

    def verdict(self, row: dict[str, Any]) -> str:
        """Return "passed", or why a prediction fails: "empty", "unfinished", "short" or "long"."""
        if not row["prediction"].strip():
            return "empty"
        if row["tokens"] >= self.limit:
            return "unfinished"
        if row["gold_tokens"] is None:
            return "passed"
        if row["tokens"] < self.low * row["gold_tokens"]:
            return "short"
        return "long" if row["tokens"] > self.high * row["gold_tokens"] else "passed"


def main(args: Sequence[str]) -> None:
    """Run `llmslm label`.

    Raises:
        UserError: for mistakes in the arguments, the recipe or the data.
    """
    options, overrides = _parser().parse_known_args(args)
    for key, number in (("batch-size", options.batch_size), ("max-new-tokens", options.max_new_tokens)):
        if number is not None and number < 1:
            raise UserError(f"--{key} {number} was given; expected 1 or more")
    out = Path(options.out)
    for path in (out / f"{split}.parquet" for split in options.splits):
        if path.is_file() and not (out / MANIFEST).is_file():
            raise UserError(f"{path} is there and was not written by llmslm label; give a folder of its own (--out)")
    job = load_job(options, overrides)
    limit = options.max_new_tokens or job.system.codec.text_format.max_target_tokens
    low, high = options.gate or GATE
    gate = Gate(low, high, limit)
    for split in options.splits:  # what is missing shows before hours of work
        _check_gold(job, split, options)
    claim(out / MANIFEST, {"version": VERSION, "max_new_tokens": limit} | job.identity)
    shards: dict[Split, list[Path]] = {}
    for split in options.splits:
        shards[split], throughput = predict_split(job, split, out, limit, options.batch_size)
        sys.stderr.write(f"{split}: {throughput}\n")
    if left := sum(not path.is_file() for paths in shards.values() for path in paths):
        sys.stderr.write(f"{left} shards are still with other ranks; the last one writes {out / REPORT}\n")
        return
    reports = {split: write_labels(out, split, paths, gate, options.failed) for split, paths in shards.items()}
    _write_report(job, out, limit, reports)
    for split, report in reports.items():
        sys.stdout.write(f"{out / split}.parquet: {_line(report)}\n")
    configs = " ".join(f"--config {name}" for name in [*options.config, out / RECIPE])
    sys.stdout.write(f"train on it with llmslm fit {configs}\n")


def _check_gold(job: Job, split: Split, options: argparse.Namespace) -> None:
    """Refuse what needs gold targets where there are none; a split that does not exist is refused by its source."""
    needing = [name for name, given in (("--failed gold", options.failed == "gold"), ("--gate", options.gate)) if given]
    if not has_targets(job.source.load(split)) and needing:
        raise UserError(
            f"{needing[0]} was given, but the {split} split has no gold targets; leave it out, or name their column "
            "(data.source.init_args.target_column)"
        )


def predict_split(job: Job, split: Split, out: Path, limit: int, batch_size: int) -> tuple[list[Path], Throughput]:
    """Predict for those prompts of a split that have no prediction yet.

    Args:
        job: system and data.
        split: which.
        out: folder of the labels.
        limit: tokens of a prediction.
        batch_size: prompts decoded together.

    Returns:
        All shards of the split, also those of other ranks, which may not be there yet; and what this call did.
    """
    dataset, size = job.source.load(split), job.ranks.size
    total = -(-len(dataset) // size) if isinstance(dataset, Dataset) else None
    folder, paths, prompts = out / "predictions" / split, [], 0
    done = len(list(folder.glob("[0-9]*.parquet"))) * SHARD_EXAMPLES // size
    with Progress(f"label {split}", total, done) as progress:
        for number, columns in enumerate(dataset.iter(batch_size=SHARD_EXAMPLES)):
            paths.append(folder / f"{number:05d}.parquet")
            if job.ranks.mine(number) and not paths[-1].is_file():
                _write_shard(job, columns, paths[-1], limit, batch_size, progress)
                prompts += len(columns["id"])
    return paths, progress.throughput(prompts)


def write_labels(out: Path, split: Split, shards: list[Path], gate: Gate, failed: Failed) -> dict[str, Any]:
    """Write SPLIT.parquet: id, prompt, target, gold_target (null where there is none) and gate, the verdict.

    Args:
        out: folder of the labels.
        split: which.
        shards: its predictions.
        gate: tells which of them are targets.
        failed: "drop" leaves the others out, "gold" gives them the gold target.

    Returns:
        The report: gate, examples, written, failed (by reason), failed_share, failed_became, tokens, and length_ratio,
        the tokens produced per token of the gold targets. Without these, gate and length_ratio are null.

    Raises:
        UserError: if nothing is left to write.
    """
    counts: Counter[str] = Counter()
    path = out / f"{split}.parquet"
    with file_aside(path) as aside:
        with pq.ParquetWriter(aside, _COLUMNS, compression="zstd") as file:
            for shard in shards:
                rows = [_judged(row, gate) for row in pq.read_table(shard).to_pylist()]
                for row in rows:
                    counts.update({name: row[name] or 0 for name in ("tokens", "gold_tokens")} | {row["gate"]: 1})
                kept = [row for row in rows if failed == "gold" or row["gate"] == "passed"]
                file.write_table(pa.Table.from_pylist(kept, _COLUMNS))
        report = _report(counts, gate, failed)
        if not report["written"]:
            remedy = "" if report["gate"] is None else "widen --gate, keep gold targets with --failed gold, or "
            raise UserError(
                f"none of the {report['examples']} predictions for {split} passed the gate "
                f"({_failures(report)}); {remedy}raise --max-new-tokens"
            )
    return report


def _judged(row: dict[str, Any], gate: Gate) -> dict[str, Any]:
    verdict = gate.verdict(row)
    return row | {"gate": verdict, "target": row["prediction" if verdict == "passed" else "gold_target"]}


def _report(counts: Counter[str], gate: Gate, failed: Failed) -> dict[str, Any]:
    has_gold = counts["gold_tokens"] > 0  # each gold target has its end of sequence at least
    reasons = {reason: counts[reason] for reason in (FAILURES if has_gold else FAILURES_ALONE)}
    failures, passed = sum(reasons.values()), counts["passed"]
    examples = failures + passed
    return {
        "gate": [gate.low, gate.high] if has_gold else None,
        "examples": examples,
        "written": examples if failed == "gold" else passed,
        "failed": reasons,
        "failed_share": failures / max(examples, 1),
        "failed_became": "gold" if failed == "gold" else "dropped",
        "length_ratio": counts["tokens"] / counts["gold_tokens"] if has_gold else None,
        "tokens": counts["tokens"],
    }


def _write_report(job: Job, out: Path, limit: int, reports: dict[Split, dict[str, Any]]) -> None:
    """Write what was done, and the lines that a recipe needs to train on it; splits of earlier calls stay."""
    path = out / REPORT
    splits = json.loads(path.read_text(encoding="utf-8"))["splits"] if path.is_file() else {}
    about = {"checkpoint": job.checkpoint, "system": job.system.name, "max_new_tokens": limit}
    write_text(path, json.dumps(about | {"splits": splits | reports}, indent=1) + "\n")
    files = {split: str((out / f"{split}.parquet").resolve()) for split in SPLITS if split in splits | reports}
    columns = {"prompt_column": "prompt", "target_column": "target"}
    source = {"class_path": "llmslm.data.sources.TextFiles", "init_args": files | columns}
    overlay: dict[str, Any] = {"data": {"source": source}}
    if job.is_own_llm:  # it was trained with the gold data's tokenizer: one made from the labels would be another
        overlay = {
            "model": {"encoder": {"source": str(Path(job.checkpoint).resolve())}},
            "data": {"source": source, "tokenizer": None},
        }
    write_text(out / RECIPE, yaml.safe_dump(overlay, sort_keys=False))


def _line(report: dict[str, Any]) -> str:
    fate = {"dropped": "left out", "gold": "given the gold target"}[report["failed_became"]]
    share = f"{report['written']} of {report['examples']} examples; {100 * report['failed_share']:.1f} %"
    if report["gate"] is None:
        return f"{share} were {fate} ({_failures(report)}); no gold targets to compare lengths with"
    return (
        f"{share} failed the length gate and were {fate} ({_failures(report)}); "
        f"{report['length_ratio']:.2f} tokens per token of the gold targets"
    )


def _failures(report: dict[str, Any]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in report["failed"].items())


def _write_shard(
    job: Job, columns: dict[str, list[str]], path: Path, limit: int, batch_size: int, progress: Progress
) -> None:
    names = zip(columns["id"], columns["prompt"], strict=True)
    window = [Prompt(f"the prompt with id {name}", name, prompt) for name, prompt in names]

    def predict(batch: list[Prompt]) -> list[Generation]:
        return predict_batch(job.system, batch, limit)

    generations = predict_window(predict, window, batch_size, progress)
    table = pa.table(
        {
            "id": columns["id"],
            "prompt": columns["prompt"],
            "gold_target": columns["target"],
            "gold_tokens": _gold_tokens(job, columns),
            "prediction": [generation.text for generation in generations],
            "tokens": [generation.tokens for generation in generations],
        },
        schema=_SHARD,
    )
    with file_aside(path) as aside:
        pq.write_table(table, aside)


def _gold_tokens(job: Job, columns: dict[str, list[Any]]) -> list[int | None]:
    if columns["target"][0] is None:
        return [None] * len(columns["target"])
    return [len(row["target_ids"]) for row in job.system.codec.encode(columns["prompt"], columns["target"])]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmslm label",
        allow_abbrev=False,
        description=(
            "Let the LLM write the targets of a recipe's data. A stopped call goes on where it was; under torchrun the "
            "ranks share the work. Other arguments override the recipe's keys (--data.source.init_args.KEY VALUE)."
        ),
    )
    add_arguments(parser, "folder of the labels: SPLIT.parquet for llmslm.data.sources.TextFiles, and labels.json")
    parser.add_argument(
        "--splits", nargs="+", choices=SPLITS, default=["train", "validation"], help="default: train validation"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="prompts decoded together; default: 32")
    parser.add_argument("--max-new-tokens", type=int, help="default: the system's target limit")
    parser.add_argument(
        "--gate",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help=f"tokens per token of the gold target that a prediction may have; default: {GATE[0]:g} {GATE[1]:g}",
    )
    parser.add_argument(
        "--failed",
        choices=("drop", "gold"),
        default="drop",
        help="examples that fail the gate are left out, or keep the gold target; default: drop",
    )
    return parser
