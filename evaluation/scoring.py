"""From predictions to scores: values, 95 % intervals and paired tests against the llm and the slm."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from evaluation.bootstrap import RESAMPLES, SEED, Floats, Statistics, interval, paired, resample
from llmslm.errors import UserError

METRICS = ("bleu", "chrf", "ter", "rouge", "exact_match", "smoothed_bleu")
WITH_MODEL = ("bertscore", "comet")
"""Metrics that are models themselves; given as name=PATH."""
DEFAULT_METRICS = ("bleu", "chrf", "rouge", "exact_match")
LOWER_IS_BETTER = frozenset({"ter", "perplexity", "bits_per_byte"})
"""Every other score grows with quality."""


@dataclass(frozen=True)
class Scored:
    """A system's statistics with their resampled scores."""

    statistics: dict[str, Statistics]
    drawn: dict[str, Floats]


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuse unknown names, and metrics whose package is missing or too old, before hours are spent on predictions.

    Each is tried on a word, but for those that are models.

    Raises:
        UserError: naming the first one.
    """
    for metric in metrics:
        name, _, model = metric.partition("=")
        if name not in (*METRICS, *WITH_MODEL):
            known = ", ".join([*METRICS, *(f"{each}=PATH" for each in WITH_MODEL)])
            raise UserError(f"unknown metric {name!r}; expected one of {known} (--metrics)")
        if (name in WITH_MODEL) != bool(model):
            expected = f"{name}=PATH, a model on this machine" if name in WITH_MODEL else name
            raise UserError(f"metric {metric!r} was given; expected {expected} (--metrics)")
        if model:
            _check_model(name, model)
        else:
            _try(name)


def _try(name: str) -> None:
    """Score a word: a package of another release may be loaded, and fail when it is used."""
    try:
        score(_known()[name](["word"], ["word"]), resamples=2)
    except Exception as error:  # whatever a package does
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"metric {name} cannot be computed here ({reason}); install the releases that constraints.txt names, or "
            "leave it out (--metrics)"
        ) from error


def _check_model(name: str, model: str) -> None:
    from evaluation.metrics.bertscore import check_bertscore
    from evaluation.metrics.comet import check_comet

    {"bertscore": check_bertscore, "comet": check_comet}[name](model)


def text_statistics(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str] | Sequence[Sequence[str]],
    prompts: Sequence[str] = (),
) -> list[Statistics]:
    """Compute the statistics of the named text metrics.

    Args:
        metrics: of bleu, chrf (with chrF++), ter, rouge (1, 2, L, Lsum), exact_match, smoothed_bleu, bertscore=PATH and
            comet=PATH.
        predictions: generated texts.
        references: one gold text a prediction, or a list of them.
        prompts: the source texts, which comet reads.

    Raises:
        UserError: if a metric is unknown, its package or model is missing, or the counts differ.
    """
    check_metrics(metrics)
    known = _known(prompts)
    statistics = []
    for name, _, model in (metric.partition("=") for metric in metrics):
        statistics += known[name](predictions, references, **{"model": model} if model else {})
    return statistics


def _known(prompts: Sequence[str] = ()) -> dict[str, Callable[..., list[Statistics]]]:
    """Load the text metrics, by name; each takes predictions and references."""
    from evaluation.metrics.bertscore import bertscore_statistics
    from evaluation.metrics.bleu import bleu_statistics
    from evaluation.metrics.chrf import chrf_statistics
    from evaluation.metrics.comet import comet_statistics
    from evaluation.metrics.exact_match import exact_match_statistics
    from evaluation.metrics.rouge import rouge_statistics
    from evaluation.metrics.smoothed_bleu import smoothed_bleu_statistics
    from evaluation.metrics.ter import ter_statistics

    return {
        "bertscore": bertscore_statistics,
        "comet": partial(comet_statistics, sources=prompts),
        "bleu": bleu_statistics,
        "chrf": chrf_statistics,
        "ter": ter_statistics,
        "rouge": rouge_statistics,
        "exact_match": exact_match_statistics,
        "smoothed_bleu": smoothed_bleu_statistics,
    }


def score(statistics: Sequence[Statistics], resamples: int = RESAMPLES, seed: int = SEED) -> Scored:
    """Resample the examples of one system."""
    by_name = {each.name: each for each in statistics}
    return Scored(by_name, resample(by_name, resamples, seed))


def as_record(scored: Scored, baselines: Mapping[str, Scored], resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Write scores as the record holds them.

    A score that is not a number becomes null with a `problem`; it is never a wrong number.

    Args:
        scored: the system.
        baselines: by name, the systems to test against on the same examples; each gives a `versus_NAME`.
        resamples: number of bootstrap draws, for the signature.
        seed: of the draws, for the signature.
    """
    entries = {}
    for name, statistics in scored.statistics.items():
        entry = _entry(statistics, scored.drawn[name])
        entry["signature"] = f"{statistics.signature}|bs:{resamples}|seed:{seed}"
        entries[name] = entry | {
            f"versus_{system}": _versus(scored, baseline, name)
            for system, baseline in baselines.items()
            if _comparable(statistics, baseline.statistics.get(name))
        }
    return entries


def _comparable(statistics: Statistics, baseline: Statistics | None) -> bool:
    """Perplexity counts per token: it compares only systems that cut the references into the same tokens."""
    if baseline is None or statistics.name != "perplexity":
        return baseline is not None
    return bool((statistics.rows[:, 1] == baseline.rows[:, 1]).all())


def _entry(statistics: Statistics, drawn: Floats) -> dict[str, Any]:
    value = statistics.value()
    if not math.isfinite(value):
        return {"value": None, "low": None, "high": None, "problem": f"the score is {value}"}
    low, high = interval(drawn)
    return {"value": value, "low": _finite(low), "high": _finite(high)}


def _versus(scored: Scored, baseline: Scored, name: str) -> dict[str, Any]:
    test = paired(scored.statistics[name], baseline.statistics[name], scored.drawn[name], baseline.drawn[name])
    reference = baseline.statistics[name].value()
    percent = 100 * scored.statistics[name].value() / reference if reference else math.nan
    usable = math.isfinite(test.difference)
    return {
        "difference": _finite(test.difference),
        "p_value": _finite(test.p_value) if usable else None,
        "percent": _finite(percent),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def is_lower_better(name: str) -> bool:
    """Say whether a smaller value of a score is the better one."""
    return name in LOWER_IS_BETTER


def statistics_of(
    metrics: Sequence[str], references: Sequence[str], rows: Mapping[str, Sequence[Any]]
) -> list[Statistics]:
    """Compute all statistics of one system.

    Args:
        metrics: names of text metrics.
        references: the gold texts.
        rows: columns `prediction` and `prompt`, and where the system scored its targets `nats` and `target_tokens`.
    """
    statistics = text_statistics(metrics, rows["prediction"], references, rows.get("prompt", ()))
    if "nats" in rows and any(rows["target_tokens"]):
        from evaluation.metrics.perplexity import perplexity_statistics

        statistics += perplexity_statistics(rows["nats"], rows["target_tokens"], references)
    return statistics
