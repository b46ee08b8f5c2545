"""Protobuf's wire format, as far as it is written by hand: tensors too large to go through its library."""

from __future__ import annotations


def varint(number: int) -> bytes:
    """A number, 7 bits a byte, lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


def tag(field: int) -> bytes:
    """What a length-delimited field starts with."""
    return varint(field << 3 | 2)
