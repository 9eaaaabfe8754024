"""BLEU by sacrebleu, 0 to 100, with its signature."""

from collections.abc import Sequence

import datasets
import evaluate
from sacrebleu.metrics.bleu import BLEU

from evaluation.bootstrap import Statistics
from evaluation.metrics.texts import References, corpus_rows, text_info


def bleu_statistics(predictions: Sequence[str], references: References, tokenize: str = "13a") -> list[Statistics]:
    """Return what each example adds to corpus BLEU (lengths, matched and possible n-grams).

    Args:
        predictions: generated texts.
        references: one gold text a prediction, or a list of them.
        tokenize: sacrebleu's tokenizer: "13a", or "zh", "ja-mecab", "char" and so on by the target language.
    """
    metric = BLEU(tokenize=tokenize)
    rows = corpus_rows(metric, predictions, references)
    signature = str(metric.get_signature())
    return [Statistics("bleu", rows, lambda sums: metric._compute_score_from_stats(sums.tolist()).score, signature)]


class Bleu(evaluate.Metric):
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return text_info(self.__doc__, "Post 2018, A Call for Clarity in Reporting BLEU Scores")

    def _compute(
        self, predictions: datasets.Sequence, references: datasets.Sequence, tokenize: str = "13a"
    ) -> dict[str, float | str]:
        (statistics,) = bleu_statistics(predictions, references, tokenize)
        return {"bleu": statistics.value(), "bleu_signature": statistics.signature}
