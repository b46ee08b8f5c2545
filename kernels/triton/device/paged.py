"""Attention of one query over keys and values in pages, and what writes into them."""

from __future__ import annotations

import triton
import triton.language as tl

from optkit.kernels.triton.device.quantize import to_grid


@triton.jit
def attention(
    q,
    keys,
    values,
    table,
    lengths,
    key_scale,
    value_scale,
    y,
    most,
    groups,
    SCALE: tl.constexpr,
    DEPTH: tl.constexpr,
    PAGE: tl.constexpr,
    SHARE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
):
    """The ``SHARE`` heads that read the same keys of one sample a program, ``N`` keys at a time; scores in powers of 2.

    ``most``: pages in a row of the table. ``WINDOW``: keys that are seen, the last ones (0: all). ``SCALED``: what is stored
    is multiplied with a number for each group.
    """
    sample = tl.program_id(0)
    group = tl.program_id(1)
    length = tl.load(lengths + sample)
    head = tl.arange(0, M)
    depth = tl.arange(0, DEPTH)
    column = tl.arange(0, N)
    at = (sample.to(tl.int64) * groups + group) * SHARE * DEPTH + head[:, None] * DEPTH + depth[None, :]
    asked = tl.load(q + at, mask=(head < SHARE)[:, None], other=0.0)
    factor = SCALE * 1.4426950408889634
    if SCALED:
        factor = factor * tl.load(key_scale + group)
    highest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, DEPTH), tl.float32)
    first = 0
    if WINDOW:
        first = max(0, length - WINDOW) // N * N
    for start in range(first, length, N):
        place = start + column
        there = place < length
        if WINDOW:
            there = there & (place >= length - WINDOW)
        page = tl.load(table + sample * most + place // PAGE, mask=there, other=0).to(tl.int64)
        row = ((page * groups + group) * PAGE + place % PAGE) * DEPTH
        key = tl.load(keys + row[:, None] + depth[None, :], mask=there[:, None], other=0.0)
        score = tl.dot(asked, tl.trans(key.to(asked.dtype))) * factor
        score = tl.where(there[None, :], score, float("-inf"))
        now = tl.maximum(highest, tl.max(score, axis=1))
        # Before the window, all of a block may be hidden: then any finite number is as good.
        safe = tl.where(now == float("-inf"), 0.0, now)
        part = tl.exp2(score - safe[:, None])
        less = tl.exp2(highest - safe)
        total = total * less + tl.sum(part, axis=1)
        value = tl.load(values + row[:, None] + depth[None, :], mask=there[:, None], other=0.0)
        value = value.to(asked.dtype)
        sums = tl.dot(part.to(value.dtype), value, sums * less[:, None])
        highest = now
    sums = sums / total[:, None]
    if SCALED:
        sums = sums * tl.load(value_scale + group)
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(head < SHARE)[:, None])


@triton.jit
def write(
    k,
    v,
    cos,
    sin,
    slots,
    key_scale,
    value_scale,
    keys,
    values,
    rows,
    groups,
    DEPTH: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """``ROWS`` heads of new keys and values a program: keys are turned, in float32, and both go to their slots.

    ``SCALED``: they are divided by a number for each group, and rounded to what is stored.
    """
    HALF: tl.constexpr = DEPTH // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    token = row // groups
    group = row % groups
    slot = tl.load(slots + token, mask=inside, other=0).to(tl.int64)
    half = tl.arange(0, HALF)
    whole = inside[:, None]
    at = row.to(tl.int64)[:, None] * DEPTH + half[None, :]
    turn = token.to(tl.int64)[:, None] * DEPTH + half[None, :]
    low = tl.load(k + at, mask=whole, other=0.0).to(tl.float32)
    high = tl.load(k + at + HALF, mask=whole, other=0.0).to(tl.float32)
    first = low * tl.load(cos + turn, mask=whole, other=0.0).to(tl.float32)
    first -= high * tl.load(sin + turn, mask=whole, other=0.0).to(tl.float32)
    second = high * tl.load(cos + turn + HALF, mask=whole, other=0.0).to(tl.float32)
    second += low * tl.load(sin + turn + HALF, mask=whole, other=0.0).to(tl.float32)
    left = tl.load(v + at, mask=whole, other=0.0).to(tl.float32)
    right = tl.load(v + at + HALF, mask=whole, other=0.0).to(tl.float32)
    if SCALED:
        by_key = tl.load(key_scale + group, mask=inside, other=1.0)[:, None]
        by_value = tl.load(value_scale + group, mask=inside, other=1.0)[:, None]
        first, second, left, right = first / by_key, second / by_key, left / by_value, right / by_value
    to = (slot // PAGE * groups + group) * PAGE + slot % PAGE
    out = to[:, None] * DEPTH + half[None, :]
    kind = keys.dtype.element_ty
    tl.store(keys + out, to_grid(first, kind), mask=whole)
    tl.store(keys + out + HALF, to_grid(second, kind), mask=whole)
    tl.store(values + out, to_grid(left, kind), mask=whole)
    tl.store(values + out + HALF, to_grid(right, kind), mask=whole)
