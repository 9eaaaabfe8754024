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
    """Compile each block in place, the norms beside them and the projector; return the number of blocks.

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
    projectors = [module for module in model.modules() if isinstance(module, Projector)]
    for module in (*found, *_norms(model, found), *projectors):
        module.compile(dynamic=False if fixed_shapes else None)
    return len(found)


def _norms(model: nn.Module, found: list[nn.Module]) -> list[nn.Module]:
    """Return what stands beside a stack of blocks and has vectors alone as weights."""
    inner = set(found)
    stacks = [m for m in model.modules() if any(not inner.isdisjoint(child.children()) for child in m.children())]
    beside = [child for stack in stacks for child in stack.children()]
    return [m for m in beside if all(p.dim() == 1 for p in m.parameters()) and any(True for _ in m.parameters())]
