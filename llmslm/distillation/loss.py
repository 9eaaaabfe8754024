"""Logit distillation: how far the small model's distribution over tokens is from the LLM's."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmslm.errors import UserError


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
            logits: (n, vocabulary), of n target tokens.
            llm_tokens: (n, k), ids of the LLM's likeliest tokens.
            llm_log_probs: (n, k + 1), their log-probabilities and that of all others; (n, k) if there are no others.
        """
        log_probs, tokens = logits.float().log_softmax(1), llm_tokens.long()
        chosen = log_probs.gather(1, tokens)
        if llm_log_probs.shape[1] > tokens.shape[1]:
            others = log_probs.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
            chosen = torch.cat([chosen, others], 1)
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
