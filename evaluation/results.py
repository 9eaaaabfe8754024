"""The headline's results in docs and README, made from committed records and from nothing else.

    python -m evaluation.results --collect runs/headline     # take over the records of a series, then write the pages
    python -m evaluation.results                             # write the pages
    python -m evaluation.results --check                     # exit 1 if a page is not what the records make it

Records lie in `evaluation/records/headline/<stage>/`, with `stages.json` (command, seconds and commit of each stage),
`differences.json` (test predictions in which the verified mode differs from the llm) and `labels.json` (what became of
the labels). What was measured goes into `evaluation/targets.json`, too. Without records there are no pages, and README
has no table between two marks.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.benchmarks.report import mistakes_in_one_line
from evaluation.headline_claims import SEEDS, SUMMARY, TRANSLATION, Results, claims, record_claims
from evaluation.leaderboard import build, publish
from evaluation.leaderboard.rows import Row, leaderboard_rows
from evaluation.leaderboard.table import SCORES, SIGNIFICANT, markdown_table, number, parameter_count
from evaluation.predictions import read_predictions
from evaluation.record import SUFFIX, Record, read_record
from evaluation.series import BEFORE, STATE, read_state
from evaluation.systems import LLM, LLM_TO_SLM, SLM
from llmslm.errors import UserError
from llmslm.writing import write_text

ROOT = Path(__file__).parent.parent
RECORDS = "evaluation/records/headline"
STAGES, DIFFERENCES, LABELS = "stages.json", "differences.json", "labels.json"
PAGE, FOLDER = "docs/results/headline.md", "docs/results/headline"
COMMAND = "python -m evaluation.results"
COLLECT = f"make headline && {COMMAND} --collect runs/headline"
BEGIN, END = f"<!-- made by {COMMAND} -->", "<!-- end of what is made -->"
TITLES = {
    "en_it": "English to Italian (debian-translation)",
    "summary": "Synopses (debian-summary)",
    "t5_en_it": "T5 1.1 as the LLM: English to Italian",
    "smollm2_summary": "SmolLM2-135M as the LLM: synopses",
    "smollm2_docstrings": "SmolLM2-135M as the LLM: docstrings",
}
SHOWN = {"en_it": ("bleu", "chrf"), "t5_en_it": ("bleu", "chrf")}
SHOWN_ELSE = ("rouge_l", "bleu")
VARIANTS = {
    "quality": "as above",
    "quality_gold": "gold targets",
    "quality_first": "labels of the training prompts alone",
    "quality_novel": "labels of further prompts alone",
    "quality_distilled": "labels and logits of the LLM",
    "quality_mlp": "the paper's projector",
    "quality_unread": "the LLM's embeddings alone",
    "quality_deeper": "a projector of eight layers",
    "quality_longer": "twice the steps",
    "quality_four": "SLM of four layers, 25M",
    "quality_small": "SLM from nothing, 7M",
    "quality_replace": "replace",
    "quality_cross": "cross-attention",
    "quality_layer_6": "states of layer 6",
    "quality_layer_last": "states of the last layer",
    "quality_read": "encoder-decoder SLM",
    "quality_llm_alone": "LLM without the mixture",
    "quality_llm_tuned": "LLM tuned to the task",
}
"""By stage: what it compares."""
SETUP = """\
Three systems answer the same prompts: the LLM alone; a small model (SLM) alone; and the same SLM told by the frozen
LLM's states, which are computed once (llm_to_slm). SLM-only and llm_to_slm are trained by the same code on the same
targets for the same number of steps, and evaluated at their best checkpoint by validation BLEU. All decode greedily in
bf16, on the project's engine unless a row says otherwise; whether the verified mode writes what the LLM writes is told
in float32. Test examples are of packages that training never saw.
Intervals and p-values are of the bootstrap over test examples, paired between systems.
"""
LIMITS = """\
- There is one LLM for both tasks, trained once, as a pretrained one would be: seeds and intervals speak of the SLMs
  and of the test examples.
- The texts are descriptions of one distribution's packages, whose phrases repeat. Packages of one source are on one
  side of the split, but scores do not carry over to other texts.
- BLEU, chrF and ROUGE-L count words and letters in common with one reference; nobody judged the texts.
- What llm_to_slm gains over SLM-only is not all due to the LLM's states: its projector is trained to read, and has
  about as many parameters as the SLM. What it gains on the LLM's embeddings alone, which no layer has read, is told by
  the row of that name, or, where there is none, by validation in the [log](log.md).
- Speed is that of one GPU with nothing else on it, of these prompts' lengths, in bf16.
"""


def collect(runs: Path, records: Path) -> None:
    """Copy the records of all complete stages, and what else the pages say about them.

    Raises:
        UserError: if there is no complete stage.
    """
    folders = [path.parent for path in runs.rglob(STATE) if path.parent.suffix != BEFORE]
    states = {folder.relative_to(runs).as_posix(): read_state(folder) for folder in folders}
    complete = {name: state for name, state in sorted(states.items()) if state["complete"]}
    if not complete:
        raise UserError(f"{runs} has no complete stage; run llmslm-eval experiment --series headline (--collect)")
    differences, labels = {}, {}
    for name in complete:
        found = sorted((runs / name).glob(f"*{SUFFIX}"))
        shutil.rmtree(records / name, ignore_errors=True)
        for path in found:
            target = records / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        if name.endswith("/verified"):
            differences[name.split("/")[0]] = differing(found)
        if report := _read(runs / name / LABELS):
            labels[name] = report["splits"]["train"]
    kept = {name: {key: state[key] for key in ("command", "seconds", "commit")} for name, state in complete.items()}
    for file, new in ((STAGES, kept), (DIFFERENCES, differences), (LABELS, labels)):
        write_text(records / file, json.dumps(_read(records / file) | new, indent=2) + "\n")


def differing(paths: Sequence[Path]) -> int:
    """Count the examples whose prediction by the verified mode is not the llm's."""
    texts = {}
    for path in paths:
        record = read_record(path)
        rows = read_predictions(path.parent / record["predictions"])
        texts[record["system"]] = {row["id"]: row["prediction"] for row in rows}
    return sum(text != texts["verified"][name] for name, text in texts[LLM].items())


def load(records: Path) -> Results:
    """Read all that was collected."""
    found: dict[str, list[Record]] = {}
    for path in sorted(records.rglob(f"*{SUFFIX}")):
        found.setdefault(path.parent.relative_to(records).as_posix(), []).append(read_record(path))
    return Results(found, *(_read(records / name) for name in (STAGES, DIFFERENCES, LABELS)))


def pages(root: Path) -> dict[Path, str]:
    """Return the text pages as the records make them."""
    results = load(root / RECORDS)
    readme = (root / "README.md").read_text(encoding="utf-8")
    made = {root / "README.md": with_table(readme, readme_table(results) if results.records else "")}
    if results.records:
        rows = leaderboard_rows(read_record(path) for path in _of_quality(root))
        plots = sorted(path.relative_to(root / FOLDER).as_posix() for path in (root / FOLDER).glob("*/*.png"))
        made[root / PAGE] = report(results, plots)
        made[root / FOLDER / "leaderboard.md"] = markdown_table(rows) + "\n"
    return made


def stale(root: Path) -> list[Path]:
    """Return the pages that are not what the records make them, or are there without records."""
    made = pages(root)
    wrong = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    return wrong + [path for path in [root / PAGE] if path.is_file() and path not in made]


def write(root: Path) -> list[Path]:
    """Write the leaderboard, those of the clock with their plots, and the pages; return the pages.

    The clock's are apart: few examples are timed, and scored elsewhere.
    """
    if quality := _of_quality(root):
        build(quality, root / FOLDER)
    for task in TITLES:
        if timed := sorted((root / RECORDS / task / "speed").glob(f"*{SUFFIX}")):
            on_all = map(read_record, (root / RECORDS / task / "quality").glob(f"*{SUFFIX}"))
            scored = {_trained(record): record for record in on_all}
            publish([_with_test_scores(read_record(path), scored) for path in timed], root / FOLDER / task)
    made = pages(root)
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return list(made)


def _of_quality(root: Path) -> list[Path]:
    """Find the records of what was evaluated on all test examples."""
    return sorted(path for path in (root / RECORDS).rglob(f"*{SUFFIX}") if path.parent.name.startswith("quality"))


def _trained(record: Record) -> tuple[Any, ...]:
    """Say which training of a task a record is of: weights that were rounded since are the same training's."""
    return record["system"], record["training"].get("recipe"), record["training"].get("seed")


def _with_test_scores(record: Record, scored: Mapping[tuple[Any, ...], Record]) -> Record:
    """Give a record of the clock the scores that its training has on all test examples, or none."""
    twin = scored.get(_trained(record))
    if twin is None:
        return record | {"scores": {}}
    return record | {key: twin[key] for key in ("scores", "comparison", "examples", "hashes", "length", "predictions")}


def with_table(readme: str, table: str) -> str:
    """Put a table between README's marks, and the marks behind its first paragraph; no marks where it is empty."""
    if BEGIN in readme:
        before, _, rest = readme.partition(BEGIN + "\n")
        readme = before + rest.partition(END + "\n\n")[2]
    if not table:
        return readme
    heading, _, rest = readme.partition("\n\n")
    paragraph, _, rest = rest.partition("\n\n")
    return f"{heading}\n\n{paragraph}\n\n{BEGIN}\n{table}\n{END}\n\n{rest}"


def readme_table(results: Results) -> str:
    """Write the three systems of both tasks in one table."""
    lines = ["| task | system | parameters | score | % of llm | speed-up |", "| --- " * 6 + "|"]
    for task in (TRANSLATION, SUMMARY):
        for row in _three(results, task):
            name = _shown(task)[0]
            cells = [
                TITLES[task],
                _label(row),
                number(parameter_count(row, "decoding"), 1, 1e-6, " M"),
                _score(row, name),
            ]
            percent = row.scores[name].percent if name in row.scores else None
            ratio = results.ratio(task, LLM, row.system)
            lines.append("| " + " | ".join([*cells, number(percent), number(ratio, 1, unit="x")]) + " |")
    sizes = [str(size) for task in (TRANSLATION, SUMMARY) if (size := results.examples(task))]
    legend = (
        f"Test sets of {' and '.join(sizes)} examples; score: BLEU of translations, ROUGE-L of synopses; "
        "parameters: those read for each token; speed-up: the llm's median time for a prediction over this one's, both "
        "on the decode engine, one prompt at a time. The projector reads the prompt, too; how much of the gain is its "
        f"own and how much the llm's is in the [report]({PAGE}). {results.hardware()}, `make headline`."
    )
    return "\n".join([*lines, "", legend])


def report(results: Results, plots: Sequence[str]) -> str:
    """Write the report: what was claimed and measured, quality, controls, speed, variants, and how it was made.

    Args:
        results: the records.
        plots: of the clock's leaderboards, from their folder.
    """
    parts = [
        "# The headline experiment\n",
        f"Made by `{COMMAND}` from the records in `{RECORDS}`. Setup and reasons: "
        f"[recipes/headline](../../recipes/headline/README.md). Hardware: {results.hardware()}. "
        f"All rows: [leaderboard](headline/leaderboard.md).\n",
        "## Setup\n",
        SETUP,
        "## What was asked and measured\n",
        _table(("claim", "bar", "measured", "met"), claims(results)),
    ]
    for task, title in TITLES.items():
        if results.get(task, "quality"):
            parts += [f"## {title}\n", *_task_parts(results, task)]
    parts += (
        ["## Plots\n", "What was timed; quality is that of all test examples, at a batch of 64.\n"] if plots else []
    )
    parts += [f"![{name.split('.')[-2]}, {name.split('/')[0]}](headline/{name})\n" for name in plots]
    parts += ["## Limits\n", LIMITS]
    stages = [
        (name, number(state["seconds"], 1, 1 / 60), (state["commit"] or "unknown")[:7], f"`{state['command']}`")
        for name, state in results.stages.items()
    ]
    parts += ["## Stages\n", "Minutes as they were: where trainings shared a GPU, longer than alone.\n"]
    parts += [_table(("stage", "minutes", "commit", "command"), stages)]
    return "\n".join(parts)


def _task_parts(results: Results, task: str) -> list[str]:
    names = _shown(task)
    head = (
        "system",
        "parameters",
        *(SCORES[name] for name in names),
        f"% of llm's {SCORES[names[0]]}",
        "p against slm",
    )
    rows = [_quality_cells(row, names) for row in _three(results, task)]
    compared = [stage for stage in VARIANTS if results.get(task, stage)]
    variants = [
        (VARIANTS[stage], *_quality_cells(row, names))
        for stage in compared
        for row in leaderboard_rows(results.get(task, stage))
        if "/" not in row.system and len(compared) > 1
    ]
    texts = {
        f"{results.examples(task)} test examples. ± half the 95 % bootstrap interval, or the deviation over seeds; "
        f"* differs from the llm with p < {SIGNIFICANT}; p: paired bootstrap, the largest of the seeds.": _table(
            head, rows
        ),
        "Controls: no features, and those of another prompt.": _table(
            ("system", SCORES[names[0]], "% of llm_to_slm"), _controls(results, task, names[0])
        ),
        "Time of a prediction, one prompt at a time, up to 128 tokens, median; how much faster at natural length, if "
        "both write at least 0.9 of the reference's tokens.": _table(
            ("system", "natural length, ms", "fixed length, ms", "llm_to_slm is faster by"), _speeds(results, task)
        ),
        "Tokens a second by batch size, fixed length of 128 tokens.": _table(*_batches(results, task)),
        "Variants, each with the llm and the slm that it was compared with.": _table(("comparison", *head), variants),
    }
    return [f"{text}\n\n{table}" for text, table in texts.items() if table] + _label_lines(results, task)


def _label_lines(results: Results, task: str) -> list[str]:
    """Say of each stage that labelled how many of the LLM's labels failed."""
    reports = {name.partition("/")[2]: report for name, report in results.labels.items() if name.startswith(f"{task}/")}
    return [_label_line(stage, reports[stage]) for stage in sorted(reports)]


def _label_line(stage: str, report: Mapping[str, Any]) -> str:
    about, gate = "training prompts", "the length gate"
    if report["gate"] is None:
        about, gate = "further prompts, without gold targets", "to be a text that ended"
    reasons = ", ".join(f"{count} {reason}" for reason, count in report["failed"].items() if count)
    failed = f"{100 * report['failed_share']:.1f} % failed {gate}" + (f" ({reasons})" if reasons else "")
    fate = "kept the gold target" if report["failed_became"] == "gold" else "were left out"
    return f"Stage {stage}: {report['examples']} {about}; {failed} and {fate}.\n"


def _shown(task: str) -> tuple[str, ...]:
    """Name the scores of a task's tables, the one that counts first."""
    return SHOWN.get(task, SHOWN_ELSE)


def _three(results: Results, task: str) -> list[Row]:
    records = [record for stage in SEEDS for record in results.get(task, stage)]
    return [row for row in leaderboard_rows(records) if row.system in (LLM, SLM, LLM_TO_SLM)]


def _label(row: Row) -> str:
    return row.system if len(row.records) == 1 else f"{row.system} ({len(row.records)} seeds)"


def _quality_cells(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    cell = row.scores.get(names[0])
    p_value = cell.slm_p_value if cell else None
    scores = [_score(row, name) for name in names]
    recipe = row.record["training"].get("recipe") or ""
    parameters = number(parameter_count(row), 1, 1e-6, " M")
    label = f"{_label(row)}: {recipe}"
    return label, parameters, *scores, number(cell.percent if cell else None), number(p_value, 3)


def _score(row: Row, name: str) -> str:
    cell = row.scores.get(name)
    if cell is None or cell.value is None:
        return "–"
    around = cell.spread if cell.low is None or cell.high is None else (cell.high - cell.low) / 2
    star = "*" if cell.p_value is not None and cell.p_value < SIGNIFICANT else ""
    return f"{cell.value:.1f} ± {number(around)}{star}"


def _controls(results: Results, task: str, name: str) -> list[tuple[str, ...]]:
    records = {record["system"]: record["scores"][name]["value"] for record in results.get(task, "quality")}
    whole = records.get(LLM_TO_SLM)
    shown = sorted((system, value) for system, value in records.items() if system.startswith(LLM_TO_SLM))
    return [(system, number(value), number(100 * value / whole if whole else None)) for system, value in shown]


def _speeds(results: Results, task: str) -> list[tuple[str, ...]]:
    lines = []
    for record in results.get(task, "speed"):
        system = record["system"]
        times = [results.time_s(task, system, mode) for mode in ("natural", "fixed")]
        cells = [number(time, 1, 1e3) for time in times]
        lines.append((system, *cells, number(results.ratio(task, system, LLM_TO_SLM), 2, unit="x")))
    return sorted(lines, key=lambda line: -(results.time_s(task, line[0]) or 0))


def _batches(results: Results, task: str) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    records = results.get(task, "batches")
    sizes = sorted({entry["batch_size"] for record in records for entry in record["speed"]})
    lines = []
    for record in records:
        by_size = {entry["batch_size"]: entry["tokens_per_s"] for entry in record["speed"] if entry["mode"] == "fixed"}
        lines.append((record["system"], *(number(by_size.get(size), 0) for size in sizes)))
    return ("system", *(f"batch {size}" for size in sizes)), lines


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown; nothing where it has no lines."""
    if not lines:
        return ""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def main(args: list[str] | None = None) -> None:
    """Collect, write or check from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, metavar="DIR", help="folder of the series' runs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    options = parser.parse_args(args)
    if options.check:
        wrong = stale(ROOT)
        print("\n".join(f"{path} is not what the records make it: {COMMAND}" for path in wrong))
        sys.exit(1 if wrong else 0)
    if options.collect:
        collect(options.collect, ROOT / RECORDS)
        record_claims(load(ROOT / RECORDS), COLLECT)
    print("\n".join(str(path) for path in write(ROOT)))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
