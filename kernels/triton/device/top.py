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
def sort_key(value, place):
    """64 bits that are larger for a larger number, and of equal ones for the first."""
    return (ordered(value).to(tl.int64) << 32) | (0x7FFFFFFF - place)


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
    the row, and read again by all threads, to count what stands before each. ``DECODE``: a place is a box and one of ``classes``; both leave instead of it.
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
    slot = tl.arange(0, KEPT)
    chosen = slot < K
    place = tl.load(places + row * K + slot, mask=chosen, other=0)
    value = tl.load(start + place, mask=chosen, other=0.0)
    key = sort_key(value.to(tl.float32), place)
    # Keys are all different: as many stand before one as are larger.
    rank = tl.zeros((KEPT,), tl.int32)
    few = tl.arange(0, 16)
    for k in range(0, K, 16):
        other = tl.load(places + row * K + k + few, mask=few < K - k, other=0)
        against = sort_key(tl.load(start + other, mask=few < K - k, other=0.0).to(tl.float32), other)
        larger = (against[None, :] > key[:, None]) & (few < K - k)[None, :]
        rank += tl.sum(larger.to(tl.int32), axis=1)
    tl.debug_barrier()
    to = row * K + rank
    tl.store(values + to, value, mask=chosen)
    if DECODE:
        tl.store(places + to, place % classes, mask=chosen)
        side = tl.arange(0, 4)
        box = boxes + (row * (columns // classes) + place // classes)[:, None] * 4 + side[None, :]
        corner = tl.load(box, mask=chosen[:, None], other=0.0)
        tl.store(found + to[:, None] * 4 + side[None, :], corner, mask=chosen[:, None])
    else:
        tl.store(places + to, place, mask=chosen)
