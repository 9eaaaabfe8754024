"""ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum by rouge_score: mean F-measure, 0 to 100, with its settings."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version

import datasets
import evaluate
from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]
from rouge_score import rouge_scorer, tokenize, tokenizers

from evaluation.bootstrap import Statistics, mean_statistics
from evaluation.metrics.texts import References, reference_lists, text_info

_NAMES = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l", "rougeLsum": "rouge_lsum"}


class _CachedTokenizer(tokenizers.Tokenizer):
    """The package's own tokenizer with its stems remembered: stemming is most of the time otherwise."""

    def __init__(self) -> None:
        self._stemmer = PorterStemmer()
        self._stemmer.stem = lru_cache(maxsize=200_000)(self._stemmer.stem)

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = tokenize.tokenize(text, self._stemmer)
        return tokens


def rouge_statistics(predictions: Sequence[str], references: References) -> list[Statistics]:
    """Return the F-measures of each example; of several references the best counts, as rouge_score does it.

    rouge_l reads a text as one sequence, rouge_lsum as one per line: they are different numbers.
    """
    lists = reference_lists(predictions, references)
    tokenizer = _CachedTokenizer()
    plain = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=tokenizer)
    by_line = rouge_scorer.RougeScorer(["rougeLsum"], tokenizer=tokenizer)
    scored = []
    for text, gold in zip(predictions, lists, strict=True):
        scores = plain.score_multi(gold, text)
        several_lines = any("\n" in each for each in (text, *gold))
        # of single lines the two are the same, and the second would take as long again
        scores["rougeLsum"] = by_line.score_multi(gold, text)["rougeLsum"] if several_lines else scores["rougeL"]
        scored.append(scores)
    most = max(len(gold) for gold in lists)
    signature = f"rouge_score:{version('rouge_score')}|nrefs:{most}|stemmer:porter|measure:f|aggregate:mean"
    return [
        mean_statistics(name, [each[key].fmeasure for each in scored], f"{signature}|type:{key}")
        for key, name in _NAMES.items()
    ]


class Rouge(evaluate.Metric):
    """ROUGE (Lin 2004) as rouge_score computes it, with the Porter stemmer."""

    def _info(self) -> evaluate.MetricInfo:
        return text_info(self.__doc__, "Lin 2004, ROUGE: a Package for Automatic Evaluation of Summaries")

    def _compute(self, predictions: datasets.Sequence, references: datasets.Sequence) -> dict[str, float | str]:
        statistics = rouge_statistics(predictions, references)
        values: dict[str, float | str] = {each.name: each.value() for each in statistics}
        return values | {"rouge_signature": statistics[0].signature.rsplit("|", 1)[0]}
