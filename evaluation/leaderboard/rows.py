"""From records to leaderboard rows: seeds averaged, compared with the llm, marked where that is unsound."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from evaluation.record import Record
from evaluation.scoring import is_lower_better
from evaluation.systems import LLM, LLM_TO_SLM, SLM
from llmslm.provenance import hardware_name

_ORDER = (LLM, SLM, LLM_TO_SLM)
OTHER_EXAMPLES = "other examples"


@dataclass(frozen=True)
class Cell:
    """One score of a row."""

    value: float | None
    low: float | None
    """95 % interval over examples; None if seeds were averaged."""
    high: float | None
    spread: float | None
    """Standard deviation over training seeds; None for a single one."""
    percent: float | None
    """Of the llm's score on the same references."""
    p_value: float | None
    """Of no difference from the llm; over several seeds the largest."""
    problem: str | None
    signature: str


@dataclass
class Row:
    """One system on one task and machine; several training seeds are one row."""

    system: str
    records: list[Record]
    scores: dict[str, Cell]
    speedup: dict[str, float | None] = field(default_factory=dict)
    """By mode, the llm's median time for a prediction over this system's."""
    same_tokens: bool = True
    """Whether the references are cut into as many tokens as by the llm; if not, perplexity does not compare."""
    marks: list[str] = field(default_factory=list)
    """Why the row does not compare with the others of its task."""

    @property
    def record(self) -> Record:
        """The first of the row's records, for what they share."""
        return self.records[0]

    @property
    def task(self) -> str:
        """Task and split."""
        task = self.record["task"]
        return task["name"] if task["split"] == "test" else f"{task['name']} ({task['split']})"

    @property
    def hardware(self) -> str:
        """The machine, in one short line."""
        return hardware_name(self.record["provenance"]["hardware"])

    def mean(self, read: Callable[[Record], float | None]) -> float | None:
        """Average a number over the row's records; None if one of them lacks it."""
        values = [read(record) for record in self.records]
        return fmean(value for value in values if value is not None) if None not in values else None

    def speed(self, mode: str) -> dict[str, Any] | None:
        """Return the speed entry of a mode at the smallest batch that was measured."""
        entries = [entry for entry in self.record["speed"] if entry["mode"] == mode]
        return min(entries, key=lambda entry: entry["batch_size"]) if entries else None

    def time_s(self, mode: str) -> float | None:
        """Return the median time for a prediction, averaged over seeds."""
        return self.mean(lambda record: _time_s(record, mode))

    def tokens_per_s(self, mode: str) -> float | None:
        """Return the throughput of a mode at the smallest batch, averaged over seeds."""
        return self.mean(lambda record: _first(record, mode, "tokens_per_s"))


def leaderboard_rows(records: Iterable[Record]) -> list[Row]:
    """Make the rows of a leaderboard, ordered by task, machine and system.

    Records of one system that differ in their training seed alone are averaged. Of several records of the
    same checkpoint the newest counts. Rows that do not compare with those of the llm are marked and get no
    percentage and no speed-up.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in _newest(records):
        groups.setdefault(_group(record), []).append(record)
    rows = [Row(group[0]["system"], group, _cells(group)) for group in groups.values()]
    for task in {row.task for row in rows}:
        _relate([row for row in rows if row.task == task])
    return sorted(rows, key=lambda row: (row.task, row.hardware, _rank(row.system), row.system))


def best(rows: Sequence[Row], name: str) -> float | None:
    """Return the best value of a score among rows that were scored on the same examples as the llm."""
    alike = [row for row in rows if OTHER_EXAMPLES not in row.marks and (row.same_tokens or name != "perplexity")]
    values = [cell.value for row in alike if (cell := row.scores.get(name)) and cell.value is not None]
    return (min if is_lower_better(name) else max)(values) if values else None


def _newest(records: Iterable[Record]) -> list[Record]:
    newest: dict[tuple[Any, ...], Record] = {}
    for record in sorted(records, key=lambda record: str(record["provenance"]["date"])):
        newest[(*_group(record), record["hashes"]["checkpoint"])] = record
    return list(newest.values())


def _group(record: Record) -> tuple[Any, ...]:
    """Return all that records of one row share: everything but checkpoint and training seed."""
    task, settings = record["task"], record["settings"]
    return (
        *(record["system"], task["name"], task["split"], task["version"], record["hashes"]["references"]),
        *(hardware_name(record["provenance"]["hardware"]), record["training"].get("recipe")),
        *(settings["dtype"], settings["device"], settings["max_new_tokens"]),
    )


def _cells(group: Sequence[Record]) -> dict[str, Cell]:
    names = [name for name in group[0]["scores"] if all(name in record["scores"] for record in group)]
    return {name: _cell([record["scores"][name] for record in group]) for name in names}


def _cell(entries: Sequence[dict[str, Any]]) -> Cell:
    values = [entry["value"] for entry in entries]
    problem = next((entry["problem"] for entry in entries if "problem" in entry), None)
    tests = [entry["versus_llm"]["p_value"] for entry in entries if "versus_llm" in entry]
    single = len(entries) == 1
    return Cell(
        value=None if None in values else fmean(values),
        low=entries[0]["low"] if single else None,
        high=entries[0]["high"] if single else None,
        spread=None if single or None in values else stdev(values),
        percent=None,
        p_value=max(tests) if len(tests) == len(entries) and None not in tests else None,
        problem=problem,
        signature=entries[0]["signature"],
    )


def _relate(rows: Sequence[Row]) -> None:
    """Compare the rows of one task with its llm and mark those that do not compare."""
    llm = next((row for row in rows if row.system == LLM), rows[0])
    for row in rows:
        row.marks = [*_differences(row, llm), *_flaws(row)]
        row.same_tokens = row.record["length"]["reference_tokens"] == llm.record["length"]["reference_tokens"]
        if llm.system == LLM and row.record["hashes"]["references"] == llm.record["hashes"]["references"]:
            row.scores = {name: _with_percent(name, cell, llm) for name, cell in row.scores.items()}
        row.speedup = {mode: _speedup(row, llm, mode) for mode in ("fixed", "natural")}


def _with_percent(name: str, cell: Cell, llm: Row) -> Cell:
    reference = llm.scores.get(name)
    if cell.value is None or reference is None or not reference.value:
        return cell
    return Cell(**{**cell.__dict__, "percent": 100 * cell.value / reference.value})


def _differences(row: Row, llm: Row) -> list[str]:
    record, other = row.record, llm.record
    differences = {
        f"task version {record['task']['version']}": record["task"]["version"] != other["task"]["version"],
        OTHER_EXAMPLES: record["hashes"]["references"] != other["hashes"]["references"],
        "other hardware": row.hardware != llm.hardware,
        "other dtype": record["settings"]["dtype"] != other["settings"]["dtype"],
        "other token budget": record["settings"]["max_new_tokens"] != other["settings"]["max_new_tokens"],
    }
    return [mark for mark, differs in differences.items() if differs]


def _flaws(row: Row) -> list[str]:
    flaws = {
        "dirty tree": any(record["provenance"]["dirty"] for record in row.records),
        "short": not all(record["length"]["met"] for record in row.records),
        "score is not a number": any(cell.problem for cell in row.scores.values()),
    }
    return [mark for mark, holds in flaws.items() if holds]


def _speedup(row: Row, llm: Row, mode: str) -> float | None:
    """Divide the llm's time by this row's; natural length counts only where neither stops early."""
    alike = llm.system == LLM and not {"other hardware", "other dtype", "other token budget"} & set(row.marks)
    times = row.time_s(mode), llm.time_s(mode)
    if not alike or times[0] is None or times[1] is None:
        return None
    if mode == "natural" and ("short" in row.marks or "short" in llm.marks):
        return None
    return times[1] / times[0]


def _first(record: Record, mode: str, key: str) -> Any:
    entries = [entry for entry in record["speed"] if entry["mode"] == mode]
    return min(entries, key=lambda entry: entry["batch_size"])[key] if entries else None


def _time_s(record: Record, mode: str) -> float | None:
    times = _first(record, mode, "total_s")
    return None if times is None else times["p50"]


def _rank(system: str) -> int:
    base = system.split("/")[0]
    return _ORDER.index(base) if base in _ORDER else len(_ORDER)
