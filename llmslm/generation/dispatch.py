"""Which decode step, and which pass over prompts, serves a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from llmslm.generation.block import BlockStep
from llmslm.generation.families import UnreadableModelError, read_stack
from llmslm.generation.memory import available_bytes, weight_bytes
from llmslm.generation.native import NativeStep, can_run
from llmslm.generation.plan import Decoder
from llmslm.generation.prefill import CausalPrefill
from llmslm.generation.state import DecodeState
from llmslm.generation.step import TorchStep
from llmslm.models.encoder import Encoder
from llmslm.models.projector import Projector, TransformerProjector

if TYPE_CHECKING:
    from llmslm.generation.fused_block import FusedBlockStep
    from llmslm.generation.fused_prefill import FusedEncoder, FusedReader
    from llmslm.generation.fused_projector import FusedProjector

_SPARE = 0.25  # of the free memory, that copies of a frozen encoder's weights may take


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


def prefill_for(model: PreTrainedModel, decoder: Decoder, state: DecodeState) -> CausalPrefill:
    """The fused pass over prompts on CUDA, unless it is not trusted; else the model's own forward."""
    if state.device.type != "cuda" or not decoder.reads_prompts:
        return CausalPrefill(model, decoder, state)
    from llmslm.generation.fused_prefill import FusedPrefill

    return FusedPrefill(model, decoder, state)


def reader_for(decoder: Decoder | None, depth: int | None) -> FusedReader | None:
    """The same for the prompts of verified decoding; None leaves them to the model's own forward.

    Args:
        decoder: of the model; None where it cannot be read.
        depth: see `FusedReader`.
    """
    if decoder is None or decoder.crosses or not decoder.reads_prompts or decoder.embedding.device.type != "cuda":
        return None
    from llmslm.generation.fused_prefill import FusedReader

    return FusedReader(decoder, depth)


def encoder_pass_for(encoder: Encoder, max_positions: int) -> FusedEncoder | None:
    """The same for a frozen encoder, where one layer is read of a model that can be; None leaves it to its forward.

    So does one whose weights, much of which would be copied, are large beside the memory that is free.

    Args:
        encoder: on its device.
        max_positions: positions of the longest prompts.
    """
    if encoder.model.device.type != "cuda" or encoder.quantization is not None or len(encoder.depths) > 1:
        return None
    if weight_bytes(encoder) > _SPARE * (available_bytes(encoder.model.device) or 0):
        return None
    try:
        decoder = read_stack(encoder.model, max_positions)
    except UnreadableModelError:
        return None
    from llmslm.generation.fused_prefill import FusedEncoder

    return FusedEncoder(encoder, decoder)


def projector_pass_for(projector: Projector, max_positions: int) -> FusedProjector | None:
    """The same for a projector that has layers, and no hooks; arguments as for an encoder."""
    if type(projector) is not TransformerProjector or projector.linear.weight.device.type != "cuda":
        return None
    if projector._forward_hooks or projector._forward_pre_hooks:
        return None
    from llmslm.generation.fused_projector import FusedProjector

    return FusedProjector(projector, max_positions)
