"""The leaderboard as one HTML page that needs no network: sortable, with filters, plots and samples."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from evaluation.leaderboard.plot import break_even, colour, png, quality_speed, svg
from evaluation.leaderboard.rows import Row, best
from evaluation.leaderboard.samples import Sample, read_samples
from evaluation.leaderboard.table import (
    COSTS,
    DIGITS,
    LEGEND,
    MAIN,
    SCORES,
    SIGNIFICANT,
    Cost,
    number,
    parameter_count,
)
from evaluation.scoring import is_lower_better

_FOLDER = Path(__file__).parent
FIRST = tuple(name for name in MAIN if name != "perplexity")
"""Scores left of the speeds; perplexity compares fewer systems than bits per byte."""
SPEED_TITLES = (
    *("system", "length", "batch", "tokens/s"),
    *(f"{what} {point}" for what in ("first token ms,", "further ms,", "all ms,") for point in ("p50", "p90", "p99")),
    *("floor ms", "memory MiB"),
)
"""Of the speeds by batch size; the first seed where there are several."""


@dataclass
class Section:
    """One task on one machine: its plots and samples."""

    task: str
    hardware: str
    samples: list[Sample]
    speeds: list[list[str]]
    """A line each system, mode and batch size, under SPEED_TITLES."""
    drawings: dict[str, str] = field(default_factory=dict)
    """SVG elements by name."""
    images: dict[str, bytes] = field(default_factory=dict)
    """The same as PNG."""

    @property
    def slug(self) -> str:
        """A file name for it."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.task} {self.hardware}".lower()).strip("-")


@dataclass(frozen=True)
class Field:
    """One cell of the page's table."""

    text: str
    sort: float | str | None
    note: str = ""
    """Small print below the number."""
    title: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """One column of the page's table."""

    title: str
    explanation: str
    numeric: bool = True


def sections(rows: Sequence[Row]) -> list[Section]:
    """Draw plots and choose samples of each task and machine; marks rows whose predictions changed."""
    found, labels = [], [row.label for row in rows]
    for task, hardware in dict.fromkeys((row.task, row.hardware) for row in rows):
        chosen = [row for row in rows if (row.task, row.hardware) == (task, hardware)]
        section = Section(task, hardware, read_samples(chosen), _speeds(chosen))
        for name, figure in (
            ("quality-speed", quality_speed(chosen, labels)),
            ("break-even", break_even(chosen, labels)),
        ):
            if figure is not None:
                section.drawings[name] = svg(figure)
                section.images[name] = png(figure)
        found.append(section)
    return found


def _speeds(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for row in rows:
        for entry in row.record["speed"]:
            times = [
                number(entry[name][point], digits, 1e3)
                for name, digits in (("ttft_s", 1), ("tpot_s", 2), ("total_s", 1))
                for point in ("p50", "p90", "p99")
            ]
            floor = number(entry.get("floor_s"), 3, 1e3)
            speed = number(entry["tokens_per_s"])
            memory = number(entry.get("peak_memory_bytes"), 0, 2**-20)
            lines.append([row.label, entry["mode"], str(entry["batch_size"]), speed, *times, floor, memory])
    return sorted(lines, key=lambda line: (line[1], int(line[2])))


def page(rows: Sequence[Row], parts: Sequence[Section]) -> str:
    """Write the page."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["raw"] = Markup
    names = [name for name in SCORES if any(name in row.scores for row in rows)]
    lines = [_fields(row, rows, names) for row in rows]
    said = [any(field.sort is not None for field in fields) for fields in zip(*lines, strict=True)]
    return environment.get_template("page.html").render(
        columns=list(compress(_columns(names, _costs(rows)), said)),
        systems=len({row.system for row in rows}),
        speed_titles=SPEED_TITLES,
        lines=[{"row": row, "fields": list(compress(line, said))} for row, line in zip(rows, lines, strict=True)],
        sections=parts,
        tasks=list(dict.fromkeys(row.task for row in rows)),
        machines=list(dict.fromkeys(row.hardware for row in rows)),
        colour=lambda label: colour(label, [row.label for row in rows]),
        commits=sorted({str(row.record["provenance"]["commit"])[:10] for row in rows}),
        dates=sorted({row.record["provenance"]["date"][:10] for row in rows}),
        signatures=_signatures(rows, names),
        script=Markup((_FOLDER / "page.js").read_text(encoding="utf-8")),
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        legend=LEGEND,
    )


def _costs(rows: Sequence[Row]) -> list[Cost]:
    """Choose the costs that were measured for one of the rows."""
    return [cost for cost in COSTS if any(row.mean(cost.read) is not None for row in rows)]


def _columns(names: Sequence[str], costs: Sequence[Cost]) -> list[Column]:
    better = {name: "lower" if is_lower_better(name) else "higher" for name in names}
    scores = {name: Column(SCORES[name], f"{better[name]} is better") for name in names}
    return [
        Column("system", "as evaluated; a control has its name behind a slash", numeric=False),
        Column("task", "task and split", numeric=False),
        *(scores[name] for name in names if name in FIRST),
        Column("speed-up fixed", "the llm's median time over this system's, every prediction equally long"),
        Column("speed-up natural", "with the end of sequence allowed; only if the length gate is met"),
        Column("first token, ms", "median, natural length, smallest batch"),
        Column("further tokens, ms", "per token, median, natural length, smallest batch"),
        Column("tokens/s", "natural length, smallest batch"),
        *(Column(cost.title, cost.explanation) for cost in costs),
        Column("memory, MiB", "weights and peak of one batch"),
        Column("parameters", "millions, in total; below: read for each generated token"),
        Column("length", "tokens produced over tokens of the references; the gate is 0.9"),
        *(scores[name] for name in names if name not in FIRST),
        Column("hardware", "where it was measured", numeric=False),
    ]


def _fields(row: Row, rows: Sequence[Row], names: Sequence[str]) -> list[Field]:
    peers = [other for other in rows if (other.task, other.hardware) == (row.task, row.hardware)]
    scores = {name: _score(row, name, best(peers, name)) for name in names}
    seeds = f"{len(row.records)} seeds" if len(row.records) > 1 else ""
    return [
        Field(row.label, row.label, note=seeds),
        Field(row.task, row.task, note=row.hardware if len({other.hardware for other in rows}) > 1 else ""),
        *(scores[name] for name in names if name in FIRST),
        _number(row.speedup["fixed"], 2, unit="×"),
        _number(row.speedup["natural"], 2, unit="×"),
        _number(row.mean(lambda record: record["ttft_s"]), 1, 1e3),
        _number(row.mean(lambda record: record["tpot_s"]), 2, 1e3),
        _number(row.mean(lambda record: record["tokens_per_s"]), 1),
        *(_number(row.mean(cost.read), cost.digits, cost.scale) for cost in _costs(rows)),
        _number(row.mean(lambda record: record["peak_memory_bytes"]), 0, 2**-20),
        _number(parameter_count(row), 1, 1e-6, note=number(parameter_count(row, "decoding"), 1, 1e-6)),
        _number(row.mean(lambda record: record["length"]["ratio"]), 2),
        *(scores[name] for name in names if name not in FIRST),
        Field(row.hardware, row.hardware),
    ]


def _score(row: Row, name: str, top: float | None) -> Field:
    cell = row.scores.get(name)
    if cell is None:
        return Field("–", None)
    if cell.value is None:
        return Field("not a number", None, title=cell.problem or "")
    digits = DIGITS.get(name, 1)
    notes = [f"± {number(cell.spread, digits)}"] if cell.spread is not None else []
    if cell.low is not None:
        notes = [f"{number(cell.low, digits)} – {number(cell.high, digits)}"]
    if cell.percent is not None and row.system != "llm" and not is_lower_better(name):
        notes.append(f"{cell.percent:.0f} %")
    star = "*" if cell.p_value is not None and cell.p_value < SIGNIFICANT else ""
    tests = {"llm": cell.p_value, "slm": cell.slm_p_value}
    title = "; ".join(f"p = {p:.3g} against the {other}" for other, p in tests.items() if p is not None)
    return Field(number(cell.value, digits) + star, cell.value, " · ".join(notes), title, cell.value == top)


def _number(value: float | None, digits: int, scale: float = 1.0, unit: str = "", note: str = "") -> Field:
    return Field(number(value, digits, scale, unit), value, note)


def _signatures(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """Return the settings of each score; several if rows differ."""
    return {SCORES[name]: sorted({row.scores[name].signature for row in rows if name in row.scores}) for name in names}
