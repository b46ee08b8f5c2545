"""The file of weights: MIL's blob storage, version 2, read by its layout.

A header of 64 bytes (count, version), then for each blob a record of 64 bytes (a sentinel, type, size, offset of the data)
at the offset that the program names. Values of less than a byte are packed from the lowest bit on.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from optkit.errors import ModelError

_SENTINEL = 0xDEADBEEF
# What a record says of the type of its values; found by what coremltools' own writer writes.
_TYPES = {
    1: "FLOAT16", 2: "FLOAT32", 3: "UINT8", 4: "INT8", 6: "INT16", 7: "UINT16", 8: "INT4", 9: "UINT1", 10: "UINT2", 11: "UINT4",
    12: "UINT3", 13: "UINT6", 14: "INT32", 15: "UINT32",
}  # fmt: skip


def unpack(data: np.ndarray, count: int, bits: int, *, signed: bool) -> np.ndarray:
    """The first ``count`` fields of ``bits`` bits in ``data``."""
    if data.size * 8 < count * bits:
        raise ModelError(f"{count} values of {bits} bits do not fit into {data.size} bytes")
    spread = np.unpackbits(np.asarray(data, np.uint8), bitorder="little", count=count * bits).reshape(
        count, bits
    )
    weights = (1 << np.arange(bits)).astype(np.uint8)
    values = (spread * weights).sum(1, dtype=np.uint8)
    if not signed:
        return values
    wide = values.astype(np.int16)
    return np.where(wide >= 1 << (bits - 1), wide - (1 << bits), wide).astype(np.int8)


class Blobs:
    """A file of weights; nothing is read before it is asked for.

    Raises:
        ModelError: It is no blob storage of version 2.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._data: np.ndarray | None = None
        if file.is_file() and file.stat().st_size:
            # As a plain array, whose slices are smaller things than those of one that knows its file.
            self._data = np.memmap(file, np.uint8, "r").view(np.ndarray)
        if self._data is not None:
            if self._data.size < 64:
                raise ModelError(f"{file.name}: {self._data.size} bytes are not a file of weights")
            _, version = struct.unpack_from("<II", self._data.data, 0)
            if version != 2:
                raise ModelError(f"{file.name}: blob storage of version {version}, and version 2 is known")

    def raw(self, offset: int) -> np.ndarray:
        """The bytes of the blob whose record is at ``offset``.

        Raises:
            ModelError: There is no record, or it points outside the file.
        """
        data, _, start, size = self._record(offset)
        return data[start : start + size]

    def kind(self, offset: int) -> str:
        """MIL's name of the type of the values whose record is at ``offset``.

        Raises:
            ModelError: As of ``raw``.
        """
        _, kind, _, _ = self._record(offset)
        return _TYPES.get(kind, f"of type {kind}")

    def _record(self, offset: int) -> tuple[np.ndarray, int, int, int]:
        """The file, and of a blob type, start and size."""
        data = self._data
        if data is None or offset < 0 or offset + 64 > data.size:
            raise ModelError(f"{self._file.name}: no blob at {offset}")
        sentinel, kind, size, start = struct.unpack_from("<IIQQ", data.data, offset)
        if sentinel != _SENTINEL:
            raise ModelError(f"{self._file.name}: no record of a blob at {offset}")
        if start % 64 or start + size > data.size:
            raise ModelError(f"{self._file.name}: the blob at {offset} lies outside the file")
        return data, kind, start, size
