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
    parts,
    weights,
    most,
    groups,
    SCALE: tl.constexpr,
    DEPTH: tl.constexpr,
    PAGE: tl.constexpr,
    SHARE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """The ``SHARE`` heads that read the same keys of one sample a program, ``N`` keys at a time; scores in powers of 2.

    ``most``: pages in a row of the table. ``WINDOW``: keys that are seen, the last ones (0: all). ``KEYS``: of a part, where each
    program has one and writes what it finds of it with the logarithm of its weight (0: all keys). ``SCALED``: what is stored is
    multiplied with a number for each group.
    """
    sample = tl.program_id(0)
    group = tl.program_id(1)
    length = tl.load(lengths + sample)
    head = tl.arange(0, M)
    depth = tl.arange(0, DEPTH)
    column = tl.arange(0, N)
    row = (sample.to(tl.int64) * groups + group) * SHARE + head
    at = row[:, None] * DEPTH + depth[None, :]
    asked = tl.load(q + at, mask=(head < SHARE)[:, None], other=0.0)
    factor = SCALE * 1.4426950408889634
    if SCALED:
        factor = factor * tl.load(key_scale + group)
    highest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, DEPTH), tl.float32)
    first = 0
    last = length
    if WINDOW:
        first = max(0, length - WINDOW) // N * N
    if KEYS:
        first = max(first, tl.program_id(2) * KEYS)
        last = min(length, tl.program_id(2) * KEYS + KEYS)
    for start in range(first, last, N):
        place = start + column
        there = place < last
        if WINDOW:
            there = there & (place >= length - WINDOW)
        page = tl.load(table + sample * most + place // PAGE, mask=there, other=0).to(tl.int64)
        from_ = ((page * groups + group) * PAGE + place % PAGE) * DEPTH
        key = tl.load(keys + from_[:, None] + depth[None, :], mask=there[:, None], other=0.0)
        score = tl.dot(asked, tl.trans(key.to(asked.dtype))) * factor
        score = tl.where(there[None, :], score, float("-inf"))
        now = tl.maximum(highest, tl.max(score, axis=1))
        # Before the window, all of a block may be hidden: then any finite number is as good.
        safe = tl.where(now == float("-inf"), 0.0, now)
        part = tl.exp2(score - safe[:, None])
        less = tl.exp2(highest - safe)
        total = total * less + tl.sum(part, axis=1)
        value = tl.load(values + from_[:, None] + depth[None, :], mask=there[:, None], other=0.0)
        value = value.to(asked.dtype)
        sums = tl.dot(part.to(value.dtype), value, sums * less[:, None])
        highest = now
    if KEYS:
        # A part may lie behind the last key, or before the window.
        total = tl.where(total > 0.0, total, 1e-30)
    sums = sums / total[:, None]
    if SCALED:
        sums = sums * tl.load(value_scale + group)
    if KEYS:
        slot = row * tl.num_programs(2) + tl.program_id(2)
        weight = tl.maximum((highest + tl.log2(total)) * 0.6931471805599453, -1e30)
        tl.store(parts + slot[:, None] * DEPTH + depth[None, :], sums, mask=(head < SHARE)[:, None])
        tl.store(weights + slot, weight, mask=head < SHARE)
    else:
        tl.store(y + at, sums.to(y.dtype.element_ty), mask=(head < SHARE)[:, None])


@triton.jit
def merge(parts, weights, y, splits, DEPTH: tl.constexpr, N: tl.constexpr):
    """One head a program: its parts by their weights, ``N`` at a time."""
    row = tl.program_id(0).to(tl.int64) * splits
    column = tl.arange(0, N)
    depth = tl.arange(0, DEPTH)
    highest = float("-inf")
    total = 0.0
    sums = tl.zeros((DEPTH,), tl.float32)
    for start in range(0, splits, N):
        place = start + column
        there = place < splits
        weight = tl.load(weights + row + place, mask=there, other=float("-inf"))
        now = tl.maximum(highest, tl.max(weight, axis=0))
        share = tl.exp(weight - now)
        less = tl.exp(highest - now)
        part = tl.load(
            parts + (row + place)[:, None] * DEPTH + depth[None, :], mask=there[:, None], other=0.0
        )
        sums = sums * less + tl.sum(part * share[:, None], axis=0)
        total = total * less + tl.sum(share, axis=0)
        highest = now
    tl.store(y + tl.program_id(0).to(tl.int64) * DEPTH + depth, (sums / total).to(y.dtype.element_ty))


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
    tl.store(keys + out, to_grid(first, 0.0, kind), mask=whole)
    tl.store(keys + out + HALF, to_grid(second, 0.0, kind), mask=whole)
    tl.store(values + out, to_grid(left, 0.0, kind), mask=whole)
    tl.store(values + out + HALF, to_grid(right, 0.0, kind), mask=whole)
