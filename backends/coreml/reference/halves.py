"""float16 as it is computed with: rounded to its numbers, and widened from its bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# In float32: the bits of the sign and of the exponent, the largest of float16's exponents, and what is added to one for 1.5 times
# 2^13 times as much.
_SIGN, _EXPONENT, _LAST, _ABOVE = (np.uint32(n) for n in (0x80000000, 0x7F800000, 0x47000000, 0x06C00000))
# Added to a power of two it leads up to float16's smallest normal one, 2^-14, where it is smaller, and to no other where it is not. Below
# 2^-37 it does not, and what is so small is 0 either way.
_RISE = np.float32(2.0**-14 - 2.0**-37)
# Elements at a time, so that what is between stays in cache and takes no memory to speak of; and where room is scarce.
_PIECE, _LEAST = 1 << 16, 1 << 13


def halves(
    array: np.ndarray, *, place: bool = False, clip: Callable[..., Any] | None = None, positive: bool = False,
    small: bool = False, room: int = 2 * _PIECE,
) -> np.ndarray:  # fmt: skip
    """Rounded to float16's numbers, to nearest with ties to even, and kept in float32, which is what is computed with.

    Converting there and back one element at a time took more than the arithmetic; here the bits of many are rounded at once.

    Args:
        place: Whether the result may take the place of ``array``.
        clip: Done before with each piece, which it writes to ``out``.
        positive: Whether what is rounded is at least 0.
        small: Whether it is far from what rounds to infinity, or is none.
        room: Elements that may be held beside.
    """
    wide = np.ascontiguousarray(array, np.float32)
    result = wide if place or not np.may_share_memory(wide, array) else np.empty_like(wide)
    source, rounded = wide.reshape(-1), result.reshape(-1)
    piece = min(wide.size, _PIECE, max(_LEAST, room // 2))
    spare = np.empty((2, piece), np.uint32)
    for start in range(0, wide.size, piece):
        some, there = source[start : start + piece], rounded[start : start + piece]
        if clip is not None:
            some = clip(some, out=there)
        _round(some, there, spare, positive=positive, small=small)
    return result.reshape(np.shape(array))


def _round(wide: np.ndarray, place: np.ndarray, spare: np.ndarray, *, positive: bool, small: bool) -> None:
    """Adding 1.5 times what is 13 powers of two above a number leaves float32 as many bits for it as float16 has.

    ``place`` may be ``wide`` itself.
    """
    bits, rounded = wide.view(np.uint32), place.view(np.uint32)
    far, sign = spare[:, : wide.size]
    above = far.view(np.float32)
    np.bitwise_and(bits, _EXPONENT, out=far)
    if not small and np.maximum.reduce(far) >= _LAST:
        place[:] = wide.astype(np.float16)
        return
    # NumPy takes longer to find the larger one.
    np.add(above, _RISE, out=above)
    np.bitwise_and(far, _EXPONENT, out=far)
    np.add(far, _ABOVE, out=far)
    if not positive:
        np.bitwise_and(bits, _SIGN, out=sign)
    np.add(wide, above, out=place)
    np.subtract(place, above, out=place)
    if not positive:
        # Zeros keep their signs.
        np.bitwise_or(rounded, sign, out=rounded)


# A float16's bits moved to where float32 has them are the number without what their exponents begin at.
_SHIFT, _SIGN_AND_REST, _BIAS = 13, np.int32(-0x70000001), np.float32(2.0**112)
_UNENDING = np.int16(0x7C00)


def widened(array: np.ndarray, *, finite: bool = False) -> np.ndarray:
    """float16 in float32, faster than NumPy converts.

    Args:
        finite: Whether it is known to be; else it is looked at first.
    """
    narrow = np.ascontiguousarray(array).reshape(-1)
    result = np.empty(narrow.size, np.float32)
    for start in range(0, narrow.size, _PIECE):
        some, place = narrow[start : start + _PIECE], result[start : start + _PIECE]
        bits = some.view(np.int16)
        if not finite and np.maximum.reduce(bits & _UNENDING) == _UNENDING:
            place[:] = some
            continue
        moved = place.view(np.int32)
        moved[:] = bits
        moved <<= _SHIFT
        moved &= _SIGN_AND_REST
        place *= _BIAS
    return result.reshape(array.shape)


def is_finite(array: np.ndarray) -> bool:
    """Of float16."""
    bits = np.ascontiguousarray(array).reshape(-1).view(np.int16)
    # Small ones: it is asked while a program is read, when nothing else takes as much memory.
    pieces = (bits[start : start + _LEAST] for start in range(0, bits.size, _LEAST))
    return all(np.maximum.reduce(piece & _UNENDING) != _UNENDING for piece in pieces)


def wide(array: np.ndarray) -> np.ndarray:
    """Weights in float32, which in float16 are finite."""
    return widened(array, finite=True) if array.dtype == np.float16 else array
