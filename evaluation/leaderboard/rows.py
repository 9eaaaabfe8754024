"""From records to leaderboard rows: seeds averaged, compared with the llm, marked where that is unsound."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from evaluation.record import Record
from evaluation.scoring import is_lower_better
from evaluation.systems import LLM, LLM_TO_SLM, SLM
from llmslm.provenance import hardware_name

_ORDER = (LLM, SLM, LLM_TO_SLM)
OTHER_EXAMPLES = "other examples"
OTHER_HARDWARE = "other hardware"
OTHER_DTYPE, UNKNOWN_DTYPE = "other dtype", "dtype unknown"
OTHER_BUDGET, OTHER_BATCH = "other token budget", "other batch size"
OTHER_SCORING = "other scoring"
UNTESTED = "not tested against this llm"
_OTHER_SPEED = {OTHER_HARDWARE, OTHER_DTYPE, UNKNOWN_DTYPE, OTHER_BUDGET, OTHER_BATCH}
_TELLING: Sequence[Callable[[Record], str]] = (
    lambda record: str(record["training"].get("recipe") or "no recipe"),
    lambda record: str(record["settings"]["dtype"] or UNKNOWN_DTYPE),
    lambda record: f"{record['settings']['max_new_tokens']} tokens",
    lambda record: f"version {record['task']['version']}",
    lambda record: f"{record['examples']['effective']} examples",
    lambda record: f"references {record['hashes']['references'][:6]}",
    lambda record: f"weights {str(record['hashes']['checkpoint'])[:6]}",
)
"""What may tell the rows of one system apart, the plainest first."""


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
    slm_p_value: float | None
    """The same of the slm."""
    problem: str | None
    signature: str


@dataclass
class Row:
    """One system on one task and machine; several training seeds are one row."""

    system: str
    records: list[Record]
    scores: dict[str, Cell]
    label: str = ""
    """The system, with what tells it from other rows of the same system."""
    speedup: dict[str, float | None] = field(default_factory=dict)
    """By mode, the llm's median time for a prediction over this system's."""
    other_task: bool = False
    """Whether version or examples of the task are others than the newest llm's."""
    llm: "Row | None" = field(default=None, repr=False, compare=False)
    """The llm's row that this one's speed is compared with: same machine, dtype, budget, and recipe if there is one."""
    apart: frozenset[str] = frozenset()
    """Scores that do not compare with the llm's: perplexity over other tokens, likelihood of other references, other
    settings of a metric."""
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

    @property
    def batches(self) -> set[int]:
        """The smallest batch size that was measured; several if the seeds differ, none without speed."""
        sizes = [[entry["batch_size"] for entry in record["speed"]] for record in self.records]
        return {min(each) for each in sizes if each}

    def time_s(self, mode: str) -> float | None:
        """Return the median time for a prediction, averaged over seeds."""
        return self.mean(lambda record: _time_s(record, mode))

    def tokens_per_s(self, mode: str) -> float | None:
        """Return the throughput of a mode at the smallest batch, averaged over seeds."""
        return self.mean(lambda record: _first(record, mode, "tokens_per_s"))


def leaderboard_rows(records: Iterable[Record]) -> list[Row]:
    """Make the rows of a leaderboard, ordered by task, machine and system.

    Records of one system that differ in their training seed alone are averaged. Of several records of the
    same checkpoint the newest counts that says something new: one that compares the same predictions with those of
    another llm does not. Each row is compared with the llm's that it was tested against, or else with that
    which is most like it; rows that do not compare with that of the task's newest llm are marked.
    """
    records = list(records)
    tested = {(record["comparison"], record["system"]): record["hashes"]["predictions"] for record in records}
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in _newest(records):
        groups.setdefault(_group(record), []).append(record)
    trainings = [training for group in groups.values() for training in _trainings(group)]
    rows = [Row(training[0]["system"], training, _cells(training)) for training in trainings]
    for task in {row.task for row in rows}:
        _relate([row for row in rows if row.task == task], tested)
    for place in {(row.task, row.hardware, row.system) for row in rows}:
        _label([row for row in rows if (row.task, row.hardware, row.system) == place])
    return sorted(rows, key=lambda row: (row.task, row.hardware, _rank(row.system), row.label))


def best(rows: Sequence[Row], name: str) -> float | None:
    """Return the best value of a score among rows of one task version and examples; None where all have the same."""
    alike = [row for row in rows if not row.other_task and name not in row.apart]
    values = [cell.value for row in alike if (cell := row.scores.get(name)) and cell.value is not None]
    if len(set(values)) < 2:
        return None
    return (min if is_lower_better(name) else max)(values)


def _newest(records: Iterable[Record]) -> list[Record]:
    newest: dict[tuple[Any, ...], Record] = {}
    for record in sorted(records, key=lambda record: str(record["provenance"]["date"])):
        place = (*_group(record), record["hashes"]["checkpoint"])
        if place not in newest or _says_more(record, newest[place]):
            newest[place] = record
    return list(newest.values())


def _says_more(record: Record, known: Record) -> bool:
    """Whether a later record is more than the same predictions again, beside others of other systems."""
    return bool(record["speed"]) or _scored(record) != _scored(known)


def _scored(record: Record) -> tuple[str, dict[str, tuple[float | None, str]]]:
    scores = {name: (entry["value"], entry["signature"]) for name, entry in record["scores"].items()}
    return record["hashes"]["predictions"], scores


def _group(record: Record) -> tuple[Any, ...]:
    """Return all that records of one row share: everything but checkpoint and training seed."""
    task, settings = record["task"], record["settings"]
    return (
        *(record["system"], task["name"], task["split"], task["version"]),
        *(record["hashes"]["prompts"], record["hashes"]["references"]),
        *(hardware_name(record["provenance"]["hardware"]), record["training"].get("recipe")),
        *(settings["dtype"], settings["device"], settings["max_new_tokens"]),
    )


def _trainings(group: Sequence[Record]) -> list[list[Record]]:
    """Put together what differs in the seed; the same seed trained twice is no further seed but another row.

    Args:
        group: records of one row but for their trainings, oldest first.
    """
    trainings: list[dict[Any, Record]] = []
    for record in reversed(group):
        seed = record["training"].get("seed")
        place = next((each for each in trainings if seed is not None and each.keys().isdisjoint({seed, None})), None)
        if place is None:
            trainings.append({seed: record})
        else:
            place[seed] = record
    return [list(training.values())[::-1] for training in trainings]


def _label(rows: Sequence[Row]) -> None:
    """Tell apart the rows of one system, task and machine, by as little as does it."""
    labels = [row.system for row in rows]
    for tell in _TELLING:
        said = [tell(row.record) for row in rows]
        if len(set(labels)) < len(rows) and len(set(said)) > 1:
            labels = [f"{label}, {each}" for label, each in zip(labels, said, strict=True)]
    for row, label in zip(rows, labels, strict=True):
        row.label = label


def _cells(group: Sequence[Record]) -> dict[str, Cell]:
    names = [name for name in group[0]["scores"] if all(name in record["scores"] for record in group)]
    return {name: _cell([record["scores"][name] for record in group]) for name in names}


def _cell(entries: Sequence[dict[str, Any]]) -> Cell:
    values = [entry["value"] for entry in entries]
    problem = next((entry["problem"] for entry in entries if "problem" in entry), None)
    single = len(entries) == 1
    return Cell(
        value=None if None in values else fmean(values),
        low=entries[0]["low"] if single else None,
        high=entries[0]["high"] if single else None,
        spread=None if single or None in values else stdev(values),
        percent=None,
        p_value=_largest_p(entries, LLM),
        slm_p_value=_largest_p(entries, SLM),
        problem=problem,
        signature=entries[0]["signature"],
    )


def _largest_p(entries: Sequence[dict[str, Any]], other: str) -> float | None:
    found = [entry.get(f"versus_{other}", {}).get("p_value") for entry in entries]
    return None if None in found else max(found)


def _relate(rows: Sequence[Row], tested: Mapping[tuple[str, str], str]) -> None:
    """Compare each row of one task with the llm's most like it; mark what does not compare with the newest llm's.

    Args:
        rows: of one task.
        tested: by comparison and system, the hash of the predictions that the others were tested against.
    """
    llms = [row for row in rows if row.system == LLM] or rows[:1]
    slms = [row for row in rows if row.system == SLM]
    newest = max(llms, key=lambda row: (row.record["task"]["version"], row.record["provenance"]["date"]))
    for row in rows:
        row.marks = [*_differences(row, newest), *_flaws(row)]
        row.other_task = _is_other_task(row, newest)
        likeness = {id(llm): (not _was_tested(row, [llm], tested), *_unlikeness(row, llm)) for llm in llms}
        llm = min(llms, key=lambda llm: (*likeness[id(llm)], llm is not newest))
        row.apart = _apart(row, llm)
        if llm.system == LLM and not _is_other_task(row, llm):
            row.scores = {name: _with_percent(row, name, llm) for name in row.scores}
            if not _was_tested(row, [llm], tested) and any(cell.p_value is not None for cell in row.scores.values()):
                row.marks.append(UNTESTED)
                row.scores = {name: replace(cell, p_value=None) for name, cell in row.scores.items()}
        if not _was_tested(row, slms, tested):
            row.scores = {name: replace(cell, slm_p_value=None) for name, cell in row.scores.items()}
        if llm.system == LLM and not _OTHER_SPEED & set(_differences(row, llm)):
            row.llm = llm
        row.speedup = {mode: _speedup(row, mode) for mode in ("fixed", "natural")}


def _was_tested(row: Row, others: Sequence[Row], tested: Mapping[tuple[str, str], str]) -> bool:
    """Say whether a row's p-values are against predictions of these rows, so far as that shows: without rows it is."""
    shown = {record["hashes"]["predictions"] for other in others for record in other.records}
    systems = {other.system for other in others}
    return all(tested.get((record["comparison"], system)) in shown for record in row.records for system in systems)


def _apart(row: Row, llm: Row) -> frozenset[str]:
    """Name the scores that do not compare with the llm's."""
    record, other = row.record, llm.record
    apart = {
        name
        for name, cell in row.scores.items()
        if name in llm.scores and _settings(cell) != _settings(llm.scores[name])
    }
    if record["examples"]["likelihood"] != other["examples"]["likelihood"]:
        apart |= {"perplexity", "bits_per_byte"}
    if record["length"]["reference_tokens"] != other["length"]["reference_tokens"]:
        apart.add("perplexity")
    return frozenset(apart)


def _settings(cell: Cell) -> str:
    """Return a score's signature without that of the bootstrap."""
    return cell.signature.partition("|bs:")[0]


def _unlikeness(row: Row, llm: Row) -> tuple[bool, int]:
    recipes = [each.record["training"].get("recipe") for each in (row, llm)]
    return recipes[0] != recipes[1], len(_differences(row, llm))


def _is_other_task(row: Row, llm: Row) -> bool:
    return bool({_version(row), OTHER_EXAMPLES} & set(_differences(row, llm)))


def _version(row: Row) -> str:
    return f"task version {row.record['task']['version']}"


def _with_percent(row: Row, name: str, llm: Row) -> Cell:
    cell, reference = row.scores[name], llm.scores.get(name)
    if cell.value is None or reference is None or not reference.value or name in row.apart:
        return cell
    return replace(cell, percent=100 * cell.value / reference.value)


def _differences(row: Row, llm: Row) -> list[str]:
    record, other = row.record, llm.record
    dtype = record["settings"]["dtype"]
    differences = {
        _version(row): record["task"]["version"] != other["task"]["version"],
        OTHER_EXAMPLES: any(record["hashes"][part] != other["hashes"][part] for part in ("prompts", "references")),
        OTHER_HARDWARE: row.hardware != llm.hardware,
        UNKNOWN_DTYPE if dtype is None else OTHER_DTYPE: dtype != other["settings"]["dtype"],
        OTHER_BUDGET: record["settings"]["max_new_tokens"] != other["settings"]["max_new_tokens"],
        OTHER_BATCH: bool(row.batches and llm.batches) and (row.batches != llm.batches or len(row.batches) > 1),
        OTHER_SCORING: bool(_apart(row, llm) - {"perplexity", "bits_per_byte"}),
    }
    return [mark for mark, differs in differences.items() if differs]


def _flaws(row: Row) -> list[str]:
    flaws = {
        "dirty tree": any(record["provenance"]["dirty"] for record in row.records),
        "decoded by generate()": row.system in _ORDER and any(map(_by_generate, row.records)),
        "short": not all(record["length"]["met"] for record in row.records),
        "score is not a number": any(cell.problem for cell in row.scores.values()),
    }
    return [mark for mark, holds in flaws.items() if holds]


def _by_generate(record: Record) -> bool:
    return bool(record["settings"].get("decoder") == "generate")


def _speedup(row: Row, mode: str) -> float | None:
    """Divide the llm's time by this row's; natural length counts only where neither stops early."""
    if row.llm is None:
        return None
    times = row.time_s(mode), row.llm.time_s(mode)
    if times[0] is None or times[1] is None:
        return None
    if mode == "natural" and not all(record["length"]["met"] for record in (*row.records, *row.llm.records)):
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
