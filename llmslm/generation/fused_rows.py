"""Products of several rows by the matrix units' kernels: which of them they serve, and by which tiles."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmslm.generation import kernels, row_kernels
from llmslm.generation.plan import Linear, Norm
from llmslm.generation.self_check import reason_against

MOST_ROWS = 16  # of a step or a block; more are for cuBLAS
PROMPT_ROWS = 128  # of a prompt's pass: cuBLAS's kernels would wait for each other, and need others between them
_CENTRED_PROMPT_ROWS = 32  # the same where layer norms double the work: at 64 cuBLAS's are the faster ones
FEW_ROWS = 2  # so few are theirs up to the input width below; wider ones are for the kernels of single rows
_NARROW = 1536
_WIDEST = 2048  # input width up to which a program holds the whole input
_LONG = (8, 128)  # of an input that is wider: slices, and inputs of each at a time
_LONG_OUTPUTS = 16  # of a program then: what one instruction of the matrix units gives
_MANY_OUTPUTS = 8192  # from here on a program gives more outputs: a wave of programs reads each row of inputs
_REGISTERS = 216  # of a thread for weights and inputs: with more of them it has to put some away (at 255 in all)
_trusted = True
_left_out = ContextVar("left_out", default=False)


@dataclass(frozen=True)
class RowTile:
    """How programs of `rows_linear_kernel` cover a matrix: warps, chunks of 32 inputs of each, tiles of 8 outputs."""

    slices: int
    chunks: int
    tiles: int


def row_tile(outputs: int, inputs: int, batch: int, *, gated: bool) -> RowTile:
    """Choose the tile for a matrix (outputs, inputs), twice that if gated: few warps, but as many as hold it.

    Two warps, four above 1024 inputs, were faster on an H200 than more for each product of a Llama of 24 x 576.
    """
    slices = 2 if inputs <= 1024 else 4
    while True:
        chunks = triton.cdiv(inputs, 32 * slices)
        for tiles in (4, 2) if outputs >= _MANY_OUTPUTS else (2,):
            if 4 * chunks * (tiles * (1 + gated) + _x_tiles(batch)) <= _REGISTERS:
                return RowTile(slices, chunks, tiles)
        slices *= 2


def _x_tiles(batch: int) -> int:
    """Tiles of 8 rows that a program takes; more rows are other programs'."""
    return triton.cdiv(min(batch, MOST_ROWS), 8)


def suits(x: Tensor, linear: Linear, norm: Norm | None, most: int = MOST_ROWS) -> bool:
    """Say whether a product of up to `most` rows is theirs.

    In float32 the units would round; a wide input of few rows may have no norm and no activation.

    Of one and of two rows they were faster on an H200 for each measured product of 576 to 1536 inputs, none of which
    had a centred norm. At 2048 it depends on the outputs, and of 3072 and more the kernels of single rows were. For a
    centred norm with a bias the units have twice as much to do behind the wait, and as much before it: by the steps of
    GPT-2 a product of one row takes half a microsecond more than by the kernel of single rows.
    """
    halves = x.dtype == linear.weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    bare = norm is None and linear.activation is None and not linear.gated
    rows, inputs = x.shape
    fits = inputs <= _NARROW if rows <= FEW_ROWS else inputs <= _WIDEST or (bare and rows <= MOST_ROWS)
    centred = rows == 1 and norm is not None and norm.centred
    return _are_used() and halves and rows <= most and fits and not centred


def suits_prompts(x: Tensor, *, centred: bool) -> bool:
    """Say whether the pass over prompts of these states (tokens, width) is made of such products, rather than others.

    Where a layer's wide side is too wide, that product alone is left to cuBLAS.

    Args:
        x: the states.
        centred: whether norms are layer norms.
    """
    (rows, width), most = x.shape, _CENTRED_PROMPT_ROWS if centred else PROMPT_ROWS
    return _are_used() and rows <= most and width <= _WIDEST and x.dtype in (torch.bfloat16, torch.float16)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel, but on tensors without data, whose bytes alone are counted."""
    if not arguments[0].is_meta:
        kernel[grid](*arguments, **options)


@contextmanager
def left_out() -> Iterator[None]:
    """Compute these products the slower way for a while, in this thread."""
    before = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(before)


def _are_used() -> bool:
    return _trusted and not _left_out.get()


def try_out(measure: Callable[[], float], tolerance: float) -> None:
    """Leave these products to the kernels of few rows and to cuBLAS from now on, if they fail or are wrong.

    Args:
        measure: runs them and returns by how much they are off.
        tolerance: how much of that is rounding.
    """
    global _trusted
    reason = reason_against(measure, tolerance)
    if reason is not None and _trusted:
        _trusted = False
        rows = f"up to {MOST_ROWS} rows, and of prompts of up to {PROMPT_ROWS},"
        warnings.warn(f"products of {rows} are computed the slower way: {reason}", UserWarning, stacklevel=2)


def rows_product(
    x: Tensor, linear: Linear, norm: Norm | None, residual: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """activation(linear(norm(x))) + residual, for x (rows, inputs) that suits.

    Args:
        x: contiguous.
        linear: see `Linear`.
        norm: of x, before.
        residual: (rows, outputs), added.
        options: of a launch.
    """
    batch, inputs = x.shape
    outputs = linear.weight.shape[0] // (2 if linear.gated else 1)
    weight, y = linear.weight, x.new_empty(batch, outputs)
    bias, added = weight if linear.bias is None else linear.bias, x if residual is None else residual
    common: dict[str, Any] = {"BIAS": linear.bias is not None, "RESIDUAL": residual is not None, **options}
    if inputs > _WIDEST:
        slices, width = _LONG
        launch(
            row_kernels.long_rows_linear_kernel,
            (triton.cdiv(outputs, _LONG_OUTPUTS),),
            x,
            weight,
            y,
            bias,
            added,
            outputs,
            inputs,
            batch,
            ROWS=8 * _x_tiles(batch),
            BLOCK_N=_LONG_OUTPUTS,
            SLICES=slices,
            WIDTH=width,
            num_warps=slices,
            **common,
        )
        return y
    tile = row_tile(outputs, inputs, batch, gated=linear.gated)
    x_tiles = _x_tiles(batch)
    launch(
        row_kernels.rows_linear_kernel,
        (triton.cdiv(outputs, 8 * tile.tiles), triton.cdiv(batch, 8 * x_tiles)),
        x,
        weight,
        y,
        weight if norm is None else norm.weight,
        weight if norm is None or norm.bias is None else norm.bias,
        bias,
        added,
        outputs,
        inputs,
        0.0 if norm is None else norm.eps,
        1.0 if norm is None else norm.scale,
        batch,
        X_TILES=x_tiles,
        W_TILES=tile.tiles,
        SLICES=tile.slices,
        CHUNKS=tile.chunks,
        PARTS=tl.bfloat16 if x.is_cuda else tl.float32,  # the interpreter has no products in bfloat16
        NORM=0 if norm is None else 1 + norm.centred,
        NORM_BIAS=norm is not None and norm.bias is not None,
        ACTIVATION=kernels.ACTIVATIONS[linear.activation],
        GATED=linear.gated,
        num_warps=tile.slices,
        **common,
    )
    return y
