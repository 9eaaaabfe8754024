"""From the prompt to the last token: on the CPU step by step, on CUDA by graphs that feed themselves."""

import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

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

_SUBLAYERS = 20  # of the steps between two looks at the ends of sequence, at least: some 5 us each
_SOON = 2  # tokens launched before the first one is handed out: it does not wait for a whole block's launches
_AHEAD = 1  # blocks that the host launches before it must know how an earlier one ended

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
        with fast_products(self.state.device):
            self._run(prompt, attention_mask, max_new, may_end, on_first_token, on_tokens)

    def _run(
        self,
        prompt: Tensor,
        attention_mask: Tensor,
        max_new: int,
        may_end: bool,
        on_first_token: OnFirstToken,
        on_tokens: OnTokens,
    ) -> None:
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


class _Watch:
    """Looks at a running decode from the host without stopping it: copies are asked for now and read later.

    Args:
        state: what is decoded.
        ends: ids that end a row.
        on_first_token: see `DecodeEngine.generate`.
        on_tokens: see `DecodeEngine.generate`.
    """

    def __init__(
        self, state: DecodeState, ends: Sequence[int], on_first_token: OnFirstToken, on_tokens: OnTokens
    ) -> None:
        self.state, self.ends, self.on_first_token, self.on_tokens = state, ends, on_first_token, on_tokens
        self.listened = self.awaited = on_first_token is not None or on_tokens is not None
        self.open = torch.ones(state.batch, dtype=torch.bool)
        self.pending: deque[tuple[torch.cuda.Event, Tensor, Tensor | None]] = deque()

    def record(self, start: int, stop: int) -> None:
        """Ask for what is known after the kernels launched so far: who has ended, and tokens start to stop."""
        finished = torch.empty(self.state.batch, dtype=torch.bool, pin_memory=True)
        finished.copy_(self.state.finished, non_blocking=True)
        tokens = None
        if self.on_tokens is not None:
            tokens = torch.empty(self.state.batch, stop - start, dtype=torch.long, pin_memory=True)
            tokens.copy_(self.state.out[:, start:stop].contiguous(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending.append((event, finished, tokens))

    def look(self, ahead: int) -> bool:
        """Read what was asked for, the first token at once, else all but `ahead` records; whether all rows ended."""
        while self.pending and (self.awaited or len(self.pending) > ahead):
            event, finished, tokens = self.pending.popleft()
            event.synchronize()
            self.awaited = False
            if self.on_first_token is not None:
                self.on_first_token()
                self.on_first_token = None
            if tokens is not None:
                self._hand_out(tokens, finished)
            self.open = ~finished
            if not self.open.any():
                return True
        return False

    def finish(self) -> None:
        """Hand out what is left."""
        if self.listened and self.open.any():
            self.look(0)

    def _hand_out(self, tokens: Tensor, finished: Tensor) -> None:
        if bool(finished.all()):
            ends = torch.isin(tokens, torch.tensor(self.ends)) & self.open[:, None]
            tokens = tokens[:, : int(ends.int().argmax(dim=1).max()) + 1]
        assert self.on_tokens is not None
        self.on_tokens(tokens.clone())


class GraphLoop(DecodeLoop):
    """The loop on CUDA: the prompt's pass and the step are graphs; the host runs ahead and looks back at times."""

    def __init__(
        self, model: PreTrainedModel, decoder: Decoder, state: DecodeState, rules: TokenRules, start: int | None
    ) -> None:
        super().__init__(model, decoder, state, rules, start)
        self._block = -(-_SUBLAYERS // len(decoder.sublayers))
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
    ) -> None:
        """See `DecodeLoop.run`."""
        self._first(prompt, attention_mask)
        if self.encoded is not None:
            self._next()  # in a graph of its own, since a step counts on complete caches at its start
        watch = _Watch(self.state, self.rules.ends, on_first_token, on_tokens)
        watched = may_end or on_tokens is not None
        if watched or watch.awaited:
            watch.record(0, 1)
        produced, ended = 1, False
        while produced < max_new and not ended:
            count = min(_SOON if watch.awaited else self._block, max_new - produced)
            for _ in range(count):
                self._next()
            produced += count
            if watched:
                watch.record(produced - count, produced)
            ended = watch.look(_AHEAD) and may_end
        watch.finish()

    def _first_token(self, prompt: Tensor, attention_mask: Tensor) -> None:
        self.state.forget()
        logits = self.prefill(prompt, attention_mask)
        if logits is not None:
            self.take(logits)

    def _next_token(self) -> None:
        self.take(self.step.logits(0))
