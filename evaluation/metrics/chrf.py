"""chrF2 and chrF++ by sacrebleu, 0 to 100, with their signatures."""

from collections.abc import Sequence

import datasets
import evaluate
from sacrebleu.metrics.chrf import CHRF

from evaluation.bootstrap import Floats, Statistics
from evaluation.metrics.texts import References, corpus_rows, text_info


def chrf_statistics(predictions: Sequence[str], references: References) -> list[Statistics]:
    """Return what each example adds to chrF2 and to chrF++.

    With several references sacrebleu keeps the counts of the best one, and best differs between the two
    scores, so each is extracted for itself. With one reference the counts of chrF2 are the first columns of
    chrF++'s.
    """
    plain, plus = CHRF(), CHRF(word_order=2)
    plus_rows = corpus_rows(plus, predictions, references)
    if all(isinstance(each, str) or len(each) == 1 for each in references):
        rows = plus_rows[:, : 3 * plain.char_order]
        plain.num_refs = plus.num_refs
    else:
        rows = corpus_rows(plain, predictions, references)
    return [_statistics("chrf", plain, rows), _statistics("chrf_plus_plus", plus, plus_rows)]


def _statistics(name: str, metric: CHRF, rows: Floats) -> Statistics:
    signature = str(metric.get_signature())
    return Statistics(name, rows, lambda sums: metric._compute_score_from_stats(sums.tolist()).score, signature)


class Chrf(evaluate.Metric):
    """Character n-gram F-score: chrF2 (Popović 2015) and, with word bigrams, chrF++ (Popović 2017)."""

    def _info(self) -> evaluate.MetricInfo:
        return text_info(self.__doc__, "Popović 2015, 2017")

    def _compute(self, predictions: datasets.Sequence, references: datasets.Sequence) -> dict[str, float | str]:
        statistics = chrf_statistics(predictions, references)
        values: dict[str, float | str] = {each.name: each.value() for each in statistics}
        return values | {f"{each.name}_signature": each.signature for each in statistics}
