"""Projectors: from the width of the encoder's hidden states to the width of the slm's embeddings."""

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from llmslm.errors import UserError
from llmslm.models.attention import CrossAttention
from llmslm.models.components import Component


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
        self.norm_in = nn.RMSNorm(encoder_hidden_size, eps=1e-6) if input_norm else nn.Identity()
        self.norm_out = nn.RMSNorm(slm_hidden_size, eps=1e-6) if output_norm else nn.Identity()

    def project(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Change the width; subclasses write this one."""
        raise NotImplementedError

    def states_mask(self, mask: Tensor) -> Tensor:
        """Return the mask (batch, states) of the projected states of prompts with this mask (batch, prompt_len)."""
        return mask

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Project hidden states to the slm's width.

        Args:
            hidden_states: (batch, prompt_len, encoder_hidden_size), right-padded.
            mask: (batch, prompt_len), 1 = a real state; all ones where None.

        Returns:
            (batch, states, slm_hidden_size); one state a position where `keeps_positions`, and their mask is
            `states_mask(mask)`.
        """
        mask = hidden_states.new_ones(hidden_states.shape[:2]) if mask is None else mask
        projected: Tensor = self.norm_out(self.project(self.norm_in(hidden_states), mask))
        return projected

    @torch.no_grad()
    def match_scale(self, embeddings: Tensor) -> None:
        """Start at the root mean square of the slm's own embeddings, (any, slm_hidden_size)."""
        if isinstance(self.norm_out, nn.RMSNorm):
            self.norm_out.weight.fill_(embeddings.float().square().mean().sqrt())


class LinearProjector(Projector):
    """One linear layer."""

    def __init__(
        self, encoder_hidden_size: int, slm_hidden_size: int, input_norm: bool = False, output_norm: bool = True
    ) -> None:
        super().__init__(encoder_hidden_size, slm_hidden_size, input_norm, output_norm)
        self.linear = nn.Linear(encoder_hidden_size, slm_hidden_size)

    def project(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
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

    def project(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
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

    def project(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Apply the gated layer."""
        projected: Tensor = self.down(nn.functional.silu(self.gate(hidden_states)) * self.up(hidden_states))
        return projected


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
            nn.Sequential(
                nn.RMSNorm(width, eps=1e-6), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )
            for _ in range(layers)
        )

    def states_mask(self, mask: Tensor) -> Tensor:
        """Return ones: each query makes a state, however long the prompt is."""
        return mask.new_ones(mask.shape[0], self.states)

    def project(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Let the queries read the prompt."""
        seen = mask.bool()[:, None, None, :]
        read = self.queries.to(hidden_states.dtype).expand(hidden_states.shape[0], -1, -1)
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            keys, values = cast(CrossAttention, attention).keys_values(hidden_states)
            read = read + attention(read, keys, values, seen)
            read = read + feed_forward(read)
        return read
