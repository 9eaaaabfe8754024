"""The blocks of a system's models: the unit of compilation, sharding and activation checkpointing."""

import torch
from torch import nn
from transformers import PreTrainedModel

from llmslm.models.projector import Projector


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of a model and of all models in it, outermost first.

    transformers' models name the classes that must not be split (`_no_split_modules`): these are their blocks.
    """
    names: set[str] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            names |= set(module._no_split_modules or ())
    # Sharding gives a block a class of its own, under the one that it had.
    return [module for module in model.modules() if names & {cls.__name__ for cls in type(module).__mro__}]


def compile_blocks(model: nn.Module, *, fixed_shapes: bool = False) -> int:
    """Compile each block in place, and the projector, and return the number of blocks.

    Blocks of one class share one compilation, so this takes as long for 8 layers as for 80. Shapes that vary from step
    to step are compiled a second time as dynamic.

    Args:
        model: whose blocks are compiled.
        fixed_shapes: whether blocks see a few shapes alone, as with packed rows; an encoder-decoder's two sides, which
            share a class, are then not taken for one whose shapes vary.
    """
    found = blocks(model)
    if fixed_shapes:  # a few of them: further ones are no reason to give up
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    for module in (*found, *(module for module in model.modules() if isinstance(module, Projector))):
        module.compile(dynamic=False if fixed_shapes else None)
    return len(found)
