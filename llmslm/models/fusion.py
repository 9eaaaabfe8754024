"""Fusions: the rule by which projected states enter the slm at its prompt positions."""

import torch
from torch import Tensor

from llmslm.models.alignment import AlignedPrompt
from llmslm.models.components import Component


class Fusion(Component):
    """Turns an aligned prompt into inputs_embeds (batch, input_len, slm_hidden_size)."""

    def forward(self, aligned: AlignedPrompt) -> Tensor:
        """Return what the slm reads; positions outside the prompt pass unchanged."""
        raise NotImplementedError


class Add(Fusion):
    """The slm's own prompt embedding plus the projected state: the paper's better rule."""

    def forward(self, aligned: AlignedPrompt) -> Tensor:
        """Add on prompt positions (the placed states are zero elsewhere)."""
        return aligned.inputs_embeds + aligned.prompt_embeds.to(aligned.inputs_embeds.dtype)


class Replace(Fusion):
    """The projected state in place of the slm's own prompt embedding."""

    def forward(self, aligned: AlignedPrompt) -> Tensor:
        """Replace on prompt positions."""
        states = aligned.prompt_embeds.to(aligned.inputs_embeds.dtype)
        return torch.where(aligned.on_prompt, states, aligned.inputs_embeds)
