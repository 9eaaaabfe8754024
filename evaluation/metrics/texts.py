"""The inputs that every text metric shares: a prediction with one or several references."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from llmslm.errors import UserError

References = Sequence[str] | Sequence[Sequence[str]]


def text_info(description: str | None, citation: str) -> evaluate.MetricInfo:
    """Describe a metric to `evaluate`: one reference a prediction, or a list of them."""
    text = datasets.Value("string")
    return evaluate.MetricInfo(
        description=description or "",
        citation=citation,
        inputs_description="predictions: texts. references: a text, or a list of texts, for each.",
        features=[
            datasets.Features({"predictions": text, "references": references})
            for references in (text, datasets.Sequence(text))
        ],
    )


def reference_lists(predictions: Sequence[str], references: References) -> list[list[str]]:
    """Return one list of references a prediction.

    Raises:
        UserError: if there is nothing to score, the counts differ, or a prediction has no reference.
    """
    if len(predictions) != len(references):
        raise UserError(f"{len(predictions)} predictions but {len(references)} references; expected one for one")
    if not predictions:
        raise UserError("there is nothing to score: no predictions were given")
    lists = [[each] if isinstance(each, str) else list(each) for each in references]
    if not all(lists):
        raise UserError(f"prediction {lists.index([])} has no reference; expected at least one")
    return lists


def reference_streams(lists: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Turn one list a prediction into sacrebleu's streams: all first references, all second ones, ..."""
    most = max(len(each) for each in lists)
    return [[each[index] if index < len(each) else None for each in lists] for index in range(most)]


def corpus_rows(metric: Any, predictions: Sequence[str], references: References) -> Any:
    """Extract the per-segment counts of a sacrebleu metric, (examples, columns)."""
    import numpy as np

    streams = reference_streams(reference_lists(predictions, references))
    return np.asarray(metric._extract_corpus_statistics(list(predictions), streams), dtype=np.float64)
