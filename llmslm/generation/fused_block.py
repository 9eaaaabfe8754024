"""Blocks of tokens on CUDA, by the kernels of `kernels.py` and `block_kernels.py`: their pass, and greedy verifying."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from llmslm.generation import block_kernels, fused
from llmslm.generation.acceptance import LONGEST
from llmslm.generation.block_reports import ToldReports
from llmslm.generation.choice import Choice
from llmslm.generation.fused import FusedStep
from llmslm.generation.plan import Decoder, SelfAttention
from llmslm.generation.side import Side
from llmslm.generation.state import DecodeState
from llmslm.generation.verified_block import VerifiedBlock


class FusedBlockStep(FusedStep):
    """The pass of `BlockStep` over consecutive tokens; it looks at no value from the host.

    Args:
        decoder: what to compute.
        state: whose caches are read and written.
        early: launch each kernel before its predecessor has ended.
    """

    def __init__(self, decoder: Decoder, state: DecodeState, *, early: bool = True) -> None:
        super().__init__(decoder, state, early=early)
        self.tokens = self.positions = torch.zeros(0, 0, dtype=torch.long)

    def read(self, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """See `BlockStep.read`; the kernels see from the positions how many slots there are to look at."""
        self.tokens, self.positions = tokens.contiguous(), positions.contiguous()
        return self.logits(length).view(*tokens.shape, -1)

    def embedded(self) -> Tensor:
        """See `BlockStep.embedded`."""
        return self._embedded(self.tokens, self.positions)

    def attended(self, qkv: Tensor, inner: SelfAttention, filled: int) -> Tensor:
        """See `BlockStep.attended`."""
        decoder, state, (rows, new) = self.decoder, self.state, self.tokens.shape
        keys, values = state.cache[inner.layer]
        y = qkv.new_empty(rows * new, inner.heads * inner.head_dim)
        bias = decoder.distance_bias if inner.biased and decoder.distance_bias is not None else qkv
        block_kernels.block_attention_kernel[(rows * new, inner.heads)](
            qkv,
            y,
            keys,
            values,
            self.positions,
            qkv if decoder.cos is None else decoder.cos,
            qkv if decoder.sin is None else decoder.sin,
            qkv if inner.q_norm is None else inner.q_norm.weight,
            qkv if inner.k_norm is None else inner.k_norm.weight,
            bias,
            state.capacity,
            0 if decoder.cos is None else decoder.cos.shape[0],
            bias.shape[1],
            inner.scale,
            0.0 if inner.q_norm is None else inner.q_norm.eps,
            NEW=new,
            PLACES=triton.next_power_of_2(new),
            HEADS=inner.heads,
            KV_HEADS=inner.kv_heads,
            D=inner.head_dim,
            WIDTH=triton.next_power_of_2(inner.head_dim),
            NORM=inner.q_norm is not None,
            ROTARY=inner.rotary,
            BIASED=inner.biased,
            **fused._attention_tile(rows * new * inner.heads, inner.head_dim),
            **self.options,
        )
        return y


@dataclass(frozen=True)
class _Places:
    """Tokens of rows that are read next: ids, positions, and tokens produced before what follows: (batch, new)."""

    tokens: Tensor
    positions: Tensor
    steps: Tensor


class FusedVerifiedBlock(VerifiedBlock):
    """The block of `VerifiedBlock` with few kernels, where the choice is "plain", see `TokenRules.mode`.

    Args:
        llm: verifies; its step is fused.
        draft: proposes; its step is fused.
        choice: of tokens.
    """

    def __init__(self, llm: Side, draft: Side, choice: Choice) -> None:
        super().__init__(llm, draft, choice)
        assert choice.mode == "plain"

    def run(self, size: int, largest: int | None = None) -> None:
        """See `VerifiedBlock.run`."""
        self.propose(size)
        self.verify(size)

    def propose(self, size: int) -> None:
        """Write drafted tokens behind those of each row."""
        logits, last = self.draft.next_logits, self._placed(self.draft, 1)
        for drafted in range(size):
            if drafted:
                logits = self.draft.block_step.read(last.tokens, last.positions, 0)[:, 0]
            self._take(logits, last)

    def verify(self, size: int) -> None:
        """Read them by the LLM, and keep what holds."""
        block = self._placed(self.llm, size + 1)
        logits = self.llm.block_step.read(block.tokens, block.positions, 0).flatten(0, 1)
        self._keep_largest(logits, block.steps, size)

    def take_first(self) -> None:
        """See `VerifiedBlock.take_first`."""
        self._keep_largest(self.llm.next_logits, self.produced, 0)

    def read_on(self, size: int | None = None, largest: int | None = None) -> None:
        """See `VerifiedBlock.read_on`."""
        read = self._placed(self.draft, 2, back=1, first_index=self.draft.first_index)
        logits = self.draft.block_step.read(read.tokens, read.positions, 0)
        is_second = self.produced > read.steps[:, 0]
        torch.where(is_second[:, None], logits[:, 1], logits[:, 0], out=self.draft.next_logits)

    def _placed(self, side: Side, new: int, *, back: int = 0, first_index: int = 0) -> _Places:
        """The tokens that a side reads, from `back` before each row's last one or the first index on."""
        tokens = torch.empty(self.batch, new, dtype=torch.long, device=self.device)
        given = _Places(tokens, torch.empty_like(tokens), torch.empty_like(tokens))
        block_kernels.place_kernel[(self.batch * new,)](
            self.tokens,
            self.produced,
            side.base,
            side.start,
            given.tokens,
            given.positions,
            given.steps,
            back,
            first_index,
            self.tokens.shape[1],
            side.decoder.embedding.shape[0],
            NEW=new,
            num_warps=1,
            **_step(side).options,
        )
        return given

    def _take(self, logits: Tensor, last: _Places) -> None:
        """Write the draft's next token, and make it the last one."""
        logits = logits[:, : self.choice.vocabulary].contiguous()
        value, index = _step(self.draft).largest(logits, self.choice.rules, last.steps)
        block_kernels.draft_kernel[(self.batch,)](
            value,
            index,
            self.tokens,
            last.tokens,
            last.positions,
            last.steps,
            value.shape[1],
            self.tokens.shape[1],
            logits.shape[1],
            self.draft.decoder.embedding.shape[0],
            CHUNKS=triton.next_power_of_2(value.shape[1]),
            num_warps=1,
            **_step(self.draft).options,
        )

    def _keep_largest(self, logits: Tensor, steps: Tensor, size: int) -> None:
        """Keep what holds of a block of drafted tokens, by the LLM's logits (batch * (size + 1), vocabulary)."""
        eos = self.choice.rules.eos
        value, index = _step(self.llm).largest(logits, self.choice.rules, steps)
        block_kernels.keep_kernel[(self.batch,)](
            value,
            index,
            eos if eos.numel() else self.produced,
            self.tokens,
            self.produced,
            self.ended,
            self.report,
            self.choice.max_new,
            value.shape[1],
            self.tokens.shape[1],
            logits.shape[1],
            self.batch,
            SIZE=size,
            PLACES=triton.next_power_of_2(size + 1),
            CHUNKS=triton.next_power_of_2(value.shape[1]),
            ENDS=eos.numel(),
            num_warps=1,  # of several, one could read what another has written already
            **_step(self.llm).options,
        )


class FusedReports(ToldReports):
    """Words that a kernel writes, of a block in plain torch as of a fused one."""

    def tell(self) -> None:
        """See `BlockReports.tell`."""
        block, words = self.block, self.words
        block_kernels.tell_block_kernel[(block.batch,)](
            block.tokens,
            block.report,
            block.told,
            words.buffer,
            words.number,
            words.max_new,
            words.blocks,
            block.tokens.shape[1],
            block.batch,
            PLACES=triton.next_power_of_2(LONGEST + 1),
            num_warps=1,  # as for what is kept: of several, one could read a count that another has written already
            **_step(block.llm).options,
        )


def _step(side: Side) -> FusedBlockStep:
    assert isinstance(side.block_step, FusedBlockStep)
    return side.block_step
