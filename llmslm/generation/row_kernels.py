"""Triton kernels of products of several rows with a matrix, by the matrix units: blocks of tokens, small batches.

House rules as in `kernels.py`. The units multiply tiles, of which a program has few: they share out the inputs (the
slices), and their sums are added at the end, since outputs alone would leave most warps without work.
"""

# Triton reads a kernel's annotations as types of its own; branches on constants cost nothing once compiled.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202, C901

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llmslm.generation.kernels import _activated


@triton.jit
def _inputs(x_ptr, column, rows, batch, K, gain, shift, eps, scale, NORM: tl.constexpr, BIAS: tl.constexpr):
    """Rows of x (batch, K), normed, as (slices, inputs, rows), in the precision in which they came."""
    inside = (column < K)[:, :, None] & (rows < batch)[None, None, :]
    came = tl.load(x_ptr + rows[None, None, :] * K + column[:, :, None], mask=inside, other=0.0)
    x = came.to(tl.float32)
    if NORM == 2:
        mean = tl.sum(tl.sum(x, axis=1), axis=0) / K
        x = tl.where(inside, x - mean[None, None, :], 0.0)
    if NORM > 0:
        rstd = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / K + eps)
        x = x * rstd[None, None, :] * gain[:, :, None]
        if BIAS:
            x += shift[:, :, None]
        x = x * scale
    return x.to(came.dtype)


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
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What `linear_kernel` computes; K is at most SLICES * WIDTH."""
    if EARLY:
        gdc_launch_dependents()  # first of all: what is made ready before the wait holds on to what is loaded
    rows = tl.arange(0, ROWS)
    column = tl.arange(0, SLICES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    stride = tl.num_programs(0) * BLOCK_N
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    plain_ptr = w_ptr + tl.cast(N, tl.int64) * K
    at = n.to(tl.int64)[None, :, None] * K + column[:, None, :]
    inside = (n < N)[None, :, None] & (column < K)[:, None, :]
    w = tl.load(w_ptr + at, mask=inside, other=0.0)
    v = w
    if GATED:
        v = tl.load(plain_ptr + at, mask=inside, other=0.0)
    gain = tl.zeros([SLICES, WIDTH], tl.float32)
    shift = tl.zeros([SLICES, WIDTH], tl.float32)
    if NORM > 0:
        gain = tl.load(norm_weight + column, mask=column < K, other=0.0).to(tl.float32)
    if NORM_BIAS:
        shift = tl.load(norm_bias + column, mask=column < K, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
    x = _inputs(x_ptr, column, rows, batch, K, gain, shift, eps, scale, NORM, NORM_BIAS)
    for start in range(tl.program_id(0) * BLOCK_N, N, stride):
        n = start + tl.arange(0, BLOCK_N)
        n_in = n < N
        y_at = rows[None, :] * N + n[:, None]
        y_in = (rows < batch)[None, :] & n_in[:, None]
        if RESIDUAL:
            residual = tl.load(residual_ptr + y_at, mask=y_in, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)
        next_n = n + stride
        at = next_n.to(tl.int64)[None, :, None] * K + column[:, None, :]
        inside = (next_n < N)[None, :, None] & (column < K)[:, None, :]
        w_next = tl.load(w_ptr + at, mask=inside, other=0.0)
        v_next = w_next
        if GATED:
            v_next = tl.load(plain_ptr + at, mask=inside, other=0.0)
        y = tl.sum(tl.dot(w, x), axis=0)
        if BIAS:
            y += bias[:, None]
        y = _activated(y, ACTIVATION)
        if GATED:
            plain = tl.sum(tl.dot(v, x), axis=0)
            if BIAS:
                plain += tl.load(bias_ptr + N + n, mask=n_in, other=0.0).to(tl.float32)[:, None]
            y = y * plain
        if RESIDUAL:
            y += residual
        tl.store(y_ptr + y_at, y, mask=y_in)
        w, v = w_next, v_next


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
