"""One pass of a decoder over several new tokens a row, whose rows may stand at different positions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from llmslm.generation.native import WIDEST_BATCH, can_run, product
from llmslm.generation.plan import CrossAttention, Decoder, Linear, Norm, SelfAttention
from llmslm.generation.state import DecodeState
from llmslm.generation.step import TorchStep, normalised, rotated


class BlockStep(TorchStep):
    """Reads blocks of tokens into the caches of a state.

    The token of position p lies in slot p of its row, so taking tokens back costs nothing: the next block is read
    from an earlier position and writes over what lies there. Slots after a token's own are never seen by it.

    Args:
        decoder: what to compute.
        state: whose caches are read and written.
    """

    def __init__(self, decoder: Decoder, state: DecodeState) -> None:
        super().__init__(decoder, state)
        self._native = state.device.type == "cpu" and can_run(decoder, state.batch)
        self.tokens = self.positions = torch.zeros(0, 0, dtype=torch.long)
        self.mask = torch.zeros(0)
        self.bias: Tensor | None = None

    def read(self, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """Read tokens (batch, new) at positions (batch, new); logits (batch, new, vocabulary) of what follows each.

        Args:
            tokens: ids.
            positions: consecutive along a row.
            length: slots that are looked at, more than the largest position.
        """
        self.tokens, self.positions = tokens, positions
        behind = positions[:, None, :, None] - torch.arange(length, device=positions.device)
        self.mask, self.bias = behind >= 0, None
        if self.decoder.distance_bias is not None:
            table = self.decoder.distance_bias.to(self.decoder.embedding.dtype)
            bias = table[:, behind[:, 0].clamp(0, table.shape[1] - 1)].transpose(0, 1)
            self.bias = bias.masked_fill(~self.mask, float("-inf"))
        return self.logits(length).view(*tokens.shape, -1)

    def embedded(self) -> Tensor:
        """Embeddings of the block's tokens, (batch * new, width)."""
        decoder = self.decoder
        x = F.embedding(self.tokens.flatten(), decoder.embedding)
        if decoder.embedding_scale != 1.0:
            x = x * decoder.embedding_scale
        if decoder.positions is not None:
            rows = self.positions.flatten() + decoder.position_offset
            # Positions beyond the table belong to tokens beyond the end, whose logits nobody reads.
            x = x + F.embedding(rows.clamp(max=decoder.positions.shape[0] - 1), decoder.positions)
        return normalised(x, decoder.embedding_norm)

    def linear(self, x: Tensor, linear: Linear, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """See `TorchStep.linear`; torch's own products of a few rows take twice the time that the weights' bytes do."""
        native_too = self._native and x.shape[0] <= WIDEST_BATCH[linear.weight.dtype] and linear.weight.is_contiguous()
        if not native_too:
            return super().linear(x, linear, norm, residual)
        return product(normalised(x, norm), linear, residual)

    def attended(self, qkv: Tensor, inner: SelfAttention, filled: int) -> Tensor:
        """Store the block's keys and values, then attend up to each token: (batch * new, heads * head_dim)."""
        heads = qkv.view(*self.tokens.shape, -1, inner.head_dim)
        q, k, v = heads.split([inner.heads, inner.kv_heads, inner.kv_heads], dim=2)
        q, k = normalised(q, inner.q_norm), normalised(k, inner.k_norm)
        if inner.rotary:
            assert self.decoder.cos is not None
            assert self.decoder.sin is not None
            angles = self.positions.clamp(max=self.decoder.cos.shape[0] - 1)
            cos, sin = self.decoder.cos[angles, None], self.decoder.sin[angles, None]
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        keys, values = self.state.cache[inner.layer]
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        keys[rows, :, self.positions] = k.to(keys.dtype)
        values[rows, :, self.positions] = v
        mask = self.mask if self.bias is None or not inner.biased else self.bias
        return _attention(q, keys[:, :, :filled], values[:, :, :filled], mask, inner.scale)

    def cross_attended(self, q: Tensor, inner: CrossAttention) -> Tensor:
        """Attend over the encoder's states: (batch * new, heads * head_dim)."""
        keys, values = self.state.cross[inner.layer]
        mask = self.state.encoder_valid[:, None, None]
        return _attention(q.view(*self.tokens.shape, inner.heads, inner.head_dim), keys, values, mask, inner.scale)


def _attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of q (batch, new, heads, head_dim) over keys and values (batch, kv_heads, length, head_dim)."""
    grouped = q.shape[2] != keys.shape[1]
    q = q.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, keys, values, mask, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2).flatten(0, 1)
