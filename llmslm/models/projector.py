"""Projectors: from the width of the encoder's hidden states to the width of the slm's embeddings."""

import torch
from torch import Tensor, nn

from llmslm.models.components import Component


class Projector(Component):
    """Maps hidden_states (batch, prompt_len, encoder width) to prompt_embeds (batch, prompt_len, slm width).

    Args:
        encoder_hidden_size: width of the encoder's states.
        slm_hidden_size: width of the slm's embeddings.
        input_norm: normalise the encoder's states (RMS) before the map; states of inner layers are often large.
        output_norm: normalise the projected states (RMS) with a learned gain that `match_scale` sets to the
            scale of the slm's own embeddings. Without it, a random projector starts at a scale that
            the slm has never read, and training spends its first epochs on finding it.
    """

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

    def project(self, hidden_states: Tensor) -> Tensor:
        """Change the width; subclasses write this one."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Project (batch, prompt_len, encoder_hidden_size) to (batch, prompt_len, slm_hidden_size)."""
        projected: Tensor = self.norm_out(self.project(self.norm_in(hidden_states)))
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

    def project(self, hidden_states: Tensor) -> Tensor:
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

    def project(self, hidden_states: Tensor) -> Tensor:
        """Apply the two layers."""
        projected: Tensor = self.layers(hidden_states)
        return projected
