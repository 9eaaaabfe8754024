"""A decoder as a list of fused sublayers: what one decode step must compute, free of any model family's modules.

Every sublayer is `x = after(x + out(inner(into(before(x)))))`; inner is self-attention, cross-attention or nothing but
the activation that `into` ends with. That is all that the families read by `families.py` need for one token.
"""

from dataclasses import dataclass, field

from torch import Tensor

from llmslm.generation.state import CacheShape


@dataclass(frozen=True)
class Norm:
    """RMS norm, or layer norm if `centred`: over the last dimension, in float32.

    `scale` multiplies the result (T5 scales its last states before a tied head).
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool
    scale: float = 1.0


@dataclass(frozen=True)
class Linear:
    """y = activation(weight x + bias); weight is (out, in).

    If `gated`, weight holds gate rows, then as many plain rows, and y = activation(gate x) * (plain x).
    `row_scale` (out,) multiplies the rows of a weight of 8 bits.
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    gated: bool = False
    row_scale: Tensor | None = None


@dataclass(frozen=True)
class SelfAttention:
    """Attention over the tokens so far. `into` gives queries, keys and values side by side.

    Args:
        layer: index into the cache.
        heads: number of query heads.
        kv_heads: number of key and value heads.
        head_dim: width of a head.
        scale: multiplies the products of queries and keys.
        q_norm: norm over each query head, before the rotation.
        k_norm: norm over each key head, before the rotation.
        rotary: whether queries and keys are rotated by the decoder's `cos` and `sin`.
        biased: whether the decoder's `distance_bias` is added to the scores.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rotary: bool = False
    biased: bool = False


@dataclass(frozen=True)
class CrossAttention:
    """Attention over the encoder's states. `into` gives queries; `key_value` maps the states to keys and values."""

    layer: int
    heads: int
    head_dim: int
    scale: float
    key_value: Linear


@dataclass(frozen=True)
class Sublayer:
    """One residual branch; `before` and `after` are its norms."""

    into: Linear
    out: Linear
    inner: SelfAttention | CrossAttention | None = None
    before: Norm | None = None
    after: Norm | None = None


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Sublayers over states that are given.

    Args:
        sublayers: in order.
        final_norm: behind them.
        cos: of the rotary angles, (positions, head_dim), float32.
        sin: of the rotary angles, (positions, head_dim), float32.
    """

    sublayers: list[Sublayer]
    final_norm: Norm | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Decoder(Stack):
    """All that a decode step reads: the sublayers, embeddings before them and a head behind the final norm.

    Args:
        embedding: (vocabulary, width).
        head: last states to logits.
        shape: cache sizes.
        embedding_scale: multiplies embeddings.
        positions: learned embeddings of positions, (positions, width), if any.
        position_offset: row of `positions` that position 0 has.
        embedding_norm: applied to the sum of both.
        distance_bias: (heads, distances), float32: added to a score by how far back its key lies; the last serves
            all that lie farther.
        max_positions: positions that the model can have; None if unlimited.
        reads_prompts: whether prompts, too, are read by what this says, where there are kernels for it; else the
            model's own forward reads them.
        window: tokens that some layer sees at most; None if all see all. A step sees all, so it serves no longer texts.
    """

    embedding: Tensor
    head: Linear
    shape: CacheShape
    embedding_scale: float = 1.0
    positions: Tensor | None = None
    position_offset: int = 0
    embedding_norm: Norm | None = None
    distance_bias: Tensor | None = None
    max_positions: int | None = None
    window: int | None = None
    reads_prompts: bool = True
    crosses: list[CrossAttention] = field(default_factory=list)

    def decoding_bytes(self) -> int:
        """Bytes of weights that one decode step reads, whatever the batch; single rows of embeddings left out."""
        layers = [linear for sublayer in self.sublayers for linear in (sublayer.into, sublayer.out)]
        weights = [linear.weight for linear in [*layers, self.head]]
        return sum(weight.numel() * weight.element_size() for weight in weights)
