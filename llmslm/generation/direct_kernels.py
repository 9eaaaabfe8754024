"""A Triton kernel of products of a few rows by the matrix units, whose operands come straight from memory.

House rules as in `kernels.py`. A unit's instruction wants two neighbouring inputs here and two there of a row in each
thread; a thread loads eight neighbouring ones. Since a sum may be taken in any order, both operands are given to the
units under the same renaming of the inputs, by which what a thread has loaded is what it must hold: no shared memory.
Norms are linear but for a factor a row: their gain is multiplied into the weights before the wait, their factor into
the sums.
"""

# Triton reads a kernel's annotations as types of its own; branches on constants cost nothing once compiled.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# ruff: noqa: ANN001, ANN201, ANN202, C901, RUF005

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llmslm.generation.kernels import _activated


@triton.jit
def _operand(ptr, rows, stride, K, chunk, SLICES: tl.constexpr, TILES: tl.constexpr):
    """Rows of a matrix, some inputs of them: (4, 8, slices, tiles, 8), 8 inputs a thread and a warp a slice.

    Rows are (tile, second axis), inputs (slice, first axis, last axis), all from the inputs of this chunk on.
    """
    r = tl.arange(0, TILES)[None, None, None, :, None] * 8 + tl.arange(0, 8)[None, :, None, None, None]
    s = chunk * SLICES + tl.arange(0, SLICES)[None, None, :, None, None]
    k = s * 32 + tl.arange(0, 4)[:, None, None, None, None] * 8 + tl.arange(0, 8)[None, None, None, None, :]
    return tl.load(ptr + r * stride + k, mask=(r < rows) & (k < K), other=0.0)


@triton.jit
def _left(w, SLICES: tl.constexpr, TILES: tl.constexpr):
    """The left operand of a product, (slices, rows, inputs); inputs are renamed as in `_right`."""
    parts = tl.permute(tl.reshape(w, [4, 8, SLICES, TILES, 4, 2]), (2, 3, 1, 4, 0, 5))
    return tl.reshape(parts, [SLICES, TILES * 8, 32])


@triton.jit
def _right(x, SLICES: tl.constexpr, TILES: tl.constexpr):
    """The right operand of a product, (slices, inputs, rows)."""
    parts = tl.permute(tl.reshape(x, [4, 8, SLICES, TILES, 4, 2]), (2, 4, 0, 5, 3, 1))
    return tl.reshape(parts, [SLICES, 32, TILES * 8])


@triton.jit
def _product(w, x, total, SLICES: tl.constexpr, W_TILES: tl.constexpr, X_TILES: tl.constexpr, SWAP: tl.constexpr):
    """(slices, outputs, rows) or, if swapped, (slices, rows, outputs): w x, added to the total."""
    if SWAP:
        total = tl.dot(_left(x, SLICES, X_TILES), _right(w, SLICES, W_TILES), total)
    else:
        total = tl.dot(_left(w, SLICES, W_TILES), _right(x, SLICES, X_TILES), total)
    return total


@triton.jit
def _loads_first():
    """Keep the assembler from moving loads behind this place, between instructions that wait for earlier ones."""
    tl.inline_asm_elementwise("fence.acq_rel.cta; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def direct_linear_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    norm_weight,
    norm_bias,
    bias_ptr,
    residual_ptr,
    N,
    K,
    eps,
    scale,
    batch,
    X_TILES: tl.constexpr,
    W_TILES: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNKS: tl.constexpr,
    SWAP: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What `linear_kernel` computes; a program gives 8 * W_TILES outputs, and K is at most 32 * SLICES * CHUNKS.

    One of the tiles' numbers is even: the left one's, the x's if swapped. PARTS is bfloat16: squares are summed as two.
    """
    if EARLY:
        gdc_launch_dependents()  # first of all: what is worked out before the wait holds on to its weights
    start = tl.program_id(0) * W_TILES * 8
    gate_ptr = w_ptr + start.to(tl.int64) * K
    plain_ptr = gate_ptr + tl.cast(N, tl.int64) * K
    ws, vs, gains, shifts = (), (), (), ()
    for c in tl.static_range(CHUNKS):
        ws = ws + (_operand(gate_ptr, N - start, K, K, c, SLICES, W_TILES),)
        if GATED:
            vs = vs + (_operand(plain_ptr, N - start, K, K, c, SLICES, W_TILES),)
        if NORM > 0:
            gains = gains + (_operand(norm_weight, 8, 0, K, c, SLICES, 1),)
        if NORM_BIAS:
            shifts = shifts + (_operand(norm_bias, 8, 0, K, c, SLICES, 1),)
    if SWAP:
        row, out = tl.arange(0, X_TILES * 8)[:, None], tl.arange(0, W_TILES * 8)[None, :]
    else:
        row, out = tl.arange(0, X_TILES * 8)[None, :], tl.arange(0, W_TILES * 8)[:, None]
    n = start + out
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            plain_bias = tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
    zero = tl.zeros([SLICES, X_TILES * 8, W_TILES * 8] if SWAP else [SLICES, W_TILES * 8, X_TILES * 8], tl.float32)
    one_x = tl.full([4, 8, SLICES, X_TILES, 8], 1.0, w_ptr.dtype.element_ty)
    one_w = tl.full([4, 8, SLICES, W_TILES, 8], 1.0, w_ptr.dtype.element_ty)
    if NORM > 0:
        shift, v_shift, slope, v_slope = zero, zero, zero, zero
        gained, v_gained = (), ()
        for c in tl.static_range(CHUNKS):
            if NORM_BIAS:  # what the norm's bias comes to
                moved = tl.broadcast_to(shifts[c], [4, 8, SLICES, X_TILES, 8])
                shift = _product(ws[c], moved, shift, SLICES, W_TILES, X_TILES, SWAP)
                if GATED:
                    v_shift = _product(vs[c], moved, v_shift, SLICES, W_TILES, X_TILES, SWAP)
            gained = gained + (ws[c] * gains[c],)
            if GATED:
                v_gained = v_gained + (vs[c] * gains[c],)
            if NORM == 2:  # what a mean of one comes to
                slope = _product(gained[c], one_x, slope, SLICES, W_TILES, X_TILES, SWAP)
                if GATED:
                    v_slope = _product(v_gained[c], one_x, v_slope, SLICES, W_TILES, X_TILES, SWAP)
        ws, vs = gained, v_gained
        if NORM_BIAS or NORM == 2:
            shift, slope = tl.reduce((shift, slope), 0, _add_two)
            if GATED:
                v_shift, v_slope = tl.reduce((v_shift, v_slope), 0, _add_two)
    if EARLY:
        gdc_wait()
    inside = (row < batch) & (n < N)
    xs = ()
    for c in tl.static_range(CHUNKS):
        xs = xs + (_operand(x_ptr, batch, K, K, c, SLICES, X_TILES),)
    if RESIDUAL:
        residual = tl.load(residual_ptr + row * N + n, mask=inside, other=0.0).to(tl.float32)
    if EARLY:
        _loads_first()
    # Two sums in turn: an instruction need not wait for the one before it.
    y, odd_y, v, odd_v, mean, squares = zero, zero, zero, zero, zero, zero
    square = tl.zeros([4, 8, SLICES, X_TILES, 8], tl.float32)
    for c in tl.static_range(CHUNKS):
        if c % 2 == 0:
            y = _product(ws[c], xs[c], y, SLICES, W_TILES, X_TILES, SWAP)
            if GATED:
                v = _product(vs[c], xs[c], v, SLICES, W_TILES, X_TILES, SWAP)
        else:
            odd_y = _product(ws[c], xs[c], odd_y, SLICES, W_TILES, X_TILES, SWAP)
            if GATED:
                odd_v = _product(vs[c], xs[c], odd_v, SLICES, W_TILES, X_TILES, SWAP)
        if NORM > 0:
            square += xs[c].to(tl.float32) * xs[c].to(tl.float32)
        if NORM == 2:
            mean = _product(one_w, xs[c], mean, SLICES, W_TILES, X_TILES, SWAP)
    y, v = y + odd_y, v + odd_v
    if NORM > 0:
        one = tl.full([4, 8, SLICES, W_TILES, 8], 1.0, PARTS)
        high = square.to(PARTS)
        low = (square - high.to(tl.float32)).to(PARTS)
        squares = _product(one, high, squares, SLICES, W_TILES, X_TILES, SWAP)
        squares = _product(one, low, squares, SLICES, W_TILES, X_TILES, SWAP)
        if NORM == 2:
            if GATED:
                y, v, squares, mean = tl.reduce((y, v, squares, mean), 0, _add_four)
            else:
                y, squares, mean = tl.reduce((y, squares, mean), 0, _add_three)
            mean = mean / K
            y -= mean * slope
            if GATED:
                v -= mean * v_slope
            variance = tl.maximum(squares / K - mean * mean, 0.0)
        else:
            if GATED:
                y, v, squares = tl.reduce((y, v, squares), 0, _add_three)
            else:
                y, squares = tl.reduce((y, squares), 0, _add_two)
            variance = squares / K
        rstd = tl.rsqrt(variance + eps)
        y *= rstd
        if NORM_BIAS:
            y += shift
        y *= scale
        if GATED:
            v *= rstd
            if NORM_BIAS:
                v += v_shift
            v *= scale
    elif GATED:
        y, v = tl.reduce((y, v), 0, _add_two)
    else:
        y = tl.sum(y, axis=0)
    if BIAS:
        y += bias
        if GATED:
            v += plain_bias
    y = _activated(y, ACTIVATION)
    if GATED:
        y = y * v
    if RESIDUAL:
        y += residual
    tl.store(y_ptr + row * N + n, y, mask=inside)
