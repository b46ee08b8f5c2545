"""Attention in one pass over keys and values, with a softmax that is corrected as larger scores come."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attention(
    q,
    k,
    v,
    mask,
    y,
    queries,
    keys,
    heads,
    SCALE: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    MASK: tl.constexpr,
    MASK_BATCH: tl.constexpr,
    MASK_HEADS: tl.constexpr,
    MASK_QUERIES: tl.constexpr,
    SHARE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    LAST: tl.constexpr,
):
    """``M`` queries of one head a program; scores and sums in float32, in powers of 2.

    ``MASK_BATCH``, ``MASK_HEADS``, ``MASK_QUERIES``: whether the mask has this axis, or is the same along it.
    ``SHARE``: heads that read the same keys. ``CAUSAL``: no query sees keys behind its own place, nor more than ``WINDOW``
    of them (0: all); the first query stands at the first key, or with ``LAST`` the last at the last.
    """
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    depth = tl.arange(0, DEPTH)
    at = head * queries * DEPTH + row.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    asked = tl.load(q + at, mask=(row < queries)[:, None], other=0.0)
    column = tl.arange(0, N)
    first, end = 0, keys
    at_key = row
    if CAUSAL:
        start_row = tl.program_id(0) * M
        if LAST:
            start_row += keys - queries
            at_key += keys - queries
        # What no query of these sees is not read.
        end = min(keys, start_row + M)
        if WINDOW:
            first = max(0, (start_row - WINDOW + 1) // N * N)
    plane_keys = (head // SHARE * keys + first) * DEPTH
    left = k + plane_keys + column.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    right = v + plane_keys + column.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    if MASK:
        plane = 0
        if MASK_BATCH:
            plane += head // heads
        if MASK_HEADS:
            plane = plane * heads + head % heads
        if MASK_QUERIES:
            mask += plane * queries * keys
        else:
            mask += plane * keys
        mask += first
    # The product of float32's lowest number, with which masks hide keys, and log2(e) is infinite: with a mask, it is differences
    # of scores that are turned into powers of 2.
    FACTOR: tl.constexpr = SCALE if MASK else SCALE * 1.4426950408889634
    TURN: tl.constexpr = 1.4426950408889634 if MASK else 1.0
    highest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, DEPTH), tl.float32)
    for start in range(first, end, N):
        there = column < keys - start
        key = tl.load(left, mask=there[:, None], other=0.0)
        score = tl.dot(asked, tl.trans(key)) * FACTOR
        if MASK:
            if MASK_QUERIES:
                places = (row * keys)[:, None] + column[None, :]
                added = tl.load(mask + places, mask=(row < queries)[:, None] & there[None, :], other=0.0)
                score += added.to(tl.float32)
            else:
                added = tl.load(mask + column, mask=there, other=0.0)
                score += added.to(tl.float32)[None, :]
            mask += N
        seen = there[None, :]
        if CAUSAL:
            back = at_key[:, None] - (column + start)[None, :]
            seen = seen & (back >= 0)
            if WINDOW:
                seen = seen & (back < WINDOW)
        score = tl.where(seen, score, float("-inf"))
        now = tl.maximum(highest, tl.max(score, axis=1))
        # Where all so far is minus infinity, any finite number is as good.
        safe = tl.where(now == float("-inf"), 0.0, now)
        part = tl.exp2((score - safe[:, None]) * TURN)
        less = tl.exp2((highest - safe) * TURN)
        total = total * less + tl.sum(part, axis=1)
        value = tl.load(right, mask=there[:, None], other=0.0)
        sums = tl.dot(part.to(value.dtype), value, sums * less[:, None])
        highest = now
        left += N * DEPTH
        right += N * DEPTH
    sums = sums / total[:, None]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(row < queries)[:, None])
