"""Translation edit rate by sacrebleu: edits per 100 reference words, lower is better; with its signature."""

from collections.abc import Sequence

import datasets
import evaluate
from sacrebleu.metrics.ter import TER

from evaluation.bootstrap import Floats, Statistics
from evaluation.metrics.texts import References, corpus_rows, text_info


def ter_statistics(predictions: Sequence[str], references: References) -> list[Statistics]:
    """Return what each example adds to TER (edits, mean reference length)."""
    metric = TER()
    rows = corpus_rows(metric, predictions, references)
    signature = str(metric.get_signature())

    def score(sums: Floats) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    return [Statistics("ter", rows, score, signature, higher_is_better=False)]


class Ter(evaluate.Metric):
    """Translation edit rate (Snover et al. 2006): edits and shifts to reach the closest reference."""

    def _info(self) -> evaluate.MetricInfo:
        return text_info(self.__doc__, "Snover et al. 2006, A Study of Translation Edit Rate")

    def _compute(self, predictions: datasets.Sequence, references: datasets.Sequence) -> dict[str, float | str]:
        (statistics,) = ter_statistics(predictions, references)
        return {"ter": statistics.value(), "ter_signature": statistics.signature}
