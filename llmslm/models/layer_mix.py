"""A learned mix of the states of several encoder layers."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn


class LayerMix(nn.Module):
    """A weighted mean of layers and a scale: ELMo's scalar mix (arXiv 1802.05365, section 3.2).

    Each layer's states are normalised (RMS) before, since those of inner layers differ in size by orders of magnitude.
    It is trained with the projector and saved with it; all weights start equal.

    Args:
        names: of the layers, for the log.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.logits = nn.Parameter(torch.zeros(len(names)))
        self.scale = nn.Parameter(torch.ones(()))

    @classmethod
    def of_layer(cls, layer: Any) -> Self | None:
        """Return the mix that an encoder's `layer` asks for: none unless it is a list."""
        return cls([str(item) for item in layer]) if isinstance(layer, list | tuple) else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mix states (batch, prompt_len, layers * width), side by side, to (batch, prompt_len, width)."""
        states = hidden_states.unflatten(-1, (len(self.names), -1))
        states = nn.functional.rms_norm(states, states.shape[-1:], eps=1e-6)
        weights = self.logits.softmax(0).to(states.dtype).unsqueeze(-1)
        return self.scale.to(states.dtype) * (states * weights).sum(-2)

    def metrics(self) -> dict[str, Tensor]:
        """Return the weight of each layer, which sum to 1, and the scale."""
        weights = self.logits.detach().softmax(0)
        named = {f"layer_mix/{name}": weight for name, weight in zip(self.names, weights, strict=True)}
        return named | {"layer_mix/scale": self.scale.detach()}
