"""Products of several rows by the matrix units' kernels: which of them they serve, and by which tiles."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmslm.generation import direct_kernels, kernels, row_kernels
from llmslm.generation.plan import Linear, Norm

FEWEST_ROWS, MOST_ROWS = 3, 16  # fewer rows are bound by their weights' bytes, more are a matter for cuBLAS
_WIDEST = 2048  # input width up to which a program holds the whole input
_PASS = 1024  # of an input that is wider
_BLOCK_N = 16  # outputs of a program at a time: what one instruction of the matrix units gives
_PROGRAMS = 132 * 2  # that a GPU has room for; more tiles take turns
_MANY_OUTPUTS = 8192  # from here on a program gives more outputs: a wave of programs reads each row of inputs
_trusted = True


@dataclass(frozen=True)
class DirectTile:
    """How programs of `direct_linear_kernel` cover a matrix: warps, passes of 32 inputs each, tiles of 8 outputs.

    `swapped` makes the outputs, and not the rows, the side of which an instruction takes 8 at least.
    """

    slices: int
    chunks: int
    tiles: int
    swapped: bool


@dataclass(frozen=True)
class Direct:
    """A way to choose direct tiles: warps for inputs up to 1024 and above, and which side is which."""

    narrow: int
    wide: int
    swapped: bool = False

    def tile(self, outputs: int, inputs: int) -> DirectTile:
        """Choose the tile for a matrix (outputs, inputs)."""
        slices = self.narrow if inputs <= 1024 else self.wide
        tiles = (1 if self.swapped else 2) * (2 if outputs >= _MANY_OUTPUTS else 1)
        return DirectTile(slices, triton.cdiv(inputs, 32 * slices), tiles, self.swapped)


VARIANTS: dict[str, Direct | None] = {
    "tiles": None,  # those of `row_kernels.py`
    "direct-2": Direct(2, 4),
    "direct-4": Direct(4, 8),
    "direct-8": Direct(8, 8),
    "swapped-4": Direct(4, 8, swapped=True),
}
VARIANT = "tiles"  # to be the fastest of them by `evaluation/benchmarks/row_products.py`; then the others can go


@dataclass(frozen=True)
class RowTile:
    """How programs cover a matrix: inputs at a time in slices, one a warp; and the number of programs."""

    slices: int
    width: int
    programs: int


def row_tile(outputs: int, inputs: int) -> RowTile:
    """Choose the tile for a matrix (outputs, inputs); read off what the compiler makes of it, not measured yet."""
    wide = max(triton.next_power_of_2(inputs), 64)
    passes = wide > _WIDEST
    wide = _PASS if passes else wide
    slices = 8 if wide >= 1024 else 4
    tiles = triton.cdiv(outputs, _BLOCK_N)
    return RowTile(slices, wide // slices, tiles if passes else min(tiles, _PROGRAMS))


def suits(x: Tensor, linear: Linear, norm: Norm | None) -> bool:
    """Say whether a product is theirs. In float32 the units would round; a wide input may have nothing but a bias."""
    halves = x.dtype == linear.weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    bare = norm is None and linear.activation is None and not linear.gated
    return _trusted and halves and FEWEST_ROWS <= x.shape[0] <= MOST_ROWS and (x.shape[1] <= _WIDEST or bare)


def try_out(measure: Callable[[], float], tolerance: float) -> None:
    """Leave these products to the kernels of few rows and to cuBLAS from now on, if they fail or are wrong.

    Args:
        measure: runs them and returns by how much they are off.
        tolerance: how much of that is rounding.
    """
    global _trusted
    try:
        off = measure()
        reason = None if off <= tolerance else f"logits are off by {off:.3g} of their spread"
    except Exception as error:  # whatever a compiler or a driver has against them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if reason is not None and _trusted:
        _trusted = False
        warnings.warn(f"products of 3 to 16 rows are computed the slower way: {reason}", UserWarning, stacklevel=2)


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
    variant, weight = VARIANTS[VARIANT], linear.weight
    bias, added = weight if linear.bias is None else linear.bias, x if residual is None else residual
    y = x.new_empty(batch, outputs)
    common: dict[str, Any] = {"BIAS": linear.bias is not None, "RESIDUAL": residual is not None, **options}
    tile = row_tile(outputs, inputs)
    by_tiles: dict[str, Any] = {
        "ROWS": 8 if batch <= 8 else 16,
        "BLOCK_N": _BLOCK_N,
        "SLICES": tile.slices,
        "WIDTH": tile.width,
        "num_warps": tile.slices,
    }
    if tile.slices * tile.width < inputs:
        row_kernels.long_rows_linear_kernel[(tile.programs,)](
            x, weight, y, bias, added, outputs, inputs, batch, **by_tiles, **common
        )
        return y
    arguments = (
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
    )
    common |= {
        "NORM": 0 if norm is None else 1 + norm.centred,
        "NORM_BIAS": norm is not None and norm.bias is not None,
        "ACTIVATION": kernels.ACTIVATIONS[linear.activation],
        "GATED": linear.gated,
    }
    if variant is None:
        row_kernels.rows_linear_kernel[(tile.programs,)](*arguments, **by_tiles, **common)
        return y
    direct = variant.tile(outputs, inputs)
    direct_kernels.direct_linear_kernel[(triton.cdiv(outputs, 8 * direct.tiles),)](
        *arguments,
        X_TILES=2 if direct.swapped or batch > 8 else 1,
        W_TILES=direct.tiles,
        SLICES=direct.slices,
        CHUNKS=direct.chunks,
        SWAP=direct.swapped,
        PARTS=tl.bfloat16 if x.is_cuda else tl.float32,  # the interpreter has no products in bfloat16
        num_warps=direct.slices,
        **common,
    )
    return y
