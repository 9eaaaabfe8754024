"""The leaderboard as text: Markdown for people, CSV for spreadsheets."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from evaluation.leaderboard.rows import Row, best
from evaluation.record import Record

SCORES = {
    "bleu": "BLEU",
    "smoothed_bleu": "smoothed BLEU",
    "chrf": "chrF",
    "chrf_plus_plus": "chrF++",
    "ter": "TER",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "rouge_lsum": "ROUGE-Lsum",
    "comet": "COMET",
    "bertscore": "BERTScore",
    "exact_match": "exact match",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
}
"""Scores in the order and the words in which they are shown."""
DIGITS = {"perplexity": 2, "bits_per_byte": 3}
"""Digits after the point; one for all others."""
MAIN = ("bleu", "smoothed_bleu", "chrf", "rouge_l", "comet", "bertscore", "perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Cost:
    """What a token costs, in a column that is shown where it was measured."""

    key: str
    title: str
    explanation: str
    read: Callable[[Record], float | None]
    digits: int
    scale: float


COSTS = (
    Cost(
        "floor_s",
        "floor, ms",
        "per token: weights and caches read once at the measured copy bandwidth; fixed length, smallest batch",
        lambda record: next((entry["floor_s"] for entry in record["speed"] if "floor_s" in entry), None),
        3,
        1e3,
    ),
    Cost(
        "token_flops",
        "MFLOPs/token",
        "operations of each further token, batch 1",
        lambda record: record.get("cost", {}).get("token_flops"),
        1,
        1e-6,
    ),
    Cost(
        "token_joules",
        "J/token",
        "GPU energy at fixed length, batch 1",
        lambda record: record.get("cost", {}).get("token_joules"),
        3,
        1,
    ),
)
SIGNIFICANT = 0.05
LEGEND = (
    "± half the 95 % bootstrap interval (with several seeds: standard deviation over them); "
    f"* differs from the llm with p < {SIGNIFICANT} (paired bootstrap); % of llm: BLEU / chrF / ROUGE-L. "
    "First token and further tokens: natural length, smallest batch, median. "
    "Speed-up: the llm's median time for a prediction over this system's, at fixed and at natural length "
    "(the latter only if both produce at least 0.9 of the reference's length)."
)


def markdown_table(rows: Sequence[Row]) -> str:
    """Write one table a task."""
    parts = []
    for task in dict.fromkeys(row.task for row in rows):
        chosen = [row for row in rows if row.task == task]
        parts += [f"### {task}", "", *_markdown(chosen), ""]
    return "\n".join([*parts, LEGEND])


def csv_table(rows: Sequence[Row]) -> str:
    """Write one line a row, with every score, its interval and its test."""
    lines = [_flat(row) for row in rows]
    keys = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def number(value: float | None, digits: int = 1, scale: float = 1.0, unit: str = "") -> str:
    """Format a number with its unit, or a dash for none."""
    return "–" if value is None else f"{value * scale:,.{digits}f}{unit}"


def parameter_count(row: Row, name: str = "total") -> float | None:
    """Return a parameter count of the row."""
    return row.mean(lambda record: record["parameters"].get(name))


def _markdown(rows: Sequence[Row]) -> list[str]:
    left_out = "bits_per_byte" if not any("perplexity" in row.apart for row in rows) else "perplexity"
    scores = [name for name in MAIN if name != left_out and any(name in row.scores for row in rows)]
    hardware = len({row.hardware for row in rows}) > 1
    columns: dict[str, Callable[[Row], str]] = {"system": _name}
    for name in scores:
        columns[SCORES[name]] = partial(_score, name=name, top=best(rows, name))
    columns |= {
        "% of llm": _percents,
        "first token": lambda row: number(row.mean(lambda record: record["ttft_s"]), 1, 1e3, " ms"),
        "further tokens": lambda row: number(row.mean(lambda record: record["tpot_s"]), 2, 1e3, " ms"),
        "tokens/s": lambda row: number(row.mean(lambda record: record["tokens_per_s"])),
        "speed-up fixed": lambda row: _times(row.speedup["fixed"]),
        "speed-up natural": lambda row: _times(row.speedup["natural"]),
        "memory": lambda row: number(row.mean(lambda record: record["peak_memory_bytes"]), 0, 2**-20, " MiB"),
        "parameters": lambda row: number(parameter_count(row), 1, 1e-6, " M"),
        "length": lambda row: number(row.mean(lambda record: record["length"]["ratio"]), 2),
    }
    if hardware:
        columns["hardware"] = lambda row: row.hardware
    if any(row.marks for row in rows):
        columns["marks"] = lambda row: ", ".join(row.marks)
    cells = {title: [write(row) for row in rows] for title, write in columns.items()}
    shown = {title: texts for title, texts in cells.items() if set(texts) != {number(None)}}
    lines = ["| " + " | ".join(shown) + " |", "|" + " --- |" * len(shown)]
    return lines + ["| " + " | ".join(texts) + " |" for texts in zip(*shown.values(), strict=True)]


def _name(row: Row) -> str:
    return row.label if len(row.records) == 1 else f"{row.label} ({len(row.records)} seeds)"


def _score(row: Row, name: str, top: float | None) -> str:
    cell = row.scores.get(name)
    if cell is None:
        return "–"
    if cell.value is None:
        return "not a number"
    around = cell.spread
    if around is None and cell.low is not None and cell.high is not None:
        around = (cell.high - cell.low) / 2
    star = "*" if cell.p_value is not None and cell.p_value < SIGNIFICANT else ""
    digits = DIGITS.get(name, 1)
    text = number(cell.value, digits)
    return f"{f'**{text}**' if cell.value == top else text} ± {number(around, digits)}{star}"


def _percents(row: Row) -> str:
    cells = [row.scores.get(name) for name in ("bleu", "chrf", "rouge_l")]
    return " / ".join(number(cell.percent if cell else None) for cell in cells)


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def _flat(row: Row) -> dict[str, Any]:
    record = row.record
    line: dict[str, Any] = {
        "task": row.task,
        "task_version": record["task"]["version"],
        "system": row.system,
        "seeds": len(row.records),
        "recipe": record["training"].get("recipe"),
        "examples": record["examples"]["effective"],
    }
    for name, cell in row.scores.items():
        fields = ("value", "low", "high", "spread", "percent", "p_value", "slm_p_value")
        line |= {name if key == "value" else f"{name}_{key}": getattr(cell, key) for key in fields}
    for key in ("ttft_s", "tpot_s", "tokens_per_s", "peak_memory_bytes"):
        line[key] = row.mean(lambda record, key=key: record[key])  # type: ignore[misc]
    line |= {cost.key: row.mean(cost.read) for cost in COSTS}
    for mode, value in row.speedup.items():
        line |= {f"time_s_{mode}": row.time_s(mode), f"speedup_{mode}": value}
    line |= {f"parameters_{name}": parameter_count(row, name) for name in record["parameters"]}
    return line | {
        "length_ratio": row.mean(lambda record: record["length"]["ratio"]),
        "hardware": row.hardware,
        "dtype": record["settings"]["dtype"],
        "commit": record["provenance"]["commit"],
        "date": record["provenance"]["date"],
        "marks": "; ".join(row.marks),
    }
