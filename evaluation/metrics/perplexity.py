"""Perplexity per token and bits per byte of the references, from summed negative log-likelihoods."""

import math
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from evaluation.bootstrap import Floats, Statistics
from llmslm.errors import UserError


def perplexity_statistics(nats: Sequence[float], tokens: Sequence[int], references: Sequence[str]) -> list[Statistics]:
    """Return what each example adds: nats and tokens, nats and bytes.

    Perplexity compares systems that share the target's tokenizer; bits per byte compares any. An example with
    no tokens was not scored and adds nothing to either.

    Args:
        nats: -log p(reference | prompt), summed over its tokens, in float64.
        tokens: tokens of each reference, end of sequence included; 0 for an example to leave out.
        references: the gold texts, whose UTF-8 bytes are counted.
    """
    if not len(nats) == len(tokens) == len(references):
        raise UserError(f"{len(nats)} nats, {len(tokens)} tokens, {len(references)} references; expected one for one")
    scored = np.asarray(tokens, dtype=np.float64)
    if not scored.any():
        raise UserError("no reference was scored: every example has 0 tokens; expected at least one")
    kept = scored > 0
    total = np.where(kept, np.asarray(nats, dtype=np.float64), 0.0)
    lengths = np.where(kept, [float(len(text.encode())) for text in references], 0.0)
    return [
        Statistics("perplexity", np.stack([total, scored], 1), _perplexity, "per:token|eos:yes", False),
        Statistics("bits_per_byte", np.stack([total, lengths], 1), _bits_per_byte, "per:utf-8 byte|eos:yes", False),
    ]


def _perplexity(sums: Floats) -> float:
    mean = float(sums[0]) / float(sums[1]) if sums[1] else math.nan
    return math.inf if mean > 700 else math.exp(mean)  # exp overflows a double at 709


def _bits_per_byte(sums: Floats) -> float:
    return float(sums[0]) / math.log(2) / float(sums[1]) if sums[1] else math.nan


class Perplexity(evaluate.Metric):
    """Perplexity per token and bits per UTF-8 byte of the references under a system."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="nats: summed -log p of each reference. tokens: its count. references: texts.",
            features=datasets.Features(
                {
                    "nats": datasets.Value("float64"),
                    "tokens": datasets.Value("int64"),
                    "references": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, nats: list[float], tokens: list[int], references: list[str]) -> dict[str, float]:
        return {each.name: each.value() for each in perplexity_statistics(nats, tokens, references)}
