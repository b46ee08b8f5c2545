"""Weights of a GGUF file as float32, for the number formats that the files here have.

The layout is that of the specification in ``ggml``'s repository, version 3: a header, key and value pairs, a table of tensors, and
behind it their bytes. Q4_1 and Q8_0 are blocks of 32 numbers: a scale in float16, with Q4_1 the smallest value after it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from optkit.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOAT, _Q4_1, _Q8_0 = 0, 3, 8
# Bytes of a block of 32 numbers, or of a number.
_BYTES = {_FLOAT: (1, 4), _Q4_1: (32, 20), _Q8_0: (32, 34)}


def read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, np.ndarray]]:
    """The pairs, and the tensors with the axis that changes slowest first.

    Raises:
        ModelError: It is no GGUF file, or has numbers of another format.
    """
    with path.open("rb") as file:
        magic, _, tensors, pairs = struct.unpack("<4sIQQ", file.read(24))
        if magic != b"GGUF":
            raise ModelError(f"{path.name}: no GGUF file")
        known = {}
        for _ in range(pairs):
            key = _text(file)
            known[key] = _value(file, _number(file, "I"))
        table = []
        for _ in range(tensors):
            name, axes = _text(file), _number(file, "I")
            sizes = [_number(file, "Q") for _ in range(axes)]
            table.append((name, sizes[::-1], _number(file, "I"), _number(file, "Q")))
        step = int(known.get("general.alignment", 32))
        begin = -(-file.tell() // step) * step
    data = np.memmap(path, np.uint8, "r", offset=begin)
    return known, {name: _tensor(path, data[at:], shape, kind) for name, shape, kind, at in table}


def _number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "Q")).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner, count = _number(file, "I"), _number(file, "Q")
        return [_value(file, inner) for _ in range(count)]
    return _number(file, _SCALARS[kind])


def _tensor(path: Path, data: np.ndarray, shape: list[int], kind: int) -> np.ndarray:
    if kind not in _BYTES:
        raise ModelError(f"{path.name}: numbers of format {kind} are not read, only float32, Q4_1 and Q8_0")
    numbers, size = _BYTES[kind]
    blocks = data[: int(np.prod(shape)) // numbers * size].reshape(-1, size)
    if kind == _FLOAT:
        return np.ascontiguousarray(blocks).view(np.float32).reshape(shape)
    scale = _half(blocks, 0)
    floats: np.ndarray
    if kind == _Q8_0:
        floats = blocks[:, 2:].view(np.int8) * scale
    else:
        codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        floats = codes * scale + _half(blocks, 2)
    return floats.astype(np.float32).reshape(shape)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)
