"""CodeXGLUE's smoothed BLEU-4 of sentences, averaged, 0 to 100: what code-to-text work reports beside corpus BLEU."""

import math
import re
import sys
from collections import Counter
from collections.abc import Sequence

import datasets
import evaluate

from evaluation.bootstrap import Statistics, mean_statistics
from evaluation.metrics.texts import References, reference_lists, text_info

_ORDER = 4
_LEAST = sys.float_info.min  # stands for zero under a logarithm
_TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_")
_SIGNATURE = "codexglue|case:lc|tok:words and signs|smooth:add-1 from bigrams|penalty:add-1|aggregate:mean"


def smoothed_bleu_statistics(predictions: Sequence[str], references: References) -> list[Statistics]:
    """Return the smoothed BLEU-4 of each example as CodeXGLUE's evaluator for code summarisation computes it.

    Other add-one BLEUs give other numbers: here the brevity penalty, too, has one added to both lengths, tokens are
    runs of letters and digits or single signs, and of several references the shortest sets the length.
    """
    lists = reference_lists(predictions, references)
    scores = [
        _sentence(_tokens(text), [_tokens(each) for each in gold])
        for text, gold in zip(predictions, lists, strict=True)
    ]
    return [mean_statistics("smoothed_bleu", scores, f"{_SIGNATURE}|nrefs:{max(len(gold) for gold in lists)}")]


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _sentence(tokens: list[str], golds: list[list[str]]) -> float:
    total = min(0.0, 1 - (min(len(gold) for gold in golds) + 1) / (len(tokens) + 1))
    for order in range(1, _ORDER + 1):
        found, allowed = _ngrams(tokens, order), Counter[tuple[str, ...]]()
        for gold in golds:
            allowed |= _ngrams(gold, order)
        added = _LEAST + (order > 1)
        total += (math.log((found & allowed).total() + added) - math.log(found.total() + added)) / _ORDER
    return math.exp(total)


def _ngrams(tokens: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


class SmoothedBleu(evaluate.Metric):
    """Mean sentence BLEU-4 with add-one smoothing (Lin and Och 2004), as CodeXGLUE has it for code summarisation."""

    def _info(self) -> evaluate.MetricInfo:
        return text_info(self.__doc__, "Lin and Och 2004, ORANGE; Lu et al. 2021, CodeXGLUE")

    def _compute(self, predictions: datasets.Sequence, references: datasets.Sequence) -> dict[str, float | str]:
        (statistics,) = smoothed_bleu_statistics(predictions, references)
        return {"smoothed_bleu": statistics.value(), "smoothed_bleu_signature": statistics.signature}
