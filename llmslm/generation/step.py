"""One decode step in plain torch: exact on any device, and what the fused kernels are held against."""

import torch
from torch import Tensor
from torch.nn import functional as F

from llmslm.generation.int8 import int8_product
from llmslm.generation.plan import CrossAttention, Decoder, Linear, Norm, SelfAttention
from llmslm.generation.sampling import TokenRules
from llmslm.generation.state import DecodeState


def normalised(x: Tensor, norm: Norm | None) -> Tensor:
    """Norm over the last dimension; no norm is no change."""
    if norm is None:
        return x
    width = (x.shape[-1],)
    if norm.centred:
        y = F.layer_norm(x, width, norm.weight, norm.bias, norm.eps)
    else:
        y = F.rms_norm(x, width, norm.weight, norm.eps)
    return y if norm.scale == 1.0 else y * norm.scale


def activated(x: Tensor, linear: Linear) -> Tensor:
    """What `linear` does after its product."""
    gate, plain = x.chunk(2, dim=-1) if linear.gated else (x, None)
    if linear.activation == "gelu_tanh":
        gate = F.gelu(gate, approximate="tanh")
    elif linear.activation is not None:
        gate = getattr(F, linear.activation)(gate)
    return gate if plain is None else gate * plain


def product(x: Tensor, linear: Linear) -> Tensor:
    """Weight x + bias, for x (..., in)."""
    if linear.row_scale is None:
        return F.linear(x.to(linear.weight.dtype), linear.weight, linear.bias)
    return int8_product(x, linear.weight, linear.row_scale, linear.bias).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads (batch, heads, head_dim) by angles (batch, 1, head_dim)."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class TorchStep:
    """The decode step of one decoder over one state.

    Args:
        decoder: what to compute.
        state: what it reads and advances.
    """

    def __init__(self, decoder: Decoder, state: DecodeState) -> None:
        self.decoder, self.state = decoder, state

    def logits(self, filled: int) -> Tensor:
        """Read each row's last token, give the logits of the next, (batch, vocabulary); the state does not move on.

        Args:
            filled: positions of the cache that hold tokens before this one, the same for all rows.
        """
        decoder = self.decoder
        x = self.embedded()
        for sublayer in decoder.sublayers:
            y = self.linear(x, sublayer.into, sublayer.before)
            if isinstance(sublayer.inner, SelfAttention):
                y = self.attended(y, sublayer.inner, filled)
            elif isinstance(sublayer.inner, CrossAttention):
                y = self.cross_attended(y, sublayer.inner)
            x = normalised(self.linear(y, sublayer.out, residual=x), sublayer.after)
        return self.linear(x, decoder.head, decoder.final_norm)

    def take_largest(self, logits: Tensor, rules: TokenRules) -> None:
        """Take each row's most probable token and move the state on, when the rules are plain."""
        rules.choose(logits, self.state)
        self.state.move_on()

    def tell(self) -> None:
        """Tell the host of the token just taken, where `take_largest` does so; here the host looks at the state."""

    def embedded(self) -> Tensor:
        """Embeddings of the last tokens at their positions, (batch, width)."""
        decoder, state = self.decoder, self.state
        x = F.embedding(state.token, decoder.embedding)
        if decoder.embedding_scale != 1.0:
            x = x * decoder.embedding_scale
        if decoder.positions is not None:
            x = x + F.embedding(state.position + decoder.position_offset, decoder.positions)
        return normalised(x, decoder.embedding_norm)

    def linear(self, x: Tensor, linear: Linear, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """activation(linear(norm(x))) + residual."""
        y = activated(product(normalised(x, norm), linear), linear)
        return y if residual is None else residual + y

    def attended(self, qkv: Tensor, inner: SelfAttention, filled: int) -> Tensor:
        """Store this token's key and value, then attend over all so far: (batch, heads * head_dim)."""
        state = self.state
        heads = qkv.view(state.batch, -1, inner.head_dim)
        q, k, v = heads.split([inner.heads, inner.kv_heads, inner.kv_heads], dim=1)
        q, k = normalised(q, inner.q_norm), normalised(k, inner.k_norm)
        if inner.rotary:
            assert self.decoder.cos is not None
            assert self.decoder.sin is not None
            cos, sin = self.decoder.cos[state.position, None], self.decoder.sin[state.position, None]
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        keys, values = state.cache[inner.layer]
        keys[:, :, filled], values[:, :, filled] = k, v
        mask = self._self_mask(inner, filled + 1, q.dtype)
        keys, values = keys[:, :, : filled + 1], values[:, :, : filled + 1]
        return _attention(q, keys, values, mask, inner.scale)

    def _self_mask(self, inner: SelfAttention, length: int, dtype: torch.dtype) -> Tensor:
        valid = self.state.valid[:, None, None, :length]
        bias = self.decoder.distance_bias
        if not inner.biased or bias is None:
            return valid
        distance = torch.arange(length - 1, -1, -1, device=bias.device).clamp(max=bias.shape[1] - 1)
        return bias[:, distance].to(dtype)[None, :, None].masked_fill(~valid, float("-inf"))

    def cross_attended(self, q: Tensor, inner: CrossAttention) -> Tensor:
        """Attend over the encoder's states: (batch, heads * head_dim)."""
        state = self.state
        keys, values = state.cross[inner.layer]
        mask = state.encoder_valid[:, None, None]
        return _attention(q.view(state.batch, inner.heads, inner.head_dim), keys, values, mask, inner.scale)


def _attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    grouped = q.shape[1] != keys.shape[1]
    y = F.scaled_dot_product_attention(q[:, :, None], keys, values, mask, scale=scale, enable_gqa=grouped)
    return y.flatten(1)


def fill_cross_cache(decoder: Decoder, state: DecodeState, hidden_states: Tensor) -> None:
    """Keys and values of encoder states (batch, length, width), for every cross-attention."""
    length = hidden_states.shape[1]
    for cross in decoder.crosses:
        both = product(hidden_states, cross.key_value)
        both = both.view(state.batch, length, 2, cross.heads, cross.head_dim).permute(2, 0, 3, 1, 4)
        state.cross[cross.layer, :, :, :, :length].copy_(both)
        del both  # before the next one is made
