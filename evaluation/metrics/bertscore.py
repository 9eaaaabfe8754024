"""BERTScore by the package bert-score, with a model that lies on this machine; F-measure, 0 to 100."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import evaluate

from evaluation.bootstrap import Statistics, mean_statistics
from evaluation.metrics.texts import References, reference_lists, text_info
from llmslm.errors import UserError

NAME = "bertscore"


def check_bertscore(model: str) -> tuple[str, int]:
    """Read "FOLDER" or "FOLDER@LAYER"; without a layer it is the one that bert-score's table has for the model.

    Raises:
        UserError: if the package or the folder is missing, or the layer is not known.
    """
    try:
        from bert_score.utils import model2layers
    except ImportError as error:
        raise UserError("metric bertscore needs the package bert-score: pip install 'llmslm[bertscore]'") from error
    folder, _, layer = model.partition("@")
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"there is no model in {folder!r}; expected a folder in the hub's format (bertscore=FOLDER)")
    known = {name.rpartition("/")[2]: layers for name, layers in model2layers.items()}
    if not layer and Path(folder).name not in known:
        raise UserError(f"bert-score has no layer for {Path(folder).name!r}; choose one (bertscore={folder}@LAYER)")
    return folder, int(layer) if layer.isdigit() else known[Path(folder).name]


def bertscore_statistics(predictions: Sequence[str], references: References, model: str) -> list[Statistics]:
    """Return each example's F-measure against its best reference; 0 where one of the texts is empty."""
    folder, layer = check_bertscore(model)
    lists = reference_lists(predictions, references)
    pairs = [(text, gold) for text, golds in zip(predictions, lists, strict=True) for gold in golds]
    found = iter(_f_measures(pairs, folder, layer))
    best = [max(next(found) for _ in golds) for golds in lists]
    signature = f"bert-score:{version('bert-score')}|model:{Path(folder).name}|layer:{layer}|idf:no|rescaled:no|F"
    return [mean_statistics(NAME, best, signature)]


def _f_measures(pairs: Sequence[tuple[str, str]], folder: str, layer: int) -> list[float]:
    from bert_score import BERTScorer

    scorer = BERTScorer(model_type=folder, num_layers=layer, use_fast_tokenizer=True, nthreads=0)
    tokenizer, longest = scorer._tokenizer, scorer._model.config.max_position_embeddings
    # a folder may say nothing of its length, and the tokenizers library takes no number beyond 64 bits
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest - 2)
    full = [index for index, pair in enumerate(pairs) if all(text.strip() for text in pair)]
    scores = [0.0] * len(pairs)
    if full:
        values = scorer.score([pairs[index][0] for index in full], [pairs[index][1] for index in full])[2]
        for index, value in zip(full, values.tolist(), strict=True):
            scores[index] = value
    return scores


class Bertscore(evaluate.Metric):
    """BERTScore (Zhang et al. 2020): greedy matching of contextual embeddings; `model` is a local folder."""

    def _info(self) -> evaluate.MetricInfo:
        return text_info(self.__doc__, "Zhang et al. 2020, BERTScore: Evaluating Text Generation with BERT")

    def _compute(self, predictions: datasets.Sequence, references: datasets.Sequence, model: str) -> dict[str, Any]:
        (statistics,) = bertscore_statistics(predictions, references, model)
        return {NAME: statistics.value(), f"{NAME}_signature": statistics.signature}
