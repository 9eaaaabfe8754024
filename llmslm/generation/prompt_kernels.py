"""Triton kernels of whole prompts: attention of short ones, and what lies between cuBLAS's products and torch's.

But for the attention no kernel starts before its predecessor has ended: cuBLAS's do not tell when that is. Tokens are
rows, counted through the batch; offsets of rows are of 64 bits, since a large batch of long prompts has more values
than 32 bits can count.
"""

# Triton reads a kernel's annotations as types of its own; branches on constants cost nothing once compiled.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llmslm.generation.block_kernels import _angles, _gains, _heads, _turned_heads
from llmslm.generation.kernels import _activated, _normed


@triton.jit
def embed_prompt_kernel(
    prompt_ptr,
    position_ptr,
    embedding,
    positions,
    x_ptr,
    scale,
    offset,
    K,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Give x (tokens, K): embeddings of ids, or those given, and of positions if POSITIONS of them are learned."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if IDS:
        token = tl.load(prompt_ptr + row).to(tl.int64)
        x = tl.load(embedding + token * K + k, mask=k < K, other=0.0).to(tl.float32) * scale
    else:
        x = tl.load(prompt_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    if POSITIONS:
        position = tl.minimum(tl.load(position_ptr + row) + offset, POSITIONS - 1)
        x += tl.load(positions + position * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * K + k, x, mask=k < K)


@triton.jit
def seen_keys_kernel(attention_mask_ptr, mask_ptr, length, lowest, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Give a mask (batch, 1, length, length): 0 for keys that a query sees, itself always, else the lowest value."""
    row = tl.program_id(0).to(tl.int64)
    query, key = row % length, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(attention_mask_ptr + row - query + key, mask=key < length, other=0)
    seen = kept != 0
    if CAUSAL:
        seen = seen & (key <= query)
    seen = seen | (key == query)
    tl.store(mask_ptr + row * length + key, tl.where(seen, 0.0, lowest), mask=key < length)


@triton.jit
def add_norm_kernel(
    x_ptr,
    added_ptr,
    sum_ptr,
    y_ptr,
    norm_weight,
    norm_bias,
    stride,
    K,
    eps,
    scale,
    BLOCK: tl.constexpr,
    ADDED: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
):
    """Give sum = x + added and y = norm(sum), (rows, K); a row of x and added begins `stride` after the one before."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < K
    x = tl.load(x_ptr + row * stride + k, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(added_ptr + row * stride + k, mask=inside, other=0.0).to(tl.float32)
        kept = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * K + k, kept, mask=inside)
        x = kept.to(tl.float32)  # the norm sees what is kept
    if NORM > 0:
        gain = tl.load(norm_weight + k, mask=inside, other=0.0).to(tl.float32)
        shift = tl.zeros([BLOCK], tl.float32)
        if NORM_BIAS:
            shift = tl.load(norm_bias + k, mask=inside, other=0.0).to(tl.float32)
        y = _normed(x[None, :], inside[None, :], gain, shift, K, eps, scale, NORM)
        tl.store(y_ptr + row * K + k[None, :], y, mask=inside[None, :])


@triton.jit
def activation_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Give y (rows, N) = activation(x (rows, N)); of x (rows, 2N), the activation of the first N times the others."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide: tl.constexpr = 2 if GATED else 1
    at = x_ptr + row * N * wide + n
    y = _activated(tl.load(at, mask=n < N, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        y = y * tl.load(at + N, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + n, y, mask=n < N)


@triton.jit
def split_heads_kernel(
    qkv_ptr,
    q_ptr,
    wide_keys_ptr,
    wide_values_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    cos_ptr,
    sin_ptr,
    q_norm,
    k_norm,
    tokens,
    length,
    capacity,
    q_eps,
    k_eps,
    PLACES: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """One head of PLACES tokens: of the queries, rotated, into q; of keys and values into their row of the caches.

    The token in place p of its row's prompt has slot p. Where several query heads share those of keys and values, each
    is written for all of them as well, (tokens, HEADS, D) like q: attention with a mask reads no shared ones.
    """
    first, head = tl.program_id(0).to(tl.int64) * PLACES, tl.program_id(1)
    wide: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    group: tl.constexpr = HEADS // KV_HEADS
    token, d = first + tl.arange(0, PLACES), tl.arange(0, WIDTH)
    inside = token < tokens
    within = inside[:, None] & (d < D)[None, :]
    angle = tl.load(position_ptr + token, mask=inside, other=0)
    base = qkv_ptr + first * wide + head * D
    out = token[:, None] * (HEADS * D) + d[None, :]
    if head < HEADS:
        q = _heads(base, wide, angle, inside, q_norm, cos_ptr, sin_ptr, q_eps, D, WIDTH, Q_NORM, ROTARY)
        tl.store(q_ptr + out + head * D, q, mask=within)
    else:
        kv_head = (head - HEADS) % KV_HEADS
        slots = ((token // length) * KV_HEADS + kv_head) * capacity + token % length
        slot_at = slots[:, None] * D + d[None, :]
        if head < HEADS + KV_HEADS:
            k = _heads(base, wide, angle, inside, k_norm, cos_ptr, sin_ptr, k_eps, D, WIDTH, K_NORM, ROTARY)
            tl.store(keys_ptr + slot_at, k, mask=within)
            if group > 1:
                for member in tl.static_range(group):
                    tl.store(wide_keys_ptr + out + (kv_head * group + member) * D, k, mask=within)
        else:
            v = tl.load(base + tl.arange(0, PLACES)[:, None] * wide + d[None, :], mask=within, other=0.0)
            tl.store(values_ptr + slot_at, v, mask=within)
            if group > 1:
                for member in tl.static_range(group):
                    tl.store(wide_values_ptr + out + (kv_head * group + member) * D, v, mask=within)


@triton.jit
def prompt_attention_kernel(
    qkv_ptr,
    y_ptr,
    keys_ptr,
    values_ptr,
    mask_ptr,
    position_ptr,
    cos_ptr,
    sin_ptr,
    q_norm,
    k_norm,
    length,
    capacity,
    scale,
    q_eps,
    k_eps,
    PLACES: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    CAUSAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attention of one head of PLACES tokens to their prompt of up to KEYS, from qkv (tokens, heads * D).

    A program puts the keys and values of its own places into the caches, and works out all that it looks at by itself:
    so none waits for another. A token sees the keys that the mask (batch, length) keeps, and itself always. Mask and
    positions are not waited for: they were there before the pass's first product, which waited for all before it.
    """
    if EARLY:
        gdc_launch_dependents()
    tiles = tl.cdiv(length, PLACES)
    row, head = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    first = (tl.program_id(0) % tiles) * PLACES
    wide: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    group: tl.constexpr = HEADS // KV_HEADS
    kv_head = head // group
    place, key, d = first + tl.arange(0, PLACES), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    inside, key_in = place < length, key < length
    within, keys_within = inside[:, None] & (d < D)[None, :], key_in[:, None] & (d < D)[None, :]
    angle = tl.load(position_ptr + row * length + place, mask=inside, other=0)
    key_angle = tl.load(position_ptr + row * length + key, mask=key_in, other=0)
    kept = tl.load(mask_ptr + row * length + key, mask=key_in, other=0) != 0
    q_gain, q_turned = _gains(q_norm, D, WIDTH, Q_NORM)
    k_gain, k_turned = _gains(k_norm, D, WIDTH, K_NORM)
    cos, sin = _angles(cos_ptr, sin_ptr, angle, within, D, WIDTH, ROTARY)
    key_cos, key_sin = _angles(cos_ptr, sin_ptr, key_angle, keys_within, D, WIDTH, ROTARY)
    seen = kept[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= place[:, None])
    seen = seen | (key[None, :] == place[:, None])
    if EARLY:
        gdc_wait()
    prompt = qkv_ptr + row * length * wide
    own, k_at, v_at = prompt + first * wide, (HEADS + kv_head) * D, (HEADS + KV_HEADS + kv_head) * D
    q = _turned_heads(own + head * D, wide, within, cos, sin, q_gain, q_turned, q_eps, D, Q_NORM, ROTARY)
    k = _turned_heads(prompt + k_at, wide, keys_within, key_cos, key_sin, k_gain, k_turned, k_eps, D, K_NORM, ROTARY)
    v = tl.load(prompt + v_at + key[:, None] * wide + d[None, :], mask=keys_within, other=0.0)
    if head % group == 0:
        base = (row * KV_HEADS + kv_head) * capacity * D
        slots = base + key[:, None] * D + d[None, :]
        mine = keys_within & ((key >= first) & (key < first + PLACES))[:, None]
        tl.store(keys_ptr + slots, k, mask=mine)
        tl.store(values_ptr + slots, v, mask=mine)
    q, k = q.to(qkv_ptr.dtype.element_ty), k.to(qkv_ptr.dtype.element_ty)
    score = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, -float("inf"))
    weight = tl.exp(score - tl.maximum(tl.max(score, axis=1), -1.0e30)[:, None])
    y = tl.dot(weight.to(v.dtype), v) / tl.sum(weight, axis=1)[:, None]
    at = (row * length + place)[:, None] * (HEADS * D) + head * D + d[None, :]
    tl.store(y_ptr + at, y, mask=within)
