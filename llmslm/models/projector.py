"""Projectors: from the width of the encoder's hidden states to the width of the slm's embeddings."""

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmslm.errors import UserError
from llmslm.models.attention import CrossAttention, RmsNorm, head_count
from llmslm.models.components import Component
from llmslm.models.packing import document_mask, document_positions

_ROTARY_BASE = 10_000.0


class Projector(Component):
    """Maps hidden_states (batch, prompt_len, encoder width) to prompt_embeds (batch, states, slm width).

    Args:
        encoder_hidden_size: width of the encoder's states.
        slm_hidden_size: width of the slm's embeddings.
        input_norm: normalise the encoder's states (RMS) before the map; states of inner layers are often large.
        output_norm: normalise the projected states (RMS) with a learned gain that `match_scale` sets to the
            scale of the slm's own embeddings. Without it, a random projector starts at a scale that
            the slm has never read, and training spends its first epochs on finding it.
    """

    keeps_positions: ClassVar[bool] = True
    """Whether state k of the result belongs to token k of the prompt, as an alignment needs."""

    def __init__(
        self,
        encoder_hidden_size: int,
        slm_hidden_size: int,
        input_norm: bool = False,
        output_norm: bool = True,
    ) -> None:
        super().__init__(encoder_hidden_size, slm_hidden_size)
        self.input_norm = input_norm
        self.output_norm = output_norm
        self.norm_in = RmsNorm(encoder_hidden_size, eps=1e-6) if input_norm else nn.Identity()
        self.norm_out = RmsNorm(slm_hidden_size, eps=1e-6) if output_norm else nn.Identity()

    def project(self, hidden_states: Tensor, documents: Tensor) -> Tensor:
        """Change the width; subclasses write this one."""
        raise NotImplementedError

    def states_mask(self, mask: Tensor) -> Tensor:
        """Return the mask (batch, states) of the projected states of prompts with this mask (batch, prompt_len)."""
        return mask

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Project hidden states to the slm's width.

        Args:
            hidden_states: (batch, prompt_len, encoder_hidden_size), right-padded.
            mask: (batch, prompt_len), 1 = a real state; all ones where None.
            documents: (batch, prompt_len), the example of each state in packed rows, -1 = padding; of a row's one
                prompt made from the mask where None.

        Returns:
            (batch, states, slm_hidden_size); one state a position where `keeps_positions`, and their mask is
            `states_mask(mask)`.
        """
        if documents is None:
            mask = hidden_states.new_ones(hidden_states.shape[:2]) if mask is None else mask
            documents = mask.long() - 1
        projected: Tensor = self.norm_out(self.project(self.norm_in(hidden_states), documents))
        return projected

    @torch.no_grad()
    def match_scale(self, embeddings: Tensor) -> None:
        """Start at the root mean square of the slm's own embeddings, (any, slm_hidden_size)."""
        if isinstance(self.norm_out, RmsNorm):
            self.norm_out.weight.fill_(embeddings.float().square().mean().sqrt())


class LinearProjector(Projector):
    """One linear layer."""

    def __init__(
        self, encoder_hidden_size: int, slm_hidden_size: int, input_norm: bool = False, output_norm: bool = True
    ) -> None:
        super().__init__(encoder_hidden_size, slm_hidden_size, input_norm, output_norm)
        self.linear = nn.Linear(encoder_hidden_size, slm_hidden_size)

    def project(self, hidden_states: Tensor, documents: Tensor) -> Tensor:
        """Apply the linear layer."""
        projected: Tensor = self.linear(hidden_states)
        return projected


class MlpProjector(Projector):
    """Linear, ReLU, Linear: the projector of the paper (arXiv 2402.16844, section 3).

    Args:
        encoder_hidden_size: width of the encoder's states.
        slm_hidden_size: width of the slm's embeddings.
        hidden_size: width between the two linear layers; the slm's width where it is None.
        input_norm: see `Projector`.
        output_norm: see `Projector`; the paper has none.
    """

    def __init__(
        self,
        encoder_hidden_size: int,
        slm_hidden_size: int,
        hidden_size: int | None = None,
        input_norm: bool = False,
        output_norm: bool = True,
    ) -> None:
        super().__init__(encoder_hidden_size, slm_hidden_size, input_norm, output_norm)
        self.hidden_size = hidden_size
        width = hidden_size or slm_hidden_size
        self.layers = nn.Sequential(nn.Linear(encoder_hidden_size, width), nn.ReLU(), nn.Linear(width, slm_hidden_size))

    def project(self, hidden_states: Tensor, documents: Tensor) -> Tensor:
        """Apply the two layers."""
        projected: Tensor = self.layers(hidden_states)
        return projected


class GatedMlpProjector(Projector):
    """SwiGLU: a linear layer, gated by SiLU of another, then a linear layer (arXiv 2002.05202).

    Args:
        encoder_hidden_size: width of the encoder's states.
        slm_hidden_size: width of the slm's embeddings.
        hidden_size: width inside; the slm's width where it is None.
        input_norm: see `Projector`.
        output_norm: see `Projector`.
    """

    def __init__(
        self,
        encoder_hidden_size: int,
        slm_hidden_size: int,
        hidden_size: int | None = None,
        input_norm: bool = False,
        output_norm: bool = True,
    ) -> None:
        super().__init__(encoder_hidden_size, slm_hidden_size, input_norm, output_norm)
        self.hidden_size = hidden_size
        width = hidden_size or slm_hidden_size
        self.gate = nn.Linear(encoder_hidden_size, width, bias=False)
        self.up = nn.Linear(encoder_hidden_size, width, bias=False)
        self.down = nn.Linear(width, slm_hidden_size, bias=False)

    def project(self, hidden_states: Tensor, documents: Tensor) -> Tensor:
        """Apply the gated layer."""
        projected: Tensor = self.down(nn.functional.silu(self.gate(hidden_states)) * self.up(hidden_states))
        return projected


class ReadingLayer(nn.Module):
    """A transformer layer without a causal mask, normalised (RMS) before its branches, which end at zero at first.

    Args:
        width: of the states.
        dropout: share of what a branch adds that is dropped in training.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = head_count(width)
        inner = 64 * round(8 * width / 3 / 64) or 64
        self.norm_attention = RmsNorm(width, eps=1e-6)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_feed_forward = RmsNorm(width, eps=1e-6)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, states: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Read (batch, len, width) by mask (batch, 1, len, len), at angles (batch, 1, 1, len, head size)."""
        both = self.query_key_value(self.norm_attention(states)).unflatten(-1, (3, self.heads, -1))
        query_key, value = both[:, :, :2].permute(0, 2, 3, 1, 4), both[:, :, 2].transpose(1, 2)
        first, second = query_key.chunk(2, dim=-1)
        query, key = (query_key * cos + torch.cat([-second, first], dim=-1) * sin).unbind(1)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        states = states + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.norm_feed_forward(states)).chunk(2, dim=-1)
        read: Tensor = states + self.dropout(self.down(functional.silu(gate) * up))
        return read


class TransformerProjector(Projector):
    """A linear map, then transformer layers in which each state of a prompt sees all others; it starts as the map.

    What reads a prompt may be deep, since it is run once for all of its tokens; what writes should be shallow, since it
    is run for each token. A deep encoder with a decoder of one or two layers keeps the quality of an even division
    (Kasai et al., arXiv 2006.10369), if the encoder is trained for it. The LLM stays frozen: this part is what is
    trained to read for the slm. Positions are rotary (arXiv 2104.09864).

    Args:
        encoder_hidden_size: width of the encoder's states.
        slm_hidden_size: width of the slm's embeddings, and of the layers.
        layers: number of layers.
        dropout: of what each attention and each feed-forward part adds, in training.
        input_norm: see `Projector`.
        output_norm: see `Projector`.
    """

    def __init__(
        self,
        encoder_hidden_size: int,
        slm_hidden_size: int,
        layers: int = 4,
        dropout: float = 0.0,
        input_norm: bool = True,
        output_norm: bool = True,
    ) -> None:
        super().__init__(encoder_hidden_size, slm_hidden_size, input_norm, output_norm)
        if layers < 1:
            raise UserError(f"TransformerProjector got layers={layers}; expected 1 or more (model.projector)")
        self.head_size = slm_hidden_size // head_count(slm_hidden_size)
        if self.head_size % 2:
            raise UserError(
                f"TransformerProjector rotates halves of heads, and an slm {slm_hidden_size} wide has heads of "
                f"{self.head_size}; set model.projector to llmslm.models.projector.MlpProjector"
            )
        self.layers = layers
        self.dropout = dropout
        self.linear = nn.Linear(encoder_hidden_size, slm_hidden_size, bias=False)
        self.reading = nn.ModuleList(ReadingLayer(slm_hidden_size, dropout) for _ in range(layers))

    def project(self, hidden_states: Tensor, documents: Tensor) -> Tensor:
        """Let the states of each prompt read one another."""
        states: Tensor = self.linear(hidden_states)
        mask = document_mask(documents, documents)
        cos, sin = (angle.to(states.dtype) for angle in rotary_angles(documents, self.head_size))
        for layer in self.reading:
            states = layer(states, mask, cos, sin)
        return states


def rotary_angles(documents: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (batch, 1, 1, len, head_size) of each state's position in its prompt."""
    # Said, since training in bf16-true makes another dtype the default one, which cannot tell far positions apart.
    exponents = torch.arange(0, head_size, 2, device=documents.device, dtype=torch.float32) / head_size
    angles = document_positions(documents)[..., None] / _ROTARY_BASE**exponents
    angles = torch.cat([angles, angles], dim=-1)[:, None, None]
    return angles.cos(), angles.sin()


class Resampler(Projector):
    """Learned queries that compress any prompt to the same number of states (Flamingo, arXiv 2204.14198, section 2.1).

    For fusions that need no alignment. Each layer attends to the whole prompt, then applies an MLP, both residual.

    Args:
        encoder_hidden_size: width of the encoder's states.
        slm_hidden_size: width of the slm's embeddings.
        states: number of queries, that is of states handed to the slm.
        layers: number of layers.
        input_norm: see `Projector`.
        output_norm: see `Projector`.
    """

    keeps_positions: ClassVar[bool] = False

    def __init__(
        self,
        encoder_hidden_size: int,
        slm_hidden_size: int,
        states: int = 32,
        layers: int = 2,
        input_norm: bool = True,
        output_norm: bool = True,
    ) -> None:
        super().__init__(encoder_hidden_size, slm_hidden_size, input_norm, output_norm)
        if states < 1 or layers < 1:
            raise UserError(f"Resampler got states={states}, layers={layers}; expected 1 or more (model.projector)")
        self.states = states
        self.layers = layers
        width = slm_hidden_size
        self.queries = nn.Parameter(torch.randn(states, width))
        self.attentions = nn.ModuleList(CrossAttention(width, encoder_hidden_size) for _ in range(layers))
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(RmsNorm(width, eps=1e-6), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )

    def states_mask(self, mask: Tensor) -> Tensor:
        """Return ones: each query makes a state, however long the prompt is."""
        return mask.new_ones(mask.shape[0], self.states)

    def project(self, hidden_states: Tensor, documents: Tensor) -> Tensor:
        """Let the queries read the prompt."""
        seen = (documents >= 0)[:, None, None, :]
        read = self.queries.to(hidden_states.dtype).expand(hidden_states.shape[0], -1, -1)
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            keys, values = cast(CrossAttention, attention).keys_values(hidden_states)
            read = read + attention(read, keys, values, seen)
            read = read + feed_forward(read)
        return read
