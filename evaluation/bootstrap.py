"""Confidence intervals and paired tests by resampling examples.

Every score here is a function of sums over examples (n-gram counts, summed F-measures, nats), so a resample
costs one product of counts with a small matrix, not a new scoring. The draws are those of sacrebleu for the
same seed and number of resamples, and the p-value is its paired bootstrap (Koehn 2004, as in Moses), extended
to every score.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmslm.errors import UserError

RESAMPLES = 1000
SEED = 12345
"""The seed of sacrebleu."""
_AT_ONCE = 50  # draws in one product: far quicker than one by one, and 10,000 examples take 4 MB

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Sufficient statistics of one score over a set of examples."""

    name: str
    rows: Floats
    """(examples, columns): what each example adds."""
    score: Callable[[Floats], float]
    """From the sum of the rows, (columns,), to the score."""
    signature: str
    """The settings that the score depends on, in the words of the package that computes it."""
    higher_is_better: bool = True

    def value(self) -> float:
        """The score over all examples."""
        return float(self.score(self.rows.sum(axis=0)))


@dataclass(frozen=True)
class Paired:
    """How a system's score compares with a baseline's on the same examples."""

    difference: float
    """System minus baseline."""
    p_value: float
    """Of the hypothesis that the two do not differ, by sacrebleu's formula, about one-sided if the difference is
    clear; NaN if a draw has no score."""


def resample(statistics: Mapping[str, Statistics], resamples: int, seed: int) -> dict[str, Floats]:
    """Score `resamples` draws of the examples, with replacement.

    The draws depend on the seed and the number of examples alone: two systems scored over the same examples
    are drawn alike, which is what a paired test needs.

    Returns:
        Of each statistic, its score in each draw, (resamples,).
    """
    examples = len(next(iter(statistics.values())).rows)
    rows = np.concatenate([each.rows for each in statistics.values()], axis=1)
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, rows.shape[1]))
    for start in range(0, resamples, _AT_ONCE):
        counts = np.zeros((min(_AT_ONCE, resamples - start), examples))
        for row in counts:
            row += np.bincount(rng.choice(examples, size=examples, replace=True), minlength=examples)
        sums[start : start + len(counts)] = counts @ rows
    scores, start = {}, 0
    for name, each in statistics.items():
        end = start + each.rows.shape[1]
        scores[name] = np.array([each.score(row) for row in sums[:, start:end]], dtype=np.float64)
        start = end
    return scores


def interval(scores: Floats) -> tuple[float, float]:
    """Return the 95 % percentile interval of resampled scores."""
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def paired(system: Statistics, baseline: Statistics, drawn_system: Floats, drawn_baseline: Floats) -> Paired:
    """Test a system against a baseline from the scores of the same draws.

    Raises:
        UserError: if the two were not scored over the same number of examples.
    """
    if len(system.rows) != len(baseline.rows):
        raise UserError(
            f"{system.name}: {len(system.rows)} examples against {len(baseline.rows)} of the baseline; "
            "a paired test needs the same examples"
        )
    difference = system.value() - baseline.value()
    if difference == 0:
        return Paired(0.0, 1.0)  # sacrebleu's formula gives equal outputs the smallest p-value instead
    spread = np.abs(drawn_system - drawn_baseline)
    if not np.isfinite(spread).all():
        return Paired(difference, math.nan)
    beyond = int(np.sum(spread - spread.mean() > abs(difference)))
    return Paired(difference=difference, p_value=(beyond + 1) / (len(spread) + 1))


def mean_statistics(name: str, values: Sequence[float], signature: str, scale: float = 100.0) -> Statistics:
    """Make the statistics of a score that is the mean over examples, times `scale`."""
    column = np.asarray(values, dtype=np.float64)
    rows = np.stack([column, np.ones_like(column)], axis=1)
    return Statistics(name, rows, lambda sums: scale * float(sums[0]) / float(sums[1]), signature)
