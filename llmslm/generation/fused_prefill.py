"""Whole prompts on CUDA: stacks of layers by few kernels each, for a model's prompt and for a frozen encoder.

A layer of a short prompt is five kernels, as in a decode step, each launched while its predecessor still runs: products
that begin with a norm and end with an activation or the residual, and attention. With more tokens products are
cuBLAS's, and nine kernels a layer. Either is read off the plan that the decode step has.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from llmslm.generation import fused_rows, kernels, prompt_kernels
from llmslm.generation.fused_rows import launch
from llmslm.generation.plan import Decoder, Linear, Norm, SelfAttention, Stack, Sublayer
from llmslm.generation.prefill import CausalPrefill, Passed, prompt_positions
from llmslm.generation.state import DecodeState
from llmslm.generation.step import product
from llmslm.models.encoder import Encoder

_BLOCK = 1024  # values of a row, or of heads, that a program of four warps takes
_PLACES = 16  # tokens of a short prompt whose attention a program works out


@dataclass(frozen=True)
class Prompts:
    """What a pass reads beside its states.

    attention_mask: (batch, length), 1 = attend; padding may lie on either side.
    positions: (batch, length), of the tokens.
    """

    attention_mask: Tensor
    positions: Tensor


class FusedStack:
    """The pass of sublayers over prompts.

    Args:
        stack: what to compute, with attention to the prompt itself alone.
        causal: whether a token sees none behind it.
    """

    def __init__(self, stack: Stack, *, causal: bool = True) -> None:
        self.stack, self.causal = stack, causal
        self._centred = any(sublayer.before is not None and sublayer.before.centred for sublayer in stack.sublayers)
        weight = stack.sublayers[0].into.weight if stack.sublayers else None
        if weight is not None and weight.is_cuda:  # weights are read before a predecessor has ended: none writes them
            torch.cuda.synchronize(weight.device)

    def states(self, x: Tensor, prompts: Prompts, cache: Tensor) -> Tensor:
        """Give the states behind the final norm, (batch * length, width).

        Args:
            x: (batch * length, width).
            prompts: their mask and positions.
            cache: (layers, 2, batch, kv_heads, capacity, head_dim), filled; a token's slot is its column.
        """
        return joined(*self.through(self.stack.sublayers, x, prompts, cache), self.stack.final_norm)[1]

    def through(
        self, sublayers: list[Sublayer], x: Tensor, prompts: Prompts, cache: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Take states x (batch * length, width) through some sublayers: x, and a branch that is still to be added.

        Args:
            sublayers: of the stack.
            x: what they start from.
            prompts: as for `states`.
            cache: as for `states`.
        """
        if fused_rows.suits_prompts(x, centred=self._centred):
            return self._through_short(sublayers, x, prompts, cache), None
        mask, added = seen_keys(prompts.attention_mask, x.dtype, causal=self.causal), None
        for sublayer in sublayers:
            (x, y), added = joined(x, added, sublayer.before), None
            y = product(y, sublayer.into)
            if isinstance(sublayer.inner, SelfAttention):
                y = self._attended(y, sublayer.inner, prompts.positions, mask, cache[sublayer.inner.layer])
            else:
                y = _activated(y, sublayer.into)
            added = product(y, sublayer.out)
            if sublayer.after is not None:
                x, added = joined(x, added, sublayer.after)[1], None
        return x, added

    def _through_short(self, sublayers: list[Sublayer], x: Tensor, prompts: Prompts, cache: Tensor) -> Tensor:
        for number, sublayer in enumerate(sublayers):
            y = linear(x, sublayer.into, sublayer.before, waits=not number)
            if isinstance(sublayer.inner, SelfAttention):
                y = self._attended_short(y, sublayer.inner, prompts, cache[sublayer.inner.layer])
            x = joined(linear(y, sublayer.out, residual=x), None, sublayer.after)[1]
        return x

    def _attended_short(self, qkv: Tensor, inner: SelfAttention, prompts: Prompts, cache: Tensor) -> Tensor:
        """See `_attended`."""
        (keys, values), (batch, length) = cache, prompts.positions.shape
        y = qkv.new_empty(batch * length, inner.heads * inner.head_dim)
        launch(
            prompt_kernels.prompt_attention_kernel,
            (batch * triton.cdiv(length, _PLACES), inner.heads),
            qkv,
            y,
            keys,
            values,
            prompts.attention_mask.contiguous(),
            prompts.positions,
            *(qkv if table is None else table for table in (self.stack.cos, self.stack.sin)),
            qkv if inner.q_norm is None else inner.q_norm.weight,
            qkv if inner.k_norm is None else inner.k_norm.weight,
            length,
            keys.shape[2],
            inner.scale,
            0.0 if inner.q_norm is None else inner.q_norm.eps,
            0.0 if inner.k_norm is None else inner.k_norm.eps,
            PLACES=_PLACES,
            KEYS=max(16, triton.next_power_of_2(length)),
            HEADS=inner.heads,
            KV_HEADS=inner.kv_heads,
            D=inner.head_dim,
            WIDTH=max(16, triton.next_power_of_2(inner.head_dim)),
            Q_NORM=inner.q_norm is not None,
            K_NORM=inner.k_norm is not None,
            ROTARY=inner.rotary,
            CAUSAL=self.causal,
            num_warps=4,
            **_early(qkv),
        )
        return y

    def _attended(self, qkv: Tensor, inner: SelfAttention, positions: Tensor, mask: Tensor, cache: Tensor) -> Tensor:
        """Store keys and values, then attend: (batch * length, heads * head_dim)."""
        (keys, values), (batch, length) = cache, positions.shape
        shared = inner.heads > inner.kv_heads
        heads = qkv.new_empty(3 if shared else 1, batch, length, inner.heads, inner.head_dim)
        width = triton.next_power_of_2(inner.head_dim)
        places, tables = max(1, _BLOCK // width), (self.stack.cos, self.stack.sin)
        launch(
            prompt_kernels.split_heads_kernel,
            (triton.cdiv(batch * length, places), inner.heads + 2 * inner.kv_heads),
            qkv,
            heads[0],
            heads[1 if shared else 0],
            heads[2 if shared else 0],
            keys,
            values,
            positions,
            *(qkv if table is None else table for table in tables),
            qkv if inner.q_norm is None else inner.q_norm.weight,
            qkv if inner.k_norm is None else inner.k_norm.weight,
            batch * length,
            length,
            keys.shape[2],
            0.0 if inner.q_norm is None else inner.q_norm.eps,
            0.0 if inner.k_norm is None else inner.k_norm.eps,
            PLACES=places,
            HEADS=inner.heads,
            KV_HEADS=inner.kv_heads,
            D=inner.head_dim,
            WIDTH=width,
            Q_NORM=inner.q_norm is not None,
            K_NORM=inner.k_norm is not None,
            ROTARY=inner.rotary,
            num_warps=4,
        )
        q, *wide = heads.transpose(2, 3).unbind()
        k, v = wide if shared else (keys[:, :, :length], values[:, :, :length])
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=inner.scale)
        return y.transpose(1, 2).reshape(batch * length, -1)


class FusedDecoder(FusedStack):
    """The pass of a decoder over prompts.

    Args:
        decoder: what to compute; without cross-attentions and biases by distance, which no decoder-only model has.
    """

    def __init__(self, decoder: Decoder) -> None:
        assert not decoder.crosses
        assert decoder.distance_bias is None
        super().__init__(decoder)
        self.decoder = decoder

    def __call__(self, prompt: Tensor, prompts: Prompts, cache: Tensor) -> Tensor:
        """See `states`; of ids (batch, length), or embeddings (batch, length, width)."""
        return self.states(self.embedded(prompt, prompts.positions), prompts, cache)

    def last_logits(self, prompt: Tensor, prompts: Prompts, cache: Tensor) -> Tensor:
        """Give the logits (batch, vocabulary) of what follows prompts that are padded on the left."""
        x = self.embedded(prompt, prompts.positions)
        x, added = self.through(self.decoder.sublayers, x, prompts, cache)
        last = x.view(*prompts.positions.shape, -1)[:, -1]
        if added is not None:
            last = last + added.view(*prompts.positions.shape, -1)[:, -1]
        return linear(last.contiguous(), self.decoder.head, self.decoder.final_norm, most=fused_rows.MOST_ROWS)

    def embedded(self, prompt: Tensor, positions: Tensor) -> Tensor:
        """(batch * length, width); embeddings that are given have been scaled already, and lack positions alone."""
        decoder, (tokens, width) = self.decoder, (positions.numel(), self.decoder.embedding.shape[1])
        x = decoder.embedding.new_empty(tokens, width)
        launch(
            prompt_kernels.embed_prompt_kernel,
            (tokens, triton.cdiv(width, _BLOCK)),
            prompt.contiguous(),
            positions,
            decoder.embedding,
            decoder.embedding if decoder.positions is None else decoder.positions,
            x,
            decoder.embedding_scale,
            decoder.position_offset,
            width,
            BLOCK=_BLOCK,
            IDS=prompt.dim() == 2,
            POSITIONS=0 if decoder.positions is None else decoder.positions.shape[0],
            num_warps=4,
        )
        return joined(x, None, decoder.embedding_norm)[1]


def linear(
    x: Tensor,
    linear: Linear,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    *,
    most: int | None = None,
    waits: bool = False,
) -> Tensor:
    """activation(linear(norm(x))) + residual, for x (rows, inputs); by one kernel, if there is one for that many rows.

    Arguments as for `fused_rows.rows_product`, and:

    Args:
        x: contiguous.
        linear: see `Linear`.
        norm: of x.
        residual: what is added.
        most: rows up to which that kernel is taken; those of prompts if not given.
        waits: whether all that was launched before is to have ended when it starts: then those behind it, which start
            early, may count on that.
    """
    if fused_rows.suits(x, linear, norm, fused_rows.PROMPT_ROWS if most is None else most):
        return fused_rows.rows_product(x, linear, norm, residual, {"EARLY": x.is_cuda} if waits else _early(x))
    y = product(joined(x, None, norm)[1], linear)
    if linear.activation is not None or linear.gated:
        y = _activated(y, linear)
    return y if residual is None else joined(y, residual, None)[0]


def _early(x: Tensor) -> dict[str, Any]:
    """Options of a launch: not to wait until its predecessor has ended."""
    return {"EARLY": True, "launch_pdl": True} if x.is_cuda else {"EARLY": False}


def seen_keys(attention_mask: Tensor, dtype: torch.dtype, *, causal: bool = True) -> Tensor:
    """See `causal_mask`; of a mask (batch, length) whose 1 means attend. If not causal, keys behind are seen, too."""
    batch, length = attention_mask.shape
    mask = torch.empty(batch, 1, length, length, dtype=dtype, device=attention_mask.device)
    lowest, grid = torch.finfo(dtype).min, (batch * length, triton.cdiv(length, _BLOCK))
    launch(
        prompt_kernels.seen_keys_kernel,
        grid,
        attention_mask.contiguous(),
        mask,
        length,
        lowest,
        BLOCK=_BLOCK,
        CAUSAL=causal,
        num_warps=4,
    )
    return mask


def columns(batch: int, length: int, device: torch.device) -> Tensor:
    """Positions (batch, length) of prompts that are padded on the right."""
    return torch.arange(length, device=device).expand(batch, -1).contiguous()


def joined(x: Tensor, added: Tensor | None, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """Take up a residual branch: x + added, and its norm, (rows, width) each.

    Args:
        x: (rows, width); rows may lie apart.
        added: the same, and as far apart.
        norm: no norm is no change.
    """
    if added is None and norm is None:
        return x, x
    rows, width = x.shape
    total = x if added is None else x.new_empty(rows, width)
    y = total if norm is None else x.new_empty(rows, width)
    block = triton.next_power_of_2(width)
    launch(
        prompt_kernels.add_norm_kernel,
        (rows,),
        x,
        x if added is None else added,
        total,
        y,
        x if norm is None else norm.weight,
        x if norm is None or norm.bias is None else norm.bias,
        x.stride(0),
        width,
        0.0 if norm is None else norm.eps,
        1.0 if norm is None else norm.scale,
        BLOCK=block,
        ADDED=added is not None,
        NORM=0 if norm is None else 1 + norm.centred,
        NORM_BIAS=norm is not None and norm.bias is not None,
        num_warps=min(16, max(1, block // 256)),
    )
    return total, y


def _activated(x: Tensor, linear: Linear) -> Tensor:
    """What `linear` does after its product."""
    rows, width = x.shape[0], x.shape[1] // (2 if linear.gated else 1)
    y = x.new_empty(rows, width)
    launch(
        prompt_kernels.activation_kernel,
        (rows, triton.cdiv(width, _BLOCK)),
        x,
        y,
        width,
        BLOCK=_BLOCK,
        ACTIVATION=kernels.ACTIVATIONS[linear.activation],
        GATED=linear.gated,
        num_warps=4,
    )
    return y


class FusedPrefill(CausalPrefill):
    """The pass of `CausalPrefill` by a `FusedDecoder`, which puts keys and values into the caches itself.

    Args:
        model: the model as it came.
        decoder: of it.
        state: whose caches are filled.
    """

    def __init__(self, model: PreTrainedModel, decoder: Decoder, state: DecodeState) -> None:
        super().__init__(model, decoder, state)
        self.run = FusedDecoder(decoder)

    def last_logits(self, prompt: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """See `CausalPrefill.last_logits`."""
        return self.run.last_logits(prompt, Prompts(attention_mask, positions), self.state.cache)


class FusedEncoder:
    """What `Encoder` gives of right-padded prompts, for one layer of a decoder-only model.

    Args:
        encoder: whose layer decides.
        decoder: of its model.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        wanted = decoder.sublayers[: 2 * encoder.depth]  # attention and feed-forward
        norm = None if encoder.is_inner else decoder.final_norm
        self.decoder = replace(decoder, sublayers=wanted, final_norm=norm)
        self.run = FusedDecoder(self.decoder)

    def __call__(self, prompt_ids: Tensor, prompt_attention_mask: Tensor) -> Tensor:
        """Read ids (batch, prompt_len); hidden_states (batch, prompt_len, width)."""
        shape, (batch, length) = self.decoder.shape, prompt_ids.shape
        one = self.decoder.embedding.new_empty(1, 2, batch, shape.kv_heads, length, shape.head_dim)
        cache = one.expand(shape.layers, -1, -1, -1, -1, -1)  # nobody reads a layer's keys and values after it
        prompts = Prompts(prompt_attention_mask, columns(batch, length, one.device))
        return self.run(prompt_ids, prompts, cache).view(batch, length, -1)


class FusedReader:
    """The pass over right-padded prompts that verified decoding starts from, of a decoder-only model.

    Args:
        decoder: of the model.
        depth: number of layers behind which states are wanted; all of them: behind the final norm; None: none are.
    """

    def __init__(self, decoder: Decoder, depth: int | None) -> None:
        self.decoder, self.run, self.depth = decoder, FusedDecoder(decoder), depth

    def __call__(
        self,
        prompt: Tensor,
        mask: Tensor,
        cache: Tensor | None = None,
        *,
        on_states: Callable[[Tensor], None] | None = None,
    ) -> Passed:
        """See `Passed`.

        Args:
            prompt: ids (batch, length), or embeddings (batch, length, width).
            mask: (batch, length), 1 = a real token; padding is on the right.
            cache: filled; see `FusedStack.states`. A new one if not given.
            on_states: called with the states (batch, length, width) that are wanted, before the layers above them run.
        """
        decoder, shape, (batch, length) = self.decoder, self.decoder.shape, mask.shape
        if cache is None:
            wide = (shape.layers, 2, batch, shape.kv_heads, length, shape.head_dim)
            cache = decoder.embedding.new_empty(wide)
        positions = prompt_positions(mask)
        last = torch.arange(0, batch * length, length, device=mask.device) + positions[:, -1]
        if decoder.max_positions is not None and length > decoder.max_positions:  # of a draft: its chance suffers
            positions = positions.clamp(max=decoder.max_positions - 1)
        below, prompts = 2 * (self.depth or 0), Prompts(mask, positions)  # attention and feed-forward
        x = self.run.embedded(prompt, positions)
        x, added = self.run.through(decoder.sublayers[:below], x, prompts, cache)
        is_last = below == len(decoder.sublayers)
        states = joined(x, added, decoder.final_norm if is_last else None)[1]
        if on_states is not None:
            on_states(states.view(batch, length, -1))
        if is_last:
            behind = states.index_select(0, last)
        else:
            x, added = self.run.through(decoder.sublayers[below:], states, prompts, cache)
            added = None if added is None else added.index_select(0, last)
            behind = joined(x.index_select(0, last), added, decoder.final_norm)[1]
        wanted = None if self.depth is None else states.view(batch, length, -1)
        return Passed(wanted, product(behind, decoder.head), cache)
