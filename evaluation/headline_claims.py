"""What the headline experiment measured, beside the bars that were set for it in `evaluation/targets.json`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from evaluation.record import Record
from evaluation.systems import LLM, LLM_TO_SLM, SLM
from evaluation.targets import Target, read_targets, record_measurement
from llmslm.provenance import hardware_name

TRANSLATION, SUMMARY = "en_it", "summary"
PREPARED = ("data", "prompts")
"""Stages that are run beforehand, on a CPU."""
SEEDS = ("quality", "quality_2", "quality_3")


@dataclass(frozen=True)
class Results:
    """The records of the series by stage."""

    records: dict[str, list[Record]]
    stages: dict[str, dict[str, Any]]
    differences: dict[str, int]
    """By task: test predictions in which the verified mode differs from the llm."""
    labels: dict[str, dict[str, Any]]
    """By task: the report of `llmslm label` on the training prompts."""

    def get(self, task: str, stage: str) -> list[Record]:
        """Return the records of a task's stage; none where it has not run."""
        return self.records.get(f"{task}/{stage}", [])

    def one(self, task: str, stage: str, system: str) -> Record | None:
        """Return the record of one system."""
        return next((record for record in self.get(task, stage) if record["system"] == system), None)

    def score(self, task: str, stage: str, system: str, name: str) -> float | None:
        """Return a score."""
        record = self.one(task, stage, system)
        return record["scores"].get(name, {}).get("value") if record else None

    def versus(self, task: str, other: str, name: str, key: str) -> list[float]:
        """Return what a test of llm_to_slm against another system found, of each seed."""
        found = [self.one(task, stage, LLM_TO_SLM) for stage in SEEDS]
        tests = [record["scores"][name].get(f"versus_{other}", {}) for record in found if record]
        return [test[key] for test in tests if test.get(key) is not None]

    def time_s(self, task: str, system: str, mode: str = "natural", stage: str = "speed") -> float | None:
        """Return the median time of a prediction, one prompt at a time."""
        record = self.one(task, stage, system)
        times = [e["total_s"]["p50"] for e in record["speed"] if e["mode"] == mode] if record else []
        return median(times) if times else None

    def ratio(self, task: str, slow: str, fast: str) -> float | None:
        """Return how many times as fast one system is as another, at natural length; None if one stops early."""
        records = self.one(task, "speed", slow), self.one(task, "speed", fast)
        times = self.time_s(task, slow), self.time_s(task, fast)
        met = all(record["length"]["met"] for record in records if record)
        return times[0] / times[1] if met and times[0] and times[1] else None

    def examples(self, task: str) -> int | None:
        """Return the number of test examples."""
        return next((record["examples"]["effective"] for record in self.get(task, "quality")), None)

    def hardware(self) -> str:
        """Name the machines of all records."""
        found = {hardware_name(r["provenance"]["hardware"]) for part in self.records.values() for r in part}
        return ", ".join(sorted(found))


def claims(results: Results) -> list[tuple[str, ...]]:
    """Return claim, bar, measurement and verdict of each target of the headline; a dash where nothing was measured."""
    lines: list[tuple[str, ...]] = []
    for target, value in _measured(results):
        shown = "–" if value is None else f"{value:.4g} {target.unit}".strip()
        verdict = "–" if value is None else "yes" if target.judge(value) else "no"
        lines.append((target.text, f"{target.comparison} {target.bar:g} {target.unit}".strip(), shown, verdict))
    return lines


def record_claims(results: Results, command: str) -> None:
    """Write what was measured into the list of targets, with the commit that measured it.

    Args:
        results: the records.
        command: what makes them.
    """
    commits = {record["provenance"]["commit"] for part in results.records.values() for record in part}
    origin: dict[str, Any] = {"hardware": results.hardware(), "commit": ", ".join(sorted(filter(None, commits)))}
    for target, value in _measured(results):
        if value is not None:
            record_measurement(target.id, float(f"{value:.6g}"), command, **origin)


def _measured(results: Results) -> list[tuple[Target, float | None]]:
    targets = read_targets(topic="headline")
    return [(target, MEASURE[target.id](results) if target.id in MEASURE else None) for target in targets]


def _above_slm(*stages: str) -> Callable[[Results], float | None]:
    """The LLM against the best SLM of these stages."""

    def measure(results: Results) -> float | None:
        llm = results.score(TRANSLATION, "quality", LLM, "bleu")
        found = [results.score(TRANSLATION, stage, SLM, "bleu") for stage in stages]
        slms = [value for value in found if value is not None]
        return llm - max(slms) if llm is not None and slms else None

    return measure


def _longest(results: Results) -> float | None:
    """Of the stages that need a GPU."""
    return max((state["seconds"] / 60 for name, state in results.stages.items() if name not in PREPARED), default=None)


def _fewest(results: Results) -> float | None:
    return _least([results.examples(task) for task in (TRANSLATION, SUMMARY)])


def _differences(results: Results) -> float | None:
    """Of both tasks: one alone would not be all test examples."""
    found = [results.differences.get(task) for task in (TRANSLATION, SUMMARY)]
    return sum(count for count in found if count is not None) if None not in found else None


def _least(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return min(value for value in found if value is not None) if found and None not in found else None


def _kept(task: str, name: str) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        percents = results.versus(task, LLM, name, "percent")
        return fmean(percents) if percents else None

    return measure


def _beats_slm(task: str, name: str) -> Callable[[Results], float | None]:
    """The largest p-value over the seeds; 1 where llm_to_slm is the worse one."""

    def measure(results: Results) -> float | None:
        values = results.versus(task, SLM, name, "p_value")
        worse = any(difference <= 0 for difference in results.versus(task, SLM, name, "difference"))
        return (1.0 if worse else max(values)) if values else None

    return measure


def _ratio(slow: str, fast: str = LLM_TO_SLM) -> Callable[[Results], float | None]:
    return lambda results: results.ratio(TRANSLATION, slow, fast)


def _lost(control: str) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        whole = results.score(TRANSLATION, "quality", LLM_TO_SLM, "bleu")
        left = results.score(TRANSLATION, "quality", f"{LLM_TO_SLM}/{control}", "bleu")
        return 100 * (1 - left / whole) if whole and left is not None else None

    return measure


MEASURE: dict[str, Callable[[Results], float | None]] = {
    "llm-above-slm": _above_slm("quality", "quality_gold"),
    "llm-above-slm-gold": _above_slm("quality_gold"),
    "recipe-minutes": _longest,
    "test-examples": _fewest,
    "kept-bleu": _kept(TRANSLATION, "bleu"),
    "kept-chrf": _kept(TRANSLATION, "chrf"),
    "kept-rouge-l": _kept(SUMMARY, "rouge_l"),
    "p-translation": _beats_slm(TRANSLATION, "bleu"),
    "p-summary": _beats_slm(SUMMARY, "rouge_l"),
    "speedup-engine": _ratio(LLM),
    "speedup-generate": _ratio("llm_generate"),
    "speedup-assisted": _ratio("assisted"),
    "verified-differences": _differences,
    "verified-speedup": _ratio(LLM, "verified"),
    "control-zero": _lost("zero_features"),
    "control-shuffled": _lost("shuffled_features"),
}
"""By the target's id."""
