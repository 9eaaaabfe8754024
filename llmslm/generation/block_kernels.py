"""Triton kernels of blocks of tokens: their attention, and verified decoding's choice by the largest logits.

House rules as in `kernels.py`; but here all that another kernel writes is waited for, caches included: several passes
over the same caches lie in one graph.
"""

# Triton reads a kernel's annotations as types of its own; branches on constants cost nothing once compiled.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _angles(cos_ptr, sin_ptr, angle, within, D: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr):
    """Rows of the tables of angles, (places, WIDTH) each."""
    at = angle[:, None] * D + tl.arange(0, WIDTH)[None, :]
    cos, sin = at * 0.0, at * 0.0
    if ROTARY:
        cos, sin = tl.load(cos_ptr + at, mask=within, other=0.0), tl.load(sin_ptr + at, mask=within, other=0.0)
    return cos, sin


@triton.jit
def _turned_heads(
    base, stride, within, cos, sin, gain, turned_gain, eps, D: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr
):
    """One head at each of some places, (places, width), `stride` apart: normed, and rotated by `_angles`."""
    p, d = tl.arange(0, within.shape[0])[:, None], tl.arange(0, within.shape[1])[None, :]
    half: tl.constexpr = D // 2
    x = tl.load(base + p * stride + d, mask=within, other=0.0).to(tl.float32)
    if ROTARY:
        y = tl.load(base + p * stride + tl.where(d < half, d + half, d - half), mask=within, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x = x * rstd * gain[None, :]
        if ROTARY:
            y = y * rstd * turned_gain[None, :]
    if ROTARY:
        x = x * cos + tl.where(d < half, -y, y) * sin
    return x


@triton.jit
def _gains(norm_weight, D: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """A norm's weights of a head, and those that a rotation brings to the same places."""
    d = tl.arange(0, WIDTH)
    gain, turned = d * 0.0, d * 0.0
    if NORM:
        half: tl.constexpr = D // 2
        gain = tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)
        turned = tl.load(norm_weight + tl.where(d < half, d + half, d - half), mask=d < D, other=0.0).to(tl.float32)
    return gain, turned


@triton.jit
def _heads(
    base,
    stride,
    angle,
    inside,
    norm_weight,
    cos_ptr,
    sin_ptr,
    eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """One head of D values at each of some places, normed and rotated by the angles of these rows of the tables."""
    within = inside[:, None] & (tl.arange(0, WIDTH) < D)[None, :]
    cos, sin = _angles(cos_ptr, sin_ptr, angle, within, D, WIDTH, ROTARY)
    gain, turned_gain = _gains(norm_weight, D, WIDTH, NORM)
    return _turned_heads(base, stride, within, cos, sin, gain, turned_gain, eps, D, NORM, ROTARY)


@triton.jit
def block_attention_kernel(
    qkv_ptr,
    y_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    cos_ptr,
    sin_ptr,
    q_norm,
    k_norm,
    bias_ptr,
    capacity,
    angles,
    distances,
    scale,
    eps,
    NEW: tl.constexpr,
    PLACES: tl.constexpr,
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
    """Attention of one of a row's NEW consecutive tokens over the slots before them, those before it, and itself.

    The token of position p lies in slot p. Each program puts its own key and value into the cache, and works out the
    keys of the block's places before its own again: so none waits for another.
    """
    block_place, head = tl.program_id(0), tl.program_id(1)
    row, place = block_place // NEW, block_place % NEW
    group: tl.constexpr = HEADS // KV_HEADS
    wide: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    kv_head = head // group
    p, d, n = tl.arange(0, PLACES), tl.arange(0, WIDTH), tl.arange(0, BLOCK_L)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    start = tl.load(position_ptr + row * NEW)
    base = (row * KV_HEADS + kv_head).to(tl.int64) * capacity * D
    at = base + n[:, None] * D + d[None, :]
    d_in = d < D
    inside = (n < start)[:, None] & d_in[None, :]
    keys = tl.load(keys_ptr + at, mask=inside, other=0.0)
    values = tl.load(values_ptr + at, mask=inside, other=0.0)
    qkv = qkv_ptr + row * NEW * wide
    # Angles beyond the tables belong to tokens behind an end, whose logits nobody reads.
    angle = tl.minimum(start + p, angles - 1)
    seen, own = p <= place, p == place
    q_at, k_at, v_at = qkv + head * D, qkv + (HEADS + kv_head) * D, qkv + (HEADS + KV_HEADS + kv_head) * D
    q = _heads(q_at, wide, angle, own, q_norm, cos_ptr, sin_ptr, eps, D, WIDTH, NORM, ROTARY)
    q = tl.sum(tl.where(own[:, None], q, 0.0), axis=0) * scale
    k = _heads(k_at, wide, angle, seen, k_norm, cos_ptr, sin_ptr, eps, D, WIDTH, NORM, ROTARY)
    k = k.to(keys_ptr.dtype.element_ty)
    v = tl.load(v_at + p[:, None] * wide + d[None, :], mask=seen[:, None] & d_in[None, :], other=0.0)
    if head % group == 0:
        slots = base + (start + p)[:, None] * D + d[None, :]
        tl.store(keys_ptr + slots, k, mask=own[:, None] & d_in[None, :])
        tl.store(values_ptr + slots, v, mask=own[:, None] & d_in[None, :])
    own_score = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
    if BIASED:
        own_away = tl.minimum(tl.maximum(place - p, 0), distances - 1)
        own_score += tl.load(bias_ptr + head * distances + own_away)
    own_score = tl.where(seen, own_score, -float("inf"))
    largest = tl.max(own_score, axis=0)
    own_weight = tl.exp(own_score - largest)
    total = tl.sum(own_weight, axis=0)
    y = tl.sum(v.to(tl.float32) * own_weight[:, None], axis=0)
    for begin in range(0, start, BLOCK_L):
        here = begin + n
        at += BLOCK_L * D
        inside = (here + BLOCK_L < start)[:, None] & d_in[None, :]
        next_keys = tl.load(keys_ptr + at, mask=inside, other=0.0)
        next_values = tl.load(values_ptr + at, mask=inside, other=0.0)
        score = tl.sum(keys.to(tl.float32) * q[None, :], axis=1)
        if BIASED:
            away = tl.minimum(start + place - here, distances - 1)
            score += tl.load(bias_ptr + head * distances + away, mask=here < start, other=0.0)
        score = tl.where(here < start, score, -float("inf"))
        new = tl.maximum(largest, tl.max(score, axis=0))
        weight = tl.exp(score - new)
        shrink = tl.exp(largest - new)
        total = total * shrink + tl.sum(weight, axis=0)
        y = y * shrink + tl.sum(values.to(tl.float32) * weight[:, None], axis=0)
        largest = new
        keys, values = next_keys, next_values
    tl.store(y_ptr + (block_place * HEADS + head) * D + d, y / total, mask=d_in)


@triton.jit
def place_kernel(
    tokens_ptr,
    produced_ptr,
    base_ptr,
    start_ptr,
    token_ptr,
    position_ptr,
    step_ptr,
    back,
    first_index,
    places,
    vocabulary,
    NEW: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Give the ids, positions and indices of a row's NEW tokens from `back` before its last one, or its first, on."""
    block_place = tl.program_id(0)
    row, place = block_place // NEW, block_place % NEW
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    index = tl.maximum(tl.load(produced_ptr + row) - back, first_index) + place
    token = tl.load(tokens_ptr + row * places + index)
    token = tl.where(index == 0, tl.load(start_ptr + row), token)
    # A token that this model does not know is read as its last one: only a draft's chance suffers.
    tl.store(token_ptr + block_place, tl.minimum(token, vocabulary - 1))
    tl.store(position_ptr + block_place, index + tl.load(base_ptr + row))
    tl.store(step_ptr + block_place, index)


@triton.jit
def _best(value_ptr, index_ptr, row, inside, chunks, vocabulary, CHUNKS: tl.constexpr):
    """The token of the largest logit of each of these rows, from those of their chunks."""
    c = tl.arange(0, CHUNKS)
    at = row[:, None] * chunks + c[None, :]
    within = inside[:, None] & (c < chunks)[None, :]
    x = tl.load(value_ptr + at, mask=within, other=-float("inf"))
    token = tl.load(index_ptr + at, mask=within, other=vocabulary)
    token = tl.min(tl.where(x == tl.max(x, axis=1)[:, None], token, vocabulary), axis=1).to(tl.int64)
    # A row of NaN logits has no largest one: any token will do, but not one outside the embeddings.
    return tl.minimum(token, vocabulary - 1)


@triton.jit
def draft_kernel(
    value_ptr,
    index_ptr,
    tokens_ptr,
    token_ptr,
    position_ptr,
    step_ptr,
    chunks,
    places,
    vocabulary,
    known,
    CHUNKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Write the draft's most probable token behind the last one of a row, as the one that is read next."""
    row = tl.program_id(0)
    one = row + tl.arange(0, 1)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.sum(_best(value_ptr, index_ptr, one, one >= 0, chunks, vocabulary, CHUNKS), axis=0)
    index = tl.load(step_ptr + row) + 1
    tl.store(tokens_ptr + row * places + index, token)
    tl.store(token_ptr + row, tl.minimum(token, known - 1))
    tl.store(position_ptr + row, tl.load(position_ptr + row) + 1)
    tl.store(step_ptr + row, index)


@triton.jit
def keep_kernel(
    value_ptr,
    index_ptr,
    eos_ptr,
    tokens_ptr,
    produced_ptr,
    ended_ptr,
    report_ptr,
    max_new,
    chunks,
    places,
    vocabulary,
    rows,
    SIZE: tl.constexpr,
    PLACES: tl.constexpr,
    CHUNKS: tl.constexpr,
    ENDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Keep a row's draft up to where it differs from the largest logits, the token there, and no more than it may have.

    Reports tokens so far, whether the row goes on, drafted tokens that were right, and tokens taken: (4, rows).
    """
    row = tl.program_id(0)
    p = tl.arange(0, PLACES)
    inside = p <= SIZE
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    choice = _best(value_ptr, index_ptr, row * (SIZE + 1) + p, inside, chunks, vocabulary, CHUNKS)
    before = tl.load(produced_ptr + row)
    was_open = tl.load(ended_ptr + row) == 0
    at = tokens_ptr + row * places + before + 1 + p
    drafted = tl.load(at, mask=p < SIZE, other=-1)
    accepted = tl.min(tl.where(inside & (drafted != choice), p, PLACES), axis=0)
    # Up to the place of the first difference, the block's tokens are the choices.
    tl.store(at, choice, mask=p == accepted)
    ends = p < 0
    for index in tl.static_range(ENDS):
        ends = ends | (choice == tl.load(eos_ptr + index))
    first_end = tl.min(tl.where(ends & (p <= accepted), p, PLACES), axis=0)
    count = tl.minimum(tl.minimum(accepted, first_end) + 1, max_new - before)
    count = tl.where(was_open, count, 0)
    produced = before + count
    is_open = was_open & (first_end == PLACES) & (produced < max_new)
    tl.store(produced_ptr + row, produced)
    tl.store(ended_ptr + row, 1 - is_open.to(tl.int64))
    tl.store(report_ptr + row, produced)
    tl.store(report_ptr + rows + row, is_open.to(tl.int64))
    tl.store(report_ptr + 2 * rows + row, accepted.to(tl.int64))
    tl.store(report_ptr + 3 * rows + row, count)


@triton.jit
def tell_block_kernel(
    tokens_ptr,
    report_ptr,
    told_ptr,
    words_ptr,
    number_ptr,
    max_new,
    blocks,
    places,
    rows,
    PLACES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Tell the host what a row's last block gave: `words.BlockWords` of its tokens, and of its report; count the block.

    Stores go past the caches, so that they are on their way to the host at once.
    """
    row = tl.program_id(0)
    p = tl.arange(0, PLACES)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.load(number_ptr) << 33
    produced = tl.load(report_ptr + row)
    is_open = tl.load(report_ptr + rows + row)
    accepted = tl.load(report_ptr + 2 * rows + row)
    taken = tl.load(report_ptr + 3 * rows + row)
    told = tl.load(told_ptr + row)
    report = (produced << 15) | (is_open << 14) | (accepted << 7) | taken
    # Runs outside of a call may be more than there is room for.
    at = max_new + tl.minimum(told, blocks - 1)
    tl.store(words_ptr + at * rows + row, number | report, cache_modifier=".wt")
    index = produced - taken + p
    token = tl.load(tokens_ptr + row * places + 1 + index, mask=p < taken, other=0)
    tl.store(words_ptr + index * rows + row, number | token, mask=p < taken, cache_modifier=".wt")
    tl.store(told_ptr + row, told + 1)
