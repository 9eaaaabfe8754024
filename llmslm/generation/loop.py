"""From the prompt to the last token: on the CPU step by step, on CUDA by a graph that feeds itself."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslm.generation.plan import Decoder
from llmslm.generation.prefill import CausalPrefill, EncodedPrefill
from llmslm.generation.sampling import TokenRules
from llmslm.generation.state import DecodeState
from llmslm.generation.step import TorchStep

OnFirstToken = Callable[[], None] | None
OnTokens = Callable[[Tensor], None] | None


class DecodeLoop(ABC):
    """Decodes batches of one size with one set of rules.

    Args:
        model: for the prompt's pass.
        decoder: the model's decoder, for all further tokens.
        state: buffers, used again by each run.
        rules: how tokens follow from logits.
        start: the token that an encoder-decoder model starts with; None for decoder-only models.
    """

    def __init__(
        self, model: PreTrainedModel, decoder: Decoder, state: DecodeState, rules: TokenRules, start: int | None
    ) -> None:
        self.decoder, self.state, self.rules = decoder, state, rules
        self.causal = CausalPrefill(model, decoder, state) if start is None else None
        self.encoded = None if start is None else EncodedPrefill(model, decoder, state, start)

    @abstractmethod
    def run(
        self,
        prompt: Tensor,
        attention_mask: Tensor,
        max_new: int,
        may_end: bool,
        on_first_token: OnFirstToken,
        on_tokens: OnTokens,
    ) -> None:
        """Leave the new tokens in the state.

        Args:
            prompt: ids (batch, length), or embeddings or encoder states (batch, length, width).
            attention_mask: (batch, length), 1 = attend.
            max_new: tokens to produce at most.
            may_end: whether rows can end before max_new.
            on_first_token: see `DecodeEngine.generate`.
            on_tokens: see `DecodeEngine.generate`.
        """


class HostLoop(DecodeLoop):
    """The loop where launching is cheap beside computing: the host looks at every token."""

    def run(
        self,
        prompt: Tensor,
        attention_mask: Tensor,
        max_new: int,
        may_end: bool,
        on_first_token: OnFirstToken,
        on_tokens: OnTokens,
    ) -> None:
        """See `DecodeLoop.run`."""
        state, step = self.state, TorchStep(self.decoder, self.state)
        filled = 0
        if self.causal is not None:
            logits, filled = self.causal(prompt, attention_mask), prompt.shape[1]
        else:
            assert self.encoded is not None
            self.encoded(prompt, attention_mask)
            logits, filled = step.logits(0), 1
        for produced in range(max_new):
            if produced:
                logits = step.logits(filled)
                filled += 1
            self.rules.choose(logits, state)
            if on_first_token is not None and not produced:
                on_first_token()
            if on_tokens is not None:
                on_tokens(state.out[:, produced : produced + 1].clone())
            if may_end and bool(state.finished.all()):
                break


class GraphLoop(DecodeLoop):
    """Placeholder."""

    def run(self, *args, **kwargs) -> None:  # type: ignore
        raise NotImplementedError
