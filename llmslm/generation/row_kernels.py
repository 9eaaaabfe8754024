"""Triton kernels of products of several rows with a matrix, by the matrix units: blocks, small batches, prompts.

House rules as in `kernels.py`. The units multiply tiles, of which a program has few: its warps share out the inputs
(the slices), and their sums are added at the end.

In `rows_linear_kernel` the units take what threads load from memory as it is, without a detour by shared memory. An
instruction wants two neighbouring inputs here and two there of a row in each thread; a thread loads eight neighbouring
ones. Since a sum may be taken in any order, both operands are given under the same renaming of the inputs, by which
what a thread has loaded is what it must hold. Norms are linear but for a factor a row: their gain is multiplied into
the weights before the wait, their factor into the sums. `long_rows_linear_kernel` is for inputs too wide to be held.
"""

# Triton reads a kernel's annotations as types of its own; branches on constants cost nothing once compiled.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# ruff: noqa: ANN001, ANN201, ANN202, C901, RUF005

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llmslm.generation.kernels import _activated


@triton.jit
def _operand(ptr, rows, stride, K, CHUNKS: tl.constexpr, SLICES: tl.constexpr, TILES: tl.constexpr):
    """Rows of a matrix in chunks of their inputs, (4, 8, slices, tiles, 8) each: 8 inputs a thread, a slice a warp.

    Rows are (tile, second axis); inputs (chunk, slice, first axis, last axis). Compilers give the threads of a warp to
    the axes by what they take to be contiguous, and of equal ones each release has its own order: so all are told.
    """
    r = tl.arange(0, TILES)[None, None, None, :, None] * 8 + tl.arange(0, 8)[None, :, None, None, None]
    lane, eighth = tl.arange(0, 4)[:, None, None, None, None] * 8, tl.arange(0, 8)[None, None, None, None, :]
    chunks = ()
    for c in tl.static_range(CHUNKS):
        k = (c * SLICES + tl.arange(0, SLICES)[None, None, :, None, None]) * 32 + lane + eighth
        at = tl.max_contiguous(ptr + r * stride + k, [8, 4, 2, 1, 16])
        chunks = chunks + (tl.load(at, mask=(r < rows) & (k < K), other=0.0),)
    return chunks


@triton.jit
def _product(w, x, total):
    """Add the product of a chunk of each to the total, (slices, outputs, rows)."""
    SLICES: tl.constexpr = w.shape[2]
    OUTPUTS: tl.constexpr = w.shape[3] * 8
    ROWS: tl.constexpr = x.shape[3] * 8
    left = tl.permute(tl.reshape(w, [4, 8, SLICES, w.shape[3], 4, 2]), (2, 3, 1, 4, 0, 5))
    right = tl.permute(tl.reshape(x, [4, 8, SLICES, x.shape[3], 4, 2]), (2, 4, 0, 5, 3, 1))
    return tl.dot(tl.reshape(left, [SLICES, OUTPUTS, 32]), tl.reshape(right, [SLICES, 32, ROWS]), total)


@triton.jit
def _products(ws, xs, zero):
    """The sum of the chunks' products; two in turn, since an instruction waits for the one whose sum it adds to."""
    total, odd = zero, zero
    for c in tl.static_range(len(ws)):
        if c % 2 == 0:
            total = _product(ws[c], xs[c], total)
        else:
            odd = _product(ws[c], xs[c], odd)
    return total + odd


@triton.jit
def _gained(ws, gains, shifts, ones, zero, NORM: tl.constexpr, NORM_BIAS: tl.constexpr):
    """Weights with a norm's gain in them; what its bias comes to and what a mean of one does, (outputs, rows) each."""
    shift, slope = zero, zero
    gained = ()
    for c in tl.static_range(len(ws)):
        gained = gained + (ws[c] * gains[c],)
        if NORM_BIAS:
            shift = _product(ws[c], tl.broadcast_to(shifts[c], ones.shape), shift)
        if NORM == 2:
            slope = _product(gained[c], ones, slope)
    shift, slope = _over_slices((shift, slope))
    return gained, shift, slope


@triton.jit
def _moments(xs, ones, zero, NORM: tl.constexpr, PARTS: tl.constexpr):
    """Sums over a slice's inputs, the same for all outputs: of squares, and for a centred norm of the inputs."""
    mean = zero
    squares = tl.zeros(xs[0].shape, tl.float32)
    for c in tl.static_range(len(xs)):
        squares += xs[c].to(tl.float32) * xs[c].to(tl.float32)
        if NORM == 2:
            mean = _product(ones, xs[c], mean)
    high = squares.to(PARTS)
    low = (squares - high.to(tl.float32)).to(PARTS)
    moments = (_product(ones.to(PARTS), low, _product(ones.to(PARTS), high, zero)),)
    if NORM == 2:
        moments = moments + (mean,)
    return moments


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
def _over_slices(sums):
    """Sums over the slices, of several at once: the warps wait for each other once."""
    if len(sums) == 4:
        sums = tl.reduce(sums, 0, _add_four)
    elif len(sums) == 3:
        sums = tl.reduce(sums, 0, _add_three)
    elif len(sums) == 2:
        sums = tl.reduce(sums, 0, _add_two)
    else:
        sums = (tl.sum(sums[0], axis=0),)
    return sums


@triton.jit
def _normed_sum(y, moments, slope, shift, K, eps, scale, NORM: tl.constexpr, NORM_BIAS: tl.constexpr):
    """The sum over normed inputs, from that over the inputs times the norm's gain; for the others see `_gained`."""
    variance = moments[0] / K
    if NORM == 2:
        mean = moments[1] / K
        variance = tl.maximum(variance - mean * mean, 0.0)
        y -= mean * slope
    y *= tl.rsqrt(variance + eps)
    if NORM_BIAS:
        y += shift
    return y * scale


@triton.jit
def _loads_first():
    """Keep the assembler from moving loads behind this place, between instructions that wait for earlier ones."""
    tl.inline_asm_elementwise("fence.acq_rel.cta; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def rows_linear_kernel(
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
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What `linear_kernel` computes; a program gives 8 * W_TILES outputs of 8 * X_TILES rows.

    K is at most 32 * SLICES * CHUNKS, W_TILES is even. PARTS is bfloat16: squares are summed as two.
    """
    if EARLY:
        gdc_launch_dependents()  # first of all: what is worked out before the wait holds on to its weights
    start, first = tl.program_id(0) * W_TILES * 8, tl.program_id(1) * X_TILES * 8
    n, row = start + tl.arange(0, W_TILES * 8)[:, None], first + tl.arange(0, X_TILES * 8)[None, :]
    zero = tl.zeros([SLICES, W_TILES * 8, X_TILES * 8], tl.float32)
    gate_ptr = w_ptr + start.to(tl.int64) * K
    ws = _operand(gate_ptr, N - start, K, K, CHUNKS, SLICES, W_TILES)
    if GATED:
        vs = _operand(gate_ptr + tl.cast(N, tl.int64) * K, N - start, K, K, CHUNKS, SLICES, W_TILES)
    if NORM > 0:
        none = tl.program_id(2) * 16  # 0 between rows, unknown to the compiler: a constant it would lay out otherwise
        gains, shifts = _operand(norm_weight, 8, none, K, CHUNKS, SLICES, 1), ()
        if NORM_BIAS:
            shifts = _operand(norm_bias, 8, none, K, CHUNKS, SLICES, 1)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            plain_bias = tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
    if NORM > 0:
        ones = tl.full([4, 8, SLICES, X_TILES, 8], 1.0, w_ptr.dtype.element_ty)
        ws, shift, slope = _gained(ws, gains, shifts, ones, zero, NORM, NORM_BIAS)
        if GATED:
            vs, plain_shift, plain_slope = _gained(vs, gains, shifts, ones, zero, NORM, NORM_BIAS)
    if EARLY:
        gdc_wait()
    xs = _operand(x_ptr + first * K, batch - first, K, K, CHUNKS, SLICES, X_TILES)
    inside = (row < batch) & (n < N)
    if RESIDUAL:
        residual = tl.load(residual_ptr + row * N + n, mask=inside, other=0.0).to(tl.float32)
    if EARLY:
        _loads_first()
    sums = (_products(ws, xs, zero),)
    if GATED:
        sums = sums + (_products(vs, xs, zero),)
    if NORM > 0:
        ones = tl.full([4, 8, SLICES, W_TILES, 8], 1.0, w_ptr.dtype.element_ty)
        sums = sums + _moments(xs, ones, zero, NORM, PARTS)
    sums = _over_slices(sums)
    y, v = sums[0], sums[GATED]
    if NORM > 0:
        y = _normed_sum(y, sums[1 + GATED :], slope, shift, K, eps, scale, NORM, NORM_BIAS)
        if GATED:
            v = _normed_sum(v, sums[1 + GATED :], plain_slope, plain_shift, K, eps, scale, NORM, NORM_BIAS)
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


@triton.jit
def long_rows_linear_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    bias_ptr,
    residual_ptr,
    N,
    K,
    batch,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What `long_linear_kernel` computes: K is read in several passes of SLICES * WIDTH."""
    rows = tl.arange(0, ROWS)
    column = tl.arange(0, SLICES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in = n < N
    w_at = w_ptr + n.to(tl.int64)[None, :, None] * K + column[:, None, :]
    w = tl.load(w_at, mask=n_in[None, :, None] & (column < K)[:, None, :], other=0.0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    y_at = rows[None, :] * N + n[:, None]
    y_in = (rows < batch)[None, :] & n_in[:, None]
    y = tl.zeros([BLOCK_N, ROWS], tl.float32)
    if RESIDUAL:
        y += tl.load(residual_ptr + y_at, mask=y_in, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros([SLICES, BLOCK_N, ROWS], tl.float32)
    for start in range(0, K, SLICES * WIDTH):
        here, following = column + start, column + start + SLICES * WIDTH
        x_in = (here < K)[:, :, None] & (rows < batch)[None, None, :]
        x = tl.load(x_ptr + rows[None, None, :] * K + here[:, :, None], mask=x_in, other=0.0)
        w_in = n_in[None, :, None] & (following < K)[:, None, :]
        w_next = tl.load(w_at + start + SLICES * WIDTH, mask=w_in, other=0.0)
        total = tl.dot(w, x, total)
        w = w_next
    tl.store(y_ptr + y_at, y + tl.sum(total, axis=0), mask=y_in)
