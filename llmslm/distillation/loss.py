"""Logit distillation: how far the small model's distribution over tokens is from the LLM's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmslm.errors import UserError

_PART = 2**24
"""Logits that are computed at once, 67 MB in float32: so many that a GPU should take longer for each operation than the
host for its launch."""


@dataclass
class Distillation:
    """Training on the LLM's distribution over tokens beside the targets; not for the system llm, whose it is."""

    logits: str | None = None
    """Folder of `llmslm logits`; None trains on the targets alone."""
    weight: float = 0.5
    """Share of the divergence in the loss, from 0 to 1; the rest is cross-entropy."""
    temperature: float = 1.0
    """Both distributions are raised to its inverse; above 1, unlikely tokens count for more."""
    direction: Literal["forward", "reverse"] = "forward"
    """Forward: KL(llm || slm), to cover all that the LLM finds likely; reverse: KL(slm || llm), to keep to it."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UserError(f"model.distillation.weight is {self.weight}; expected a share from 0 to 1")
        if self.temperature <= 0:
            raise UserError(f"model.distillation.temperature is {self.temperature}; expected a number above 0")

    def divergence(self, logits: Tensor, llm_tokens: Tensor, llm_log_probs: Tensor) -> Tensor:
        """Return the mean divergence in nats a target token, times the square of the temperature.

        The LLM's likeliest tokens are compared one by one, and all others together, as if they were one token. With all
        tokens of the vocabulary it is the divergence of Hinton et al. (arXiv 1503.02531, section 2), whose square keeps
        the gradients' size whatever the temperature.

        Args:
            logits: (n, vocabulary), of n target tokens; no copy of all of them in float32 is made.
            llm_tokens: (n, k), ids of the LLM's likeliest tokens, none of them twice in a row.
            llm_log_probs: (n, k + 1), their log-probabilities and that of all others; (n, k) if there are no others.
        """
        tokens = llm_tokens.long()
        if llm_log_probs.shape[1] > tokens.shape[1]:
            chosen = _WithOthers.apply(logits, tokens)
        else:
            chosen = logits.gather(1, tokens).float()
        ours = (chosen / self.temperature).log_softmax(1)
        theirs = (llm_log_probs.float() / self.temperature).log_softmax(1)
        if self.direction == "reverse":
            ours, theirs = theirs, ours
        return self.temperature**2 * nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)

    def mix(self, cross_entropy: Tensor, divergence: Tensor | None = None) -> Tensor:
        """Return the loss: both, by weight; without a divergence the cross-entropy."""
        if divergence is None:
            return cross_entropy
        return (1 - self.weight) * cross_entropy + self.weight * divergence


class _WithOthers(torch.autograd.Function):
    """Logits (n, k + 1) in float32: those of tokens (n, k), and that of all others together, of (n, vocabulary).

    Rows are computed some at a time. The logits are kept as they are, and the backward makes nothing else of their size
    than their gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        others = torch.cat(
            [_without(part, chosen).logsumexp(1, keepdim=True) for part, chosen in _parts(logits, tokens)]
        )
        ctx.save_for_backward(logits, tokens, others)
        return torch.cat([logits.gather(1, tokens).float(), others], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, tokens, others = ctx.saved_tensors
        result = torch.empty_like(logits)
        for part, chosen, rest, given, to in _parts(logits, tokens, others, gradient, result):
            to.copy_(_gradient(part, chosen, rest, given))
        return result, None


def _without(logits: Tensor, tokens: Tensor) -> Tensor:
    """Copy logits to float32 and rule tokens out."""
    return logits.to(torch.float32, copy=True).scatter_(1, tokens, -torch.inf)


def _gradient(logits: Tensor, tokens: Tensor, others: Tensor, given: Tensor) -> Tensor:
    """Return some rows' gradient in float32, from the one given for their tokens and the others, (rows, k + 1)."""
    shares = (logits - others).float().exp_().mul_(given[:, -1:])
    return shares.scatter_(1, tokens, given[:, :-1])  # tokens are no part of the others: what stands there may be inf


def _parts(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Divide tensors (n, ...) alike, into as many rows at a time as have `_PART` logits."""
    rows = max(1, _PART // logits.shape[1])
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)
