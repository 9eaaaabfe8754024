"""From block to block of verified decoding: the host looks at each; on CUDA both parts of one are graphs."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmslm.generation.acceptance import GRAPHED, LONGEST, SHORTEST, Acceptance, BlockLength
from llmslm.generation.block_reports import BlockReports, SeenReports
from llmslm.generation.choice import Choice
from llmslm.generation.graphs import MOST_TOKENS, Captured
from llmslm.generation.side import Side
from llmslm.generation.verified_block import VerifiedBlock
from llmslm.generation.verified_prompt import PromptReader

_ROW_ON_CPU = 0.15  # time that each further row of inputs adds to a product whose weights are read once (measured)


@dataclass(frozen=True)
class VerifiedTokens:
    """What a call gives.

    tokens: (batch, new_len) new tokens on the CPU; rows that end early are filled with the pad token.
    acceptance: how much of the drafts was kept.
    """

    tokens: Tensor
    acceptance: Acceptance


def cost_of_drafting(llm: Side, draft: Side) -> float:
    """Cost of one more token in each block, in passes of the LLM: reading the draft's weights, and a longer pass."""
    cost = draft.decoder.decoding_bytes() / llm.decoder.decoding_bytes()
    if llm.base.device.type == "cpu":
        rows = llm.base.shape[0]
        return cost + _ROW_ON_CPU * rows / (1 + _ROW_ON_CPU * (rows - 1))
    # Small models are bound by the number of kernels, which are as many a sublayer.
    return max(cost, len(draft.decoder.sublayers) / len(llm.decoder.sublayers))


def block_for(llm: Side, draft: Side, choice: Choice) -> VerifiedBlock:
    """The fused block on CUDA, where its choice is the plain one."""
    if llm.base.device.type != "cuda" or choice.mode != "plain":
        return VerifiedBlock(llm, draft, choice)
    from llmslm.generation.fused_block import FusedVerifiedBlock

    return FusedVerifiedBlock(llm, draft, choice)


def reports_for(block: VerifiedBlock) -> BlockReports:
    """Words on CUDA, whatever the block."""
    if block.device.type != "cuda":
        return SeenReports(block)
    from llmslm.generation.fused_block import FusedReports

    return FusedReports(block)


class VerifiedLoop:
    """Decodes batches of one size by one choice, in buffers that are used again.

    Args:
        llm: verifies.
        draft: proposes.
        choice: of tokens.
        fixed: whether blocks have few sizes and do not depend on the host, as CUDA graphs want it.
    """

    def __init__(self, llm: Side, draft: Side, choice: Choice, *, fixed: bool) -> None:
        self.llm, self.draft, self.choice, self.fixed = llm, draft, choice, fixed
        self.block = block_for(llm, draft, choice)
        self.reports = reports_for(self.block) if fixed else SeenReports(self.block)
        cost, sizes = cost_of_drafting(llm, draft), GRAPHED if fixed else range(SHORTEST, LONGEST + 1)
        self.times = {size: 1 + cost * size for size in sizes}
        self._graphs: dict[int, Captured] = {}
        self._prompts: dict[tuple[str, ...], Captured] = {}
        self._captures_prompts = True
        self._pool = _new_pool(self.block.device)
        self._read_start = Captured(self.block.read_start, self.block.device, pool=self._pool)
        drawn = (self.choice.generator,)
        first = functools.partial(_told, self.reports, self.block.take_first)
        self._take_first = Captured(first, self.block.device, pool=self._pool, generators=drawn)
        self._read_on = Captured(self.block.read_on, self.block.device, pool=self._pool)
        if fixed:
            self._capture()

    def _capture(self) -> None:
        for size in self.times:
            block = functools.partial(_told, self.reports, self.block.run, size)
            drawn = (self.choice.generator,)
            self._graphs[size] = Captured(block, self.block.device, pool=self._pool, generators=drawn)
        if self._pool is not None:  # now, since a first run disturbs the buffers
            for graph in (*self._graphs.values(), self._take_first, self._read_on):
                graph.prepare()
            if self.choice.mode != "sampled":  # what is drawn is to depend on its seed, and not on a clock
                self.times = {size: _milliseconds(functools.partial(self.advance, size)) for size in self.times}

    def read_prompt(self, reader: PromptReader, prompt: dict[str, Tensor]) -> None:
        """Read prompts, by a graph if that pays and their models can be captured; see `PromptReader.read`."""
        if self._captures_prompts and prompt["prompt_ids"].numel() <= MOST_TOKENS:
            try:
                self._prompt_graph(reader, tuple(prompt))(*prompt.values())
                return
            except RuntimeError as error:  # some operation of these models asks for the host
                warnings.warn(f"the prompt is read without a CUDA graph, which is slower: {error}", stacklevel=2)
                self._captures_prompts = False
        reader.read_into(self.llm, self.draft, **prompt)

    def _prompt_graph(self, reader: PromptReader, names: tuple[str, ...]) -> Captured:
        if names not in self._prompts:
            llm, draft = self.llm, self.draft  # of which the graph holds on to no more: not to this loop

            def read(*values: Tensor) -> None:
                reader.read_into(llm, draft, **dict(zip(names, values, strict=True)))

            # A pool of their own: a capture that fails may leave it unusable.
            self._prompts[names] = Captured(read, self.block.device, pool=_new_pool(self.block.device))
        return self._prompts[names]

    def run(
        self, on_first_token: Callable[[], None] | None, on_tokens: Callable[[Tensor], None] | None
    ) -> VerifiedTokens:
        """Decode from where the sides stand; arguments as for `VerifiedEngine.generate`."""
        self.reports.begin()
        call = _Call(self, on_first_token, on_tokens)
        advance = self._launch if self.fixed else self._step
        if self.block.begins_with_token:
            advance(call, None)
        elif self.block.begins_with_start:
            self._read_start()
        while any(call.open):
            advance(call, call.size)
        call.hand_out()
        return VerifiedTokens(self.reports.tokens(0, max(call.counts), call.counts), call.acceptance)

    def advance(self, size: int) -> None:
        """Launch a block and what the draft reads behind it, where blocks are `fixed`, without a look at them."""
        self._graphs[size]()
        self._read_on()

    def _launch(self, call: "_Call", size: int | None) -> None:
        """Run a block, or the first token alone, by graphs; hand out what those before it gave.

        The draft reads on before the host knows whether that is the end, so that the device never waits.
        """
        (self._take_first if size is None else self._graphs[size])()
        self._read_on()
        call.hand_out()
        call.look(size)

    def _step(self, call: "_Call", size: int | None) -> None:
        """The same where looking is free: only as far as needed."""
        largest = max(call.counts) + (size or 0)
        if size is None:
            self.block.take_first()
        else:
            self.block.run(size, largest)
        call.look(size)
        call.hand_out()
        if any(call.open):
            self.block.read_on(size, largest + 2)


def _told(reports: BlockReports, work: Callable[..., None], *arguments: int) -> None:
    """Do a block's work, and tell of it."""
    work(*arguments)
    reports.tell()


def _new_pool(device: torch.device) -> Any:
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def _milliseconds(work: Callable[[], None]) -> float:
    """What work takes by the device's clock: the least of a few rounds."""
    rounds = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        rounds.append(begin.elapsed_time(end))
    return min(rounds)


class _Call:
    """What the host knows of a running call.

    Args:
        loop: that runs.
        on_first_token: see `VerifiedEngine.generate`.
        on_tokens: see `VerifiedEngine.generate`.
    """

    def __init__(
        self,
        loop: VerifiedLoop,
        on_first_token: Callable[[], None] | None,
        on_tokens: Callable[[Tensor], None] | None,
    ) -> None:
        self.choice, self.sizes, self.fixed = loop.choice, tuple(loop.times), loop.fixed
        self.reports, self.blocks = loop.reports, 0
        self.on_first_token, self.on_tokens = on_first_token, on_tokens
        self.length, self.acceptance = BlockLength(loop.times), Acceptance()
        batch = loop.block.batch
        self.counts, self.open, self.handed_out = [0] * batch, [True] * batch, 0

    @property
    def size(self) -> int:
        """Of the next block: no more than the row that has come least far still needs."""
        fewest = min(count for count, is_open in zip(self.counts, self.open, strict=True) if is_open)
        left = self.choice.max_new - fewest - 1
        if self.fixed:
            left = min((size for size in self.sizes if size >= left), default=left)
        return min(self.length.current, left)

    def look(self, size: int | None) -> None:
        """Take in what the next block gave, for which so many tokens were drafted; None for the first token alone."""
        rows = self.reports.rows(self.blocks)
        self.blocks += 1
        if self.on_first_token is not None:
            self.on_first_token()
            self.on_first_token = None
        self.counts, self.open = [row.produced for row in rows], [bool(row.is_open) for row in rows]
        if size is not None:
            took = [(row.accepted, row.taken) for row in rows if row.taken]  # a row that was open took one or more
            kept = sum(min(a, t) for a, t in took)
            refused = sum(a < size and a < t for a, t in took)
            self.length.learn(kept, refused)
            self.acceptance.add(Acceptance(1, len(took), size * len(took), kept))

    def hand_out(self) -> None:
        """Give away the tokens that all rows have by now, or have ended before."""
        if self.on_tokens is None:
            return
        going = [count for count, is_open in zip(self.counts, self.open, strict=True) if is_open]
        known = min(going) if going else max(self.counts)
        if known > self.handed_out:
            self.on_tokens(self.reports.tokens(self.handed_out, known, self.counts))
            self.handed_out = known
