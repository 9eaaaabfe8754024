"""Smoothed sentence BLEU-4, averaged, 0 to 100: what code-to-text work reports beside, or instead of, corpus BLEU."""

from collections.abc import Sequence

import datasets
import evaluate
from sacrebleu.metrics.bleu import BLEU

from evaluation.bootstrap import Statistics, mean_statistics
from evaluation.metrics.texts import References, reference_lists, text_features


def smoothed_bleu_statistics(predictions: Sequence[str], references: References) -> list[Statistics]:
    """Return the BLEU-4 of each example, lower-cased, one added to matched and possible n-grams for n > 1."""
    lists = reference_lists(predictions, references)
    metric = BLEU(lowercase=True, force=True, smooth_method="add-k", smooth_value=1)
    scores = [
        metric._aggregate_and_compute(metric._extract_corpus_statistics([text], [[each] for each in gold])).score
        for text, gold in zip(predictions, lists, strict=True)
    ]
    most = max(len(gold) for gold in lists)
    metric.num_refs = most
    signature = f"{metric.get_signature()}|aggregate:mean"
    return [mean_statistics("smoothed_bleu", scores, signature, scale=1.0)]


class SmoothedBleu(evaluate.Metric):
    """Mean sentence BLEU-4 with add-one smoothing (Lin and Och 2004), as CodeXGLUE has it for code summarisation."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="Lin and Och 2004, ORANGE; Lu et al. 2021, CodeXGLUE",
            inputs_description="predictions: texts. references: a text, or a list of texts, for each.",
            features=text_features(),
        )

    def _compute(self, predictions: datasets.Sequence, references: datasets.Sequence) -> dict[str, float | str]:
        (statistics,) = smoothed_bleu_statistics(predictions, references)
        return {"smoothed_bleu": statistics.value(), "smoothed_bleu_signature": statistics.signature}
