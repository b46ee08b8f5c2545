"""The largest numbers of a row, and what stands at their places."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(value):
    """float32 as integers in the same order; both zeros are one."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def top(
    x,
    boxes,
    values,
    places,
    found,
    columns,
    classes,
    K: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    DECODE: tl.constexpr,
):
    """The ``K`` largest of a row a program, largest first and of equal ones the first; ``KEPT``: the power of 2 above ``K``.

    The ``K``-th largest is found a bit at a time, by counting; what is not smaller is written to the outputs in the order of
    the row, read again and sorted. ``DECODE``: a place is a box and one of ``classes``; both leave instead of it.
    """
    row = tl.program_id(0).to(tl.int64)
    start = x + row * columns
    at = tl.arange(0, BLOCK)
    LOWEST: tl.constexpr = -2147483648
    # The largest number that K of them reach: its sign, then its bits from the highest on.
    count = 0
    for k in range(0, columns, BLOCK):
        value = tl.load(start + k + at, mask=at < columns - k, other=float("-inf")).to(tl.float32)
        count += tl.sum(((ordered(value) >= 0) & (at < columns - k)).to(tl.int32), axis=0)
    least = tl.where(count >= K, 0, LOWEST)
    for bit in range(0, 31):
        higher = least + (1 << (30 - bit))
        count = 0
        for k in range(0, columns, BLOCK):
            value = tl.load(start + k + at, mask=at < columns - k, other=float("-inf")).to(tl.float32)
            count += tl.sum(((ordered(value) >= higher) & (at < columns - k)).to(tl.int32), axis=0)
        least = tl.where(count >= K, higher, least)
    above = 0
    for k in range(0, columns, BLOCK):
        value = tl.load(start + k + at, mask=at < columns - k, other=float("-inf")).to(tl.float32)
        above += tl.sum(((ordered(value) > least) & (at < columns - k)).to(tl.int32), axis=0)
    # Of those that equal it, the first are taken.
    wanted = K - above
    taken, equal = 0, 0
    for k in range(0, columns, BLOCK):
        inside = at < columns - k
        value = tl.load(start + k + at, mask=inside, other=float("-inf")).to(tl.float32)
        same = ((ordered(value) == least) & inside).to(tl.int32)
        kept = ((ordered(value) > least) & inside).to(tl.int32)
        kept += same * (equal + tl.cumsum(same, axis=0) <= wanted).to(tl.int32)
        to = taken + tl.cumsum(kept, axis=0) - 1
        tl.store(places + row * K + to, (k + at).to(tl.int64), mask=kept > 0)
        taken += tl.sum(kept, axis=0)
        equal += tl.sum(same, axis=0)
    tl.debug_barrier()
    rank = tl.arange(0, KEPT)
    place = tl.load(places + row * K + rank, mask=rank < K, other=0)
    value = tl.load(start + place, mask=rank < K, other=0.0).to(tl.float32)
    key = (ordered(value).to(tl.int64) << 32) | (0x7FFFFFFF - place)
    key = tl.where(rank < K, key, -9223372036854775808)
    tl.debug_barrier()
    key = tl.sort(key, descending=True)
    place = 0x7FFFFFFF - (key & 0x7FFFFFFF)
    value = tl.load(start + place, mask=rank < K, other=0.0)
    tl.store(values + row * K + rank, value, mask=rank < K)
    if DECODE:
        tl.store(places + row * K + rank, place % classes, mask=rank < K)
        box = place // classes
        side = tl.arange(0, 4)
        whole = boxes + (row * (columns // classes) + box)[:, None] * 4 + side[None, :]
        corner = tl.load(whole, mask=(rank < K)[:, None], other=0.0)
        tl.store(found + (row * K + rank)[:, None] * 4 + side[None, :], corner, mask=(rank < K)[:, None])
    else:
        tl.store(places + row * K + rank, place, mask=rank < K)
