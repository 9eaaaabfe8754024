"""A `TransformerProjector` on CUDA: its layers by the kernels of whole prompts, over its own weights."""

from typing import cast

import torch
from torch import Tensor, nn

from llmslm.generation.fused_prefill import FusedStack, Prompts, columns, linear
from llmslm.generation.plan import Linear, Norm, SelfAttention, Stack, Sublayer
from llmslm.models.attention import RmsNorm
from llmslm.models.projector import ReadingLayer, TransformerProjector, rotary_angles


class FusedProjector:
    """What a `TransformerProjector` gives of right-padded prompts, one a row.

    Args:
        projector: on its device; its weights are not copied, and read early: who changes them waits for the device.
        max_positions: positions of the longest prompts.
    """

    def __init__(self, projector: TransformerProjector, max_positions: int) -> None:
        self.norm_in, self.linear = _norm(projector.norm_in), _linear(projector.linear)
        layers = [cast(ReadingLayer, layer) for layer in projector.reading]
        self.heads, self.head_size = layers[0].heads, projector.head_size
        row = torch.zeros(1, max_positions, dtype=torch.long, device=self.linear.weight.device)
        cos, sin = (angles.view(max_positions, -1) for angles in rotary_angles(row, self.head_size))
        sublayers = [sublayer for layer in layers for sublayer in _sublayers(layer, self.head_size)]
        stack = Stack(sublayers=sublayers, final_norm=_norm(projector.norm_out), cos=cos, sin=sin)
        self.run = FusedStack(stack, causal=False)

    def __call__(self, hidden_states: Tensor, mask: Tensor, _documents: Tensor | None = None) -> Tensor:
        """Take what the projector does: hidden_states (batch, prompt_len, width) and their mask, 1 = a real state."""
        batch, length = mask.shape
        x = linear(hidden_states.flatten(0, 1).contiguous(), self.linear, self.norm_in)
        cache = x.new_empty(1, 2, batch, self.heads, length, self.head_size)  # of one layer after the other
        return self.run.states(x, Prompts(mask, columns(batch, length, x.device)), cache).view(batch, length, -1)


def _sublayers(layer: ReadingLayer, head_size: int) -> tuple[Sublayer, Sublayer]:
    attention = SelfAttention(0, layer.heads, layer.heads, head_size, head_size**-0.5, rotary=True)
    gate_up = _linear(layer.gate_up, activation="silu", gated=True)
    return (
        Sublayer(_linear(layer.query_key_value), _linear(layer.out), attention, _norm(layer.norm_attention)),
        Sublayer(gate_up, _linear(layer.down), before=_norm(layer.norm_feed_forward)),
    )


def _linear(module: nn.Linear, activation: str | None = None, *, gated: bool = False) -> Linear:
    return Linear(module.weight.detach(), activation=activation, gated=gated)


def _norm(module: nn.Module) -> Norm | None:
    """Of what may be no norm."""
    return Norm(module.weight.detach(), None, cast(float, module.eps), False) if isinstance(module, RmsNorm) else None
