"""One decode step on CUDA, by the kernels of `kernels.py`; wide batches leave their products to cuBLAS."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from llmslm.generation import fused_rows, kernels
from llmslm.generation.plan import CrossAttention, Decoder, Linear, Norm, SelfAttention
from llmslm.generation.sampling import TokenRules
from llmslm.generation.state import DecodeState
from llmslm.generation.step import TorchStep, normalised

WIDEST_BATCH = 8  # above it products are left to `fused_rows`, or to cuBLAS
_CHUNK = 1024  # of the vocabulary, for the argmax
_WIDEST = 8192  # input width up to which a program holds the whole input


@dataclass(frozen=True)
class Tile:
    """How programs of the product kernels cover a matrix: rows and columns at a time, warps, number of programs."""

    rows: int
    columns: int
    warps: int
    programs: int


def tile_for(rows: int, columns: int, batch: int, gated: bool) -> Tile:
    """Choose the tile for a matrix (rows, columns).

    What was fastest on an H200 for 13 shapes from 512 x 512 to 50,257 x 768: 64 weights a thread at a time, the
    narrowest programs that can hold the input, 512 threads a multiprocessor, and a tile for each multiprocessor.
    """
    wide = triton.next_power_of_2(columns)
    passes = wide > _WIDEST
    wide = 2048 if passes else wide
    warps = 2 if wide <= 1024 else 4 if wide <= 4096 else 8
    work = wide * triton.next_power_of_2(batch) * (2 if gated else 1)
    tall = 1
    while tall * 2 * work <= 64 * 32 * warps and rows >= tall * 2 * 128:
        tall *= 2
    tiles = triton.cdiv(rows, tall)
    return Tile(tall, wide, warps, tiles if passes else min(tiles, 132 * 16 // warps))


def _attention_tile(programs: int, head_dim: int) -> dict[str, int]:
    """Positions at a time, and warps: few programs want wide blocks, many want narrow ones (measured on an H200)."""
    width = triton.next_power_of_2(head_dim)
    if programs > 264:
        return {"BLOCK_L": max(16, 2048 // width), "num_warps": 2}
    block = 256 if width <= 64 else 8192 // width
    return {"BLOCK_L": block, "num_warps": max(1, block * width // 2048)}


class FusedStep(TorchStep):
    """The step of `TorchStep` with few kernels, nothing that depends on the host, and the argmax at its end.

    Args:
        decoder: what to compute.
        state: what it reads and advances.
        early: launch each kernel before its predecessor has ended.
    """

    def __init__(self, decoder: Decoder, state: DecodeState, *, early: bool = True) -> None:
        super().__init__(decoder, state)
        self.options: dict[str, Any] = {"EARLY": early}
        if early:
            self.options["launch_pdl"] = True
            # Weights are read before the predecessor has ended, and it may have written them.
            if decoder.embedding.is_cuda:
                torch.cuda.synchronize(decoder.embedding.device)

    def embedded(self) -> Tensor:
        """See `TorchStep.embedded`."""
        return self._embedded(self.state.token, self.state.position)

    def _embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        decoder = self.decoder
        width = decoder.embedding.shape[1]
        x = decoder.embedding.new_empty(tokens.numel(), width)
        kernels.embed_kernel[(tokens.numel(), triton.cdiv(width, 1024))](
            tokens,
            positions,
            decoder.embedding,
            decoder.embedding if decoder.positions is None else decoder.positions,
            x,
            decoder.embedding_scale,
            decoder.position_offset,
            width,
            BLOCK=1024,
            POSITIONS=0 if decoder.positions is None else decoder.positions.shape[0],
            num_warps=4,
            **self.options,
        )
        return normalised(x, decoder.embedding_norm)

    def linear(
        self,
        x: Tensor,
        linear: Linear,
        norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """See `TorchStep.linear`."""
        if fused_rows.suits(x, linear, norm):
            return fused_rows.rows_product(x, linear, norm, residual, self.options)
        long = x.shape[1] > _WIDEST and (norm is not None or linear.activation is not None or linear.gated)
        if x.shape[0] > WIDEST_BATCH or long:
            return super().linear(x, linear, norm, residual)
        batch, columns = x.shape
        rows = linear.weight.shape[0] // (2 if linear.gated else 1)
        tile = tile_for(rows, columns, batch, linear.gated)
        weight, bias = linear.weight, linear.weight if linear.bias is None else linear.bias
        y = torch.empty(batch, rows, device=x.device, dtype=x.dtype)
        common: dict[str, Any] = {
            "BATCH": batch,
            "ROWS": triton.next_power_of_2(batch),
            "BLOCK_N": tile.rows,
            "BLOCK_K": tile.columns,
            "BIAS": linear.bias is not None,
            "RESIDUAL": residual is not None,
            "num_warps": tile.warps,
            **self.options,
        }
        added = x if residual is None else residual
        if tile.columns < columns:
            kernels.long_linear_kernel[(tile.programs,)](x, weight, y, bias, added, rows, columns, **common)
            return y
        kernels.linear_kernel[(tile.programs,)](
            x,
            weight,
            y,
            weight if norm is None else norm.weight,
            weight if norm is None or norm.bias is None else norm.bias,
            bias,
            added,
            rows,
            columns,
            0.0 if norm is None else norm.eps,
            1.0 if norm is None else norm.scale,
            NORM=0 if norm is None else 1 + norm.centred,
            NORM_BIAS=norm is not None and norm.bias is not None,
            ACTIVATION=kernels.ACTIVATIONS[linear.activation],
            GATED=linear.gated,
            **common,
        )
        return y

    def attended(self, qkv: Tensor, inner: SelfAttention, filled: int) -> Tensor:
        """See `TorchStep.attended`; the kernel reads from the state how far the cache is filled."""
        decoder, state = self.decoder, self.state
        keys, values = state.cache[inner.layer]
        y = qkv.new_empty(state.batch, inner.heads * inner.head_dim)
        bias = decoder.distance_bias if inner.biased and decoder.distance_bias is not None else qkv
        kernels.self_attention_kernel[(state.batch, inner.heads)](
            qkv,
            y,
            keys,
            values,
            state.valid.view(torch.int8),
            state.slot,
            state.position,
            qkv if decoder.cos is None else decoder.cos,
            qkv if decoder.sin is None else decoder.sin,
            qkv if inner.q_norm is None else inner.q_norm.weight,
            qkv if inner.k_norm is None else inner.k_norm.weight,
            bias,
            state.capacity,
            bias.shape[1],
            inner.scale,
            0.0 if inner.q_norm is None else inner.q_norm.eps,
            HEADS=inner.heads,
            KV_HEADS=inner.kv_heads,
            D=inner.head_dim,
            WIDTH=triton.next_power_of_2(inner.head_dim),
            NORM=inner.q_norm is not None,
            ROTARY=inner.rotary,
            BIASED=inner.biased,
            **_attention_tile(state.batch * inner.heads, inner.head_dim),
            **self.options,
        )
        return y

    def cross_attended(self, q: Tensor, inner: CrossAttention) -> Tensor:
        """See `TorchStep.cross_attended`."""
        state, rows = self.state, q.shape[0]
        keys, values = state.cross[inner.layer]
        y = torch.empty_like(q)
        kernels.cross_attention_kernel[(rows, inner.heads)](
            q,
            y,
            keys,
            values,
            state.encoder_valid.view(torch.int8),
            state.encoder_capacity,
            inner.scale,
            NEW=rows // state.batch,
            HEADS=inner.heads,
            D=inner.head_dim,
            WIDTH=triton.next_power_of_2(inner.head_dim),
            **_attention_tile(rows * inner.heads, inner.head_dim),
            **self.options,
        )
        return y

    def take_largest(self, logits: Tensor, rules: TokenRules) -> None:
        """See `TorchStep.take_largest`."""
        state, eos = self.state, rules.eos
        value, index = self.largest(logits, rules, state.step)
        kernels.advance_kernel[(state.batch,)](
            value,
            index,
            eos if eos.numel() else state.token,
            state.token,
            state.finished.view(torch.int8),
            state.out,
            state.step,
            state.slot,
            state.position,
            state.words.buffer,
            state.words.number,
            value.shape[1],
            state.capacity,
            logits.shape[1],
            rules.pad,
            BLOCK=triton.next_power_of_2(value.shape[1]),
            ENDS=eos.numel(),
            num_warps=4,
            **self.options,
        )

    def tell(self) -> None:
        """See `TorchStep.tell`."""
        state = self.state
        kernels.tell_step_kernel[(state.batch,)](
            state.token,
            state.finished.view(torch.int8),
            state.step,
            state.words.buffer,
            state.words.number,
            num_warps=1,
            **self.options,
        )

    def largest(self, logits: Tensor, rules: TokenRules, step: Tensor) -> tuple[Tensor, Tensor]:
        """Find the largest of each chunk of logits (rows, vocabulary), and its token: (rows, chunks) each.

        Args:
            logits: contiguous.
            rules: whose ends do not count before the state's min_new tokens.
            step: (rows,) tokens before the one that is chosen.
        """
        (rows, vocabulary), eos = logits.shape, rules.eos
        chunks = triton.cdiv(vocabulary, _CHUNK)
        value = torch.empty(rows, chunks, device=logits.device)
        index = torch.empty(rows, chunks, device=logits.device, dtype=torch.int32)
        kernels.largest_kernel[(rows, chunks)](
            logits,
            value,
            index,
            eos if eos.numel() else step,
            step,
            self.state.min_new,
            vocabulary,
            BLOCK=_CHUNK,
            ENDS=eos.numel(),
            num_warps=4,
            **self.options,
        )
        return value, index
