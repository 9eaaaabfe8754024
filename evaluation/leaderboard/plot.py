"""The quality-speed plot with its Pareto front, and the break-even curve."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from evaluation.leaderboard.rows import OTHER_BATCH, OTHER_BUDGET, Cell, Row
from evaluation.leaderboard.table import SCORES
from evaluation.scoring import is_lower_better
from evaluation.systems import LLM, LLM_TO_SLM, SLM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTTED = ("bleu", "chrf", "rouge_l")
COLOURS = {LLM: "#c2410c", SLM: "#0e7490", LLM_TO_SLM: "#6d28d9"}
_OTHERS = ("#4d7c0f", "#be185d", "#475569", "#ca8a04", "#1d4ed8", "#b91c1c", "#f472b6", "#65a30d", "#94a3b8")
_FAR = 20  # times as fast as another row: a scale of logarithms then tells both from zero
_NAMED = 4  # more rows than this are named below the panels: beside points and curves, names would hide them
_INK = "#6b7280"  # read on white and on black
_STYLE: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": _INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "llmslm",
}


def colour(label: str, labels: Sequence[str]) -> str:
    """Return a row's colour: fixed for the three systems, in turn for others."""
    if label in COLOURS:
        return COLOURS[label]
    others = sorted(name for name in set(labels) if name not in COLOURS)
    return _OTHERS[others.index(label) % len(_OTHERS)]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other point beats in both, by rising x.

    Args:
        points: (speed, quality), more is better for both.
    """
    order = sorted(range(len(points)), key=lambda index: (-points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front[::-1]


def quality_speed(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Plot quality over throughput, a panel a score; None if no row has both.

    Rows of other examples or another version of the task, or whose speed is of another batch or length, are left out.

    Args:
        rows: of one task and machine.
        labels: of all rows of the page, which decide about colours.
    """
    rows = [row for row in rows if row.tokens_per_s("fixed") is not None and not row.other_task]
    rows = [row for row in rows if not {OTHER_BATCH, OTHER_BUDGET} & set(row.marks)]
    names = [name for name in PLOTTED if any(_value(row, name) is not None for row in rows)]
    if not names:
        return None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.5 * len(names), 3.1), layout="constrained")
        for name, axes in zip(names, np.atleast_1d(figure.subplots(1, len(names))), strict=True):
            _panel(axes, [row for row in rows if _value(row, name) is not None], name, labels)
            axes.set_xlabel(f"tokens/s, fixed length, batch {_batch(rows)}")
        if len(rows) > _NAMED:
            _name_below(figure, axes, columns=4)
    return figure


def break_even(rows: Sequence[Row], labels: Sequence[str], longest: int = 1024) -> Figure | None:
    """Plot the speed-up over the llm against the length of the prediction; None without an llm.

    The times are those of the fixed-length mode: first token, and so much for each further one. Beyond the length that
    was measured the curves are dotted.
    """
    timed = [(row, row.llm) for row in rows if _line(row) and row.llm is not None and _line(row.llm)]
    if len(timed) < 2:
        return None
    lengths = np.unique(np.geomspace(1, longest, 80).round())
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        axes = figure.subplots()
        for row, llm in timed:
            shade = colour(row.label, labels)
            times, measured = _total(llm, lengths) / _total(row, lengths), lengths <= _length(row)
            axes.plot(lengths[measured], times[measured], color=shade, label=row.label)
            axes.plot(lengths[~measured], times[~measured], color=shade, linestyle=":")
        axes.axhline(1, color=_INK, linewidth=0.6, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set(xlabel="tokens produced", ylabel="times as fast as the llm", ylim=(0, None))
        if len(timed) > _NAMED:
            _name_below(figure, axes, columns=3)
        else:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _name_below(figure: Figure, axes: "Axes", columns: int) -> None:
    """Name the colours below the panels, on a figure that grows by the room that takes."""
    handles, names = axes.get_legend_handles_labels()
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(names) / columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def svg(figure: Figure) -> str:
    """Draw a figure as an SVG element, the same bytes for the same figure."""
    text = io.StringIO()
    with mpl.rc_context(_STYLE):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def png(figure: Figure) -> bytes:
    """Draw a figure as PNG on white."""
    data = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.set_facecolor("white")
        figure.set_dpi(160)
        FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()


def _panel(axes: "Axes", rows: Sequence[Row], name: str, labels: Sequence[str]) -> None:
    points = [(row.tokens_per_s("fixed") or 0.0, _value(row, name) or 0.0) for row in rows]
    sign = -1 if is_lower_better(name) else 1
    front = pareto_front([(x, sign * y) for x, y in points])
    fastest, slowest = max(x for x, _ in points), min(x for x, _ in points)
    left = slowest / 2 if slowest and fastest > _FAR * slowest else 0.0  # on a scale of logarithms
    steps = [(left, points[front[0]][1]), *(points[index] for index in front)]
    axes.plot(*zip(*steps, strict=True), drawstyle="steps-pre", color=_INK, alpha=0.7, linewidth=1.2, zorder=1)
    middle = math.sqrt(left * fastest) if left else fastest / 2
    for row, (x, y) in zip(rows, points, strict=True):
        shade = colour(row.label, labels)
        axes.errorbar(x, y, yerr=_bars(row.scores[name], y), color=shade, fmt="o", capsize=3, zorder=2, label=row.label)
        if len(rows) > _NAMED:
            continue
        offset, side = ((-7, 5), "right") if x > middle else ((7, 5), "left")
        axes.annotate(row.label, (x, y), offset, textcoords="offset points", ha=side, fontsize=8, color=shade)
    axes.set_title(SCORES[name], fontsize=9)
    if left:
        axes.set_xscale("log")
    axes.set_xlim(left, (2 if left else 1.15) * fastest)
    axes.margins(y=0.25)


def _bars(cell: Cell, value: float) -> list[list[float]]:
    """Return the interval around a value as lengths down and up."""
    if cell.low is not None and cell.high is not None:
        return [[max(0.0, value - cell.low)], [max(0.0, cell.high - value)]]
    return [[cell.spread or 0.0], [cell.spread or 0.0]]


def _value(row: Row, name: str) -> float | None:
    return row.scores[name].value if name in row.scores else None


def _batch(rows: Sequence[Row]) -> int:
    entry = rows[0].speed("fixed")
    return int(entry["batch_size"]) if entry else 1


def _length(row: Row) -> int:
    return int(row.record["settings"]["max_new_tokens"])


def _line(row: Row) -> tuple[float, float] | None:
    """Return time to the first token and time per further token."""
    entry = row.speed("fixed")
    if entry is None or entry["tpot_s"]["p50"] is None:
        return None
    return entry["ttft_s"]["p50"], entry["tpot_s"]["p50"]


def _total(row: Row, lengths: np.ndarray) -> np.ndarray:
    first, further = _line(row) or (np.nan, np.nan)
    return np.asarray(first + further * (lengths - 1))
