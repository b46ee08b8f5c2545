"""Read ``.npz`` files as streams: a batch at a time, no pickles, and no more memory than there are bytes."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from optkit.errors import DataError

# What NumPy and zipfile raise on files that are damaged, are something else or lie about their size.
_BROKEN = (
    OSError, ValueError, EOFError, KeyError, SyntaxError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read(path: Path) -> dict[str, np.ndarray]:
    """All arrays of the file by name."""
    with ExitStack() as stack:
        members = _open(path, stack)
        return {name: _rows(path, name, file, header, None) for name, (file, header) in members.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


def _open(path: Path, stack: ExitStack) -> dict[str, tuple[IO[bytes], _Header]]:
    """The arrays of the file by name, each as a stream that stands behind its header."""
    hint = "write it with np.savez(path, name=array)"
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
        members = {}
        for member in archive.namelist():
            if not member.endswith(".npy"):
                raise DataError(f"{path}: {member!r} is not an array", hint=hint)
            file = stack.enter_context(archive.open(member))
            members[member.removesuffix(".npy")] = (
                file,
                _header(file, f"{path}: {member.removesuffix('.npy')!r}"),
            )
    except _BROKEN as error:
        raise DataError(
            f"{path}: not a readable .npz file ({type(error).__name__}: {error})", hint=hint
        ) from error
    if not members:
        raise DataError(f"{path}: no arrays in it", hint=hint)
    return members


def _header(file: IO[bytes], place: str) -> _Header:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"{place} is not a plain array of numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise DataError(
            f"{place} holds Python objects (pickle), which are not loaded", hint="save arrays of numbers"
        )
    if any(d < 0 for d in shape):
        raise DataError(f"{place} has a negative size {shape}")
    return _Header(shape=shape, fortran=fortran, dtype=dtype)


def _rows(path: Path, name: str, file: IO[bytes], header: _Header, rows: int | None) -> np.ndarray:
    """The next ``rows`` along the first axis, or the whole array."""
    shape = header.shape if rows is None else (rows, *header.shape[1:])
    wanted = int(np.prod(shape, dtype=object)) * header.dtype.itemsize
    try:
        data = file.read(wanted)
    except _BROKEN as error:
        raise DataError(f"{path}: {name!r} cannot be read ({type(error).__name__}: {error})") from error
    if len(data) != wanted:
        raise DataError(f"{path}: {name!r} should have {wanted} more bytes and has {len(data)}")
    # Copied, because bytes are read-only and not everything takes read-only arrays.
    return (
        np.frombuffer(data, header.dtype).reshape(shape, order="F" if header.fortran else "C").copy(order="K")
    )


def count_samples(path: Path) -> int:
    """The length of the first axis, which all arrays must agree on."""
    with ExitStack() as stack:
        headers = {name: header for name, (_, header) in _open(path, stack).items()}
    lengths = {name: header.shape[0] if header.shape else None for name, header in headers.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        found = ", ".join(f"{name!r} {list(header.shape)}" for name, header in headers.items())
        raise DataError(
            f"{path}: the first axis counts samples and must be the same for all arrays: {found}",
            hint="put the file in a folder and give the folder: then a file is one batch",
        )
    return next(iter(headers.values())).shape[0]


def cut(path: Path, size: int, count: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """``count`` batches of ``size`` samples along the first axis, each with its place for messages."""
    with ExitStack() as stack:
        members = _open(path, stack)
        # Fortran order has the samples interleaved; such an array is read at once.
        whole = {n: _rows(path, n, file, h, None) for n, (file, h) in members.items() if h.fortran}
        for index in range(count):
            place = f"{path}: batch {index}"
            rows = slice(index * size, (index + 1) * size)
            yield (
                place,
                {
                    n: whole[n][rows] if n in whole else _rows(path, n, file, h, size)
                    for n, (file, h) in members.items()
                },
            )
