"""From the prompt to the last token: on the CPU step by step, on CUDA by graphs that feed themselves."""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslm.generation.dispatch import prefill_for, step_for
from llmslm.generation.graphs import Captured
from llmslm.generation.plan import Decoder
from llmslm.generation.prefill import EncodedPrefill
from llmslm.generation.products import fast_products
from llmslm.generation.sampling import TokenRules
from llmslm.generation.state import DecodeState

# Of the steps launched behind the one that runs, at least, some 6 us each: while they run the host must see that the
# running one has ended, and launch another, some 10 us, or the device would wait. What is launched more is computed in
# vain behind an end.
_SUBLAYERS_BEHIND = 4

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
        self.state, self.rules = state, rules
        self.step = step_for(decoder, state)
        self.causal = prefill_for(model, decoder, state) if start is None else None
        self.encoded = None if start is None else EncodedPrefill(model, decoder, state, start)

    def prefill(self, prompt: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Fill the caches; the first token's logits if the prompt's pass gives them."""
        if self.causal is not None:
            return self.causal(prompt, attention_mask)
        assert self.encoded is not None
        self.encoded(prompt, attention_mask)
        return None

    def take(self, logits: Tensor) -> None:
        """Choose the tokens that follow those just read, and move on."""
        if self.state.mode == "plain":
            self.step.take_largest(logits, self.rules)
        else:
            self.rules.choose(logits, self.state)
            self.state.move_on()
            self.step.tell()

    def prepare(self, prompt: Tensor, attention_mask: Tensor) -> None:  # noqa: B027
        """Do what is done once for prompts of this shape; this disturbs the state."""

    @abstractmethod
    def run(
        self,
        prompt: Tensor,
        attention_mask: Tensor,
        max_new: int,
        may_end: bool,
        on_first_token: OnFirstToken,
        on_tokens: OnTokens,
    ) -> Tensor:
        """Give the new tokens, (batch, new_len) on the CPU, up to the last one that any row needed.

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
    ) -> Tensor:
        """See `DecodeLoop.run`."""
        with fast_products(self.state.device):
            return self._run(prompt, attention_mask, max_new, may_end, on_first_token, on_tokens)

    def _run(
        self,
        prompt: Tensor,
        attention_mask: Tensor,
        max_new: int,
        may_end: bool,
        on_first_token: OnFirstToken,
        on_tokens: OnTokens,
    ) -> Tensor:
        state, filled = self.state, 0
        state.forget()
        logits = self.prefill(prompt, attention_mask)
        if self.causal is not None:
            filled = prompt.shape[1]
        for produced in range(max_new):
            if logits is None:
                logits = self.step.logits(filled)
                filled += 1
            self.take(logits)
            logits = None
            if on_first_token is not None and not produced:
                on_first_token()
            if on_tokens is not None:
                on_tokens(state.out[:, produced : produced + 1].clone())
            if may_end and bool(state.finished.all()):
                break
        return state.tokens(self.rules.ends, max_new)


class GraphLoop(DecodeLoop):
    """The loop on CUDA: the prompt's pass and the step are graphs; the host keeps a few steps ahead of what it saw."""

    def __init__(
        self, model: PreTrainedModel, decoder: Decoder, state: DecodeState, rules: TokenRules, start: int | None
    ) -> None:
        super().__init__(model, decoder, state, rules, start)
        self._words = state.words
        self._ahead = 1 + math.ceil(_SUBLAYERS_BEHIND / len(decoder.sublayers))
        pool = torch.cuda.graph_pool_handle()
        drawn, loop = (state.generator,), weakref.proxy(self)  # else it would live until garbage is collected
        self._first = Captured(lambda *prompt: loop._first_token(*prompt), state.device, pool=pool, generators=drawn)
        self._next = Captured(lambda: loop._next_token(), state.device, pool=pool, generators=drawn)

    def prepare(self, prompt: Tensor, attention_mask: Tensor) -> None:
        """See `DecodeLoop.prepare`."""
        self._next.prepare()
        self._first.prepare(prompt, attention_mask)

    def run(
        self,
        prompt: Tensor,
        attention_mask: Tensor,
        max_new: int,
        may_end: bool,
        on_first_token: OnFirstToken,
        on_tokens: OnTokens,
    ) -> Tensor:
        """See `DecodeLoop.run`."""
        self._words.begin()
        self._first(prompt, attention_mask)
        if self.encoded is not None:
            self._next()  # in a graph of its own, since a step counts on complete caches at its start
        if may_end or on_first_token is not None or on_tokens is not None:
            return self._watched(max_new, on_first_token, on_tokens)
        for _ in range(max_new - 1):
            self._next()
        return self.state.tokens(self.rules.ends, max_new)

    def _watched(self, max_new: int, on_first_token: OnFirstToken, on_tokens: OnTokens) -> Tensor:
        """Launch further steps one by one, `_ahead` of those seen at most, and hand out what the device tells."""
        launched, seen, handed_out, ended = 1, 0, 0, False
        while seen < max_new and not ended:
            while launched < min(seen + self._ahead, max_new):
                self._next()
                launched += 1
            if on_tokens is not None and seen > handed_out:  # while the device goes on
                on_tokens(self._words.tokens(handed_out, seen))
                handed_out = seen
            first = not seen
            seen, ended = self._words.wait(seen, launched)
            if first and on_first_token is not None:
                on_first_token()
        if on_tokens is not None:
            on_tokens(self._words.tokens(handed_out, seen))
        return self._words.tokens(0, seen)

    def _first_token(self, prompt: Tensor, attention_mask: Tensor) -> None:
        self.state.forget()
        logits = self.prefill(prompt, attention_mask)
        if logits is not None:
            self.take(logits)

    def _next_token(self) -> None:
        self.take(self.step.logits(0))
