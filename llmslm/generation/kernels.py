"""Triton kernels of a decode step on CUDA: products of a few rows with a matrix, attention of one token, the argmax.

At a few rows a step is bound by the bytes of the weights and by the gaps between kernels. So norms, biases,
activations, residuals, rotation and cache writes are part of the kernel beside them, and every kernel is launched
while its predecessor still runs (programmatic dependent launch, where EARLY is set): it fetches its first weights,
which no other kernel writes, and only then waits.
"""

# Triton reads a kernel's annotations as types of its own; branches on constants cost nothing once compiled.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202, C901

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}


@triton.jit
def _activated(x, KIND: tl.constexpr):
    if KIND == 1:
        x = tl.maximum(x, 0.0)
    elif KIND == 2:
        x = x * tl.sigmoid(x)
    elif KIND == 3:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 4:
        # 0.5 (1 + tanh(u)) is sigmoid(2u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def _normed(x, inside, weight, bias, K, eps, scale, NORM: tl.constexpr):
    if NORM == 2:
        mean = tl.sum(x, axis=1) / K
        x = tl.where(inside, x - mean[:, None], 0.0)
    if NORM > 0:
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / K + eps)
        x = (x * rstd[:, None] * weight[None, :] + bias[None, :]) * scale
    return x


@triton.jit
def _dots(w, x):
    """(rows, outputs) from w (outputs, inputs) and x (rows, inputs)."""
    return tl.sum(w.to(tl.float32)[None, :, :] * x[:, None, :], axis=2)


@triton.jit
def linear_kernel(
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
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Compute y (batch, N) = activation(norm(x (batch, K)) w^T + bias) + residual; w (N, K), or (2N, K) if gated.

    A program normalises x once, BLOCK_K >= K, and takes tile after tile of w, each fetched while the last is used.
    """
    rows, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    k_in, row_in = k < K, rows < BATCH
    stride = tl.num_programs(0) * BLOCK_N
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    plain_ptr = w_ptr + tl.cast(N, tl.int64) * K
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    inside = (n < N)[:, None] & k_in[None, :]
    w = tl.load(w_ptr + at, mask=inside, other=0.0)
    v = w
    if GATED:
        v = tl.load(plain_ptr + at, mask=inside, other=0.0)
    gain = tl.zeros([BLOCK_K], tl.float32)
    shift = tl.zeros([BLOCK_K], tl.float32)
    if NORM > 0:
        gain = tl.load(norm_weight + k, mask=k_in, other=0.0).to(tl.float32)
    if NORM_BIAS:
        shift = tl.load(norm_bias + k, mask=k_in, other=0.0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    x_in = row_in[:, None] & k_in[None, :]
    x = tl.load(x_ptr + rows[:, None] * K + k[None, :], mask=x_in, other=0.0).to(tl.float32)
    x = _normed(x, x_in, gain, shift, K, eps, scale, NORM)
    for start in range(tl.program_id(0) * BLOCK_N, N, stride):
        n = start + tl.arange(0, BLOCK_N)
        n_in = n < N
        y_at = rows[:, None] * N + n[None, :]
        y_in = row_in[:, None] & n_in[None, :]
        if RESIDUAL:
            residual = tl.load(residual_ptr + y_at, mask=y_in, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)
        next_n = n + stride
        at = next_n.to(tl.int64)[:, None] * K + k[None, :]
        inside = (next_n < N)[:, None] & k_in[None, :]
        w_next = tl.load(w_ptr + at, mask=inside, other=0.0)
        v_next = w_next
        if GATED:
            v_next = tl.load(plain_ptr + at, mask=inside, other=0.0)
        y = _dots(w, x)
        if BIAS:
            y += bias[None, :]
        y = _activated(y, ACTIVATION)
        if GATED:
            plain = _dots(v, x)
            if BIAS:
                plain += tl.load(bias_ptr + N + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
            y = y * plain
        if RESIDUAL:
            y += residual
        tl.store(y_ptr + y_at, y, mask=y_in)
        w, v = w_next, v_next


@triton.jit
def long_linear_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    bias_ptr,
    residual_ptr,
    N,
    K,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Compute y (batch, N) = x (batch, K) w^T + bias + residual, for a K that is read in several passes of BLOCK_K."""
    rows, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, n_in = rows < BATCH, n < N
    w_at = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    w = tl.load(w_at, mask=n_in[:, None] & (k < K)[None, :], other=0.0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    y_at = rows[:, None] * N + n[None, :]
    y_in = row_in[:, None] & n_in[None, :]
    y = tl.zeros([ROWS, BLOCK_N], tl.float32)
    if RESIDUAL:
        y += tl.load(residual_ptr + y_at, mask=y_in, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + k
        x_in = row_in[:, None] & (at < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * K + at[None, :], mask=x_in, other=0.0).to(tl.float32)
        following = n_in[:, None] & (at + BLOCK_K < K)[None, :]
        w_next = tl.load(w_at + start + BLOCK_K, mask=following, other=0.0)
        total += w.to(tl.float32)[None, :, :] * x[:, None, :]
        w = w_next
    tl.store(y_ptr + y_at, y + tl.sum(total, axis=2), mask=y_in)


@triton.jit
def _head(base, d, norm_weight, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr):
    """One head of D values, normed and rotated; a rotated value needs the one half a head away."""
    x = tl.load(base + d, mask=d < D, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        x = x * rstd * tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)
    if ROTARY:
        half: tl.constexpr = D // 2
        partner = tl.where(d < half, d + half, d - half)
        y = tl.load(base + partner, mask=d < D, other=0.0).to(tl.float32)
        if NORM:
            y = y * rstd * tl.load(norm_weight + partner, mask=d < D, other=0.0).to(tl.float32)
        y = tl.where(d < half, -y, y)
        x = x * tl.load(cos + d, mask=d < D, other=0.0) + y * tl.load(sin + d, mask=d < D, other=0.0)
    return x


@triton.jit
def self_attention_kernel(
    qkv_ptr,
    y_ptr,
    keys_ptr,
    values_ptr,
    valid_ptr,
    slot_ptr,
    position_ptr,
    cos_ptr,
    sin_ptr,
    q_norm,
    k_norm,
    bias_ptr,
    capacity,
    distances,
    scale,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    BIASED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attention of one new token over a cache and itself; its key and value are put into the cache."""
    row, head = tl.program_id(0), tl.program_id(1)
    group: tl.constexpr = HEADS // KV_HEADS
    kv_head = head // group
    d, n = tl.arange(0, WIDTH), tl.arange(0, BLOCK_L)
    slot = tl.load(slot_ptr + row)
    position = tl.load(position_ptr + row)
    base = (row * KV_HEADS + kv_head).to(tl.int64) * capacity * D
    at = base + n[:, None] * D + d[None, :]
    inside = (n < slot)[:, None] & (d < D)[None, :]
    # Earlier tokens' keys and values are complete before this step's graph starts: they need not be waited for.
    keys = tl.load(keys_ptr + at, mask=inside, other=0.0)
    values = tl.load(values_ptr + at, mask=inside, other=0.0)
    kept = tl.load(valid_ptr + row * capacity + n, mask=n < slot, other=0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    qkv = qkv_ptr + row * (HEADS + 2 * KV_HEADS) * D
    cos, sin = cos_ptr + position * D, sin_ptr + position * D
    q = _head(qkv + head * D, d, q_norm, cos, sin, eps, D, NORM, ROTARY)
    k = _head(qkv + (HEADS + kv_head) * D, d, k_norm, cos, sin, eps, D, NORM, ROTARY)
    v = tl.load(qkv + (HEADS + KV_HEADS + kv_head) * D + d, mask=d < D, other=0.0)
    k = k.to(keys_ptr.dtype.element_ty)
    if head % group == 0:
        tl.store(keys_ptr + base + slot * D + d, k, mask=d < D)
        tl.store(values_ptr + base + slot * D + d, v, mask=d < D)
    q = q * scale
    largest = tl.sum(q * k.to(tl.float32), axis=0)
    if BIASED:
        largest += tl.load(bias_ptr + head * distances)
    total = largest * 0.0 + 1.0
    y = v.to(tl.float32)
    for start in range(0, slot, BLOCK_L):
        here = start + n
        following = here + BLOCK_L
        at += BLOCK_L * D
        inside = (following < slot)[:, None] & (d < D)[None, :]
        next_keys = tl.load(keys_ptr + at, mask=inside, other=0.0)
        next_values = tl.load(values_ptr + at, mask=inside, other=0.0)
        next_kept = tl.load(valid_ptr + row * capacity + following, mask=following < slot, other=0)
        score = tl.sum(keys.to(tl.float32) * q[None, :], axis=1)
        if BIASED:
            away = tl.minimum(slot - here, distances - 1)
            score += tl.load(bias_ptr + head * distances + away, mask=here < slot, other=0.0)
        score = tl.where(kept != 0, score, -float("inf"))
        new = tl.maximum(largest, tl.max(score, axis=0))
        weight = tl.exp(score - new)
        shrink = tl.exp(largest - new)
        total = total * shrink + tl.sum(weight, axis=0)
        y = y * shrink + tl.sum(values.to(tl.float32) * weight[:, None], axis=0)
        largest = new
        keys, values, kept = next_keys, next_values, next_kept
    tl.store(y_ptr + (row * HEADS + head) * D + d, y / total, mask=d < D)


@triton.jit
def cross_attention_kernel(
    q_ptr,
    y_ptr,
    keys_ptr,
    values_ptr,
    valid_ptr,
    capacity,
    scale,
    NEW: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attention of one of a row's NEW tokens over the encoder's states, whose keys and values are given."""
    place, head = tl.program_id(0), tl.program_id(1)
    row = place // NEW
    d, n = tl.arange(0, WIDTH), tl.arange(0, BLOCK_L)
    base = (row * HEADS + head).to(tl.int64) * capacity * D
    at = base + n[:, None] * D + d[None, :]
    inside = (n < capacity)[:, None] & (d < D)[None, :]
    keys = tl.load(keys_ptr + at, mask=inside, other=0.0)
    values = tl.load(values_ptr + at, mask=inside, other=0.0)
    kept = tl.load(valid_ptr + row * capacity + n, mask=n < capacity, other=0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    q = tl.load(q_ptr + (place * HEADS + head) * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
    largest = tl.sum(q, axis=0) * 0.0 - 1.0e30
    total = largest * 0.0
    y = tl.zeros([WIDTH], tl.float32)
    for start in range(0, capacity, BLOCK_L):
        score = tl.where(kept != 0, tl.sum(keys.to(tl.float32) * q[None, :], axis=1), -float("inf"))
        new = tl.maximum(largest, tl.max(score, axis=0))
        weight = tl.exp(score - new)
        shrink = tl.exp(largest - new)
        total = total * shrink + tl.sum(weight, axis=0)
        y = y * shrink + tl.sum(values.to(tl.float32) * weight[:, None], axis=0)
        largest = new
        here = start + BLOCK_L + n
        at += BLOCK_L * D
        inside = (here < capacity)[:, None] & (d < D)[None, :]
        keys = tl.load(keys_ptr + at, mask=inside, other=0.0)
        values = tl.load(values_ptr + at, mask=inside, other=0.0)
        kept = tl.load(valid_ptr + row * capacity + here, mask=here < capacity, other=0)
    tl.store(y_ptr + (place * HEADS + head) * D + d, y / total, mask=d < D)


@triton.jit
def embed_kernel(
    token_ptr,
    position_ptr,
    embedding,
    positions,
    x_ptr,
    scale,
    offset,
    K,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Give x (batch, K): the embedding of each row's last token, and of its position if POSITIONS of them are learned.

    Positions beyond the table belong to tokens behind an end, whose logits nobody reads.
    """
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(token_ptr + row)
    x = tl.load(embedding + token * K + k, mask=k < K, other=0.0).to(tl.float32) * scale
    if POSITIONS:
        position = tl.minimum(tl.load(position_ptr + row) + offset, POSITIONS - 1)
        x += tl.load(positions + position * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * K + k, x, mask=k < K)


@triton.jit
def largest_kernel(
    logits_ptr,
    value_ptr,
    index_ptr,
    eos_ptr,
    step_ptr,
    min_new_ptr,
    vocabulary,
    BLOCK: tl.constexpr,
    ENDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The largest logit of each chunk of the vocabulary; ends of sequence do not count before min_new steps."""
    row, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    n = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + tl.cast(row, tl.int64) * vocabulary + n, mask=n < vocabulary, other=-float("inf"))
    x = x.to(tl.float32)
    early = tl.load(step_ptr + row) < tl.load(min_new_ptr)
    for index in tl.static_range(ENDS):
        x = tl.where(early & (n == tl.load(eos_ptr + index)), -float("inf"), x)
    best = tl.max(x, axis=0)
    at = tl.min(tl.where(x == best, n, vocabulary), axis=0)
    tl.store(value_ptr + row * chunks + chunk, best)
    tl.store(index_ptr + row * chunks + chunk, at)


@triton.jit
def _tell(word_ptr, number, done, token):
    """Write a word of `words.StepWords`: one store, past the caches, so that it is on its way to the host at once."""
    tl.store(word_ptr, (number << 33) | (done.to(tl.int64) << 32) | token, cache_modifier=".wt")


@triton.jit
def advance_kernel(
    value_ptr,
    index_ptr,
    eos_ptr,
    token_ptr,
    finished_ptr,
    out_ptr,
    step_ptr,
    slot_ptr,
    position_ptr,
    words_ptr,
    number_ptr,
    chunks,
    capacity,
    vocabulary,
    pad,
    BLOCK: tl.constexpr,
    ENDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Take the best chunk's token, or pad for a row that has ended, and move the row on by one step; tell the host."""
    row = tl.program_id(0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.arange(0, BLOCK)
    x = tl.load(value_ptr + row * chunks + n, mask=n < chunks, other=-float("inf"))
    at = tl.load(index_ptr + row * chunks + n, mask=n < chunks, other=vocabulary)
    token = tl.min(tl.where(x == tl.max(x, axis=0), at, vocabulary), axis=0).to(tl.int64)
    # A row of NaN logits has no largest one: any token will do, but not one outside the embeddings.
    token = tl.minimum(token, vocabulary - 1)
    done = tl.load(finished_ptr + row) != 0
    token = tl.where(done, pad, token)
    for index in tl.static_range(ENDS):
        done = done | (token == tl.load(eos_ptr + index))
    step = tl.load(step_ptr + row)
    _tell(words_ptr + step * tl.num_programs(0) + row, tl.load(number_ptr), done, token)
    tl.store(out_ptr + tl.cast(row, tl.int64) * capacity + step, token)
    tl.store(token_ptr + row, token)
    tl.store(finished_ptr + row, done.to(tl.int8))
    tl.store(step_ptr + row, step + 1)
    tl.store(slot_ptr + row, tl.load(slot_ptr + row) + 1)
    tl.store(position_ptr + row, tl.load(position_ptr + row) + 1)


@triton.jit
def tell_step_kernel(token_ptr, finished_ptr, step_ptr, words_ptr, number_ptr, EARLY: tl.constexpr):
    """Tell the host of the token that a row has taken as its last one, when the row has moved on."""
    row = tl.program_id(0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    step = tl.load(step_ptr + row) - 1
    done = tl.load(finished_ptr + row) != 0
    token = tl.load(token_ptr + row)
    _tell(words_ptr + step * tl.num_programs(0) + row, tl.load(number_ptr), done, token)
