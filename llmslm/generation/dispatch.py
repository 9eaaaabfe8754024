"""Which decode step serves a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmslm.generation.block import BlockStep
from llmslm.generation.native import NativeStep, can_run
from llmslm.generation.plan import Decoder
from llmslm.generation.state import DecodeState
from llmslm.generation.step import TorchStep

if TYPE_CHECKING:
    from llmslm.generation.fused_block import FusedBlockStep


def step_for(decoder: Decoder, state: DecodeState) -> TorchStep:
    """The fused step on CUDA, where it alone needs no host; the native one on the CPU if it can; else plain torch."""
    if state.device.type == "cpu" and can_run(decoder, state.batch):
        return NativeStep(decoder, state)
    if state.device.type != "cuda":
        return TorchStep(decoder, state)
    from llmslm.generation.fused import FusedStep  # Triton exists beside CUDA builds of torch alone

    return FusedStep(decoder, state)


def block_step_for(decoder: Decoder, state: DecodeState) -> BlockStep | FusedBlockStep:
    """The same for blocks of tokens."""
    if state.device.type != "cuda":
        return BlockStep(decoder, state)
    from llmslm.generation.fused_block import FusedBlockStep

    return FusedBlockStep(decoder, state)
