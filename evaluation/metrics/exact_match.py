"""Exact match: the share of predictions that equal a reference, 0 to 100."""

from collections.abc import Sequence

import datasets
import evaluate

from evaluation.bootstrap import Statistics, mean_statistics
from evaluation.metrics.texts import References, reference_lists, text_info


def exact_match_statistics(predictions: Sequence[str], references: References) -> list[Statistics]:
    """Return of each example whether it matches; white space at the ends is not compared."""
    lists = reference_lists(predictions, references)
    matches = [
        float(text.strip() in {each.strip() for each in gold}) for text, gold in zip(predictions, lists, strict=True)
    ]
    return [mean_statistics("exact_match", matches, "case:mixed|space:stripped")]


class ExactMatch(evaluate.Metric):
    """The percentage of predictions that are the same text as one of their references."""

    def _info(self) -> evaluate.MetricInfo:
        return text_info(self.__doc__, citation="")

    def _compute(self, predictions: datasets.Sequence, references: datasets.Sequence) -> dict[str, float]:
        (statistics,) = exact_match_statistics(predictions, references)
        return {"exact_match": statistics.value()}
