"""A ``.tflite`` file under construction: the tables of its schema, with constants shared by all subgraphs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from optkit.backends.litert.kernels import check
from optkit.errors import ModelError

Shape = tuple[int, ...]
# Name of a table of options in the schema, and its fields.
Settings = tuple[str, Mapping[str, Any]]

_TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int8": schema.TensorType.INT8,
    "uint8": schema.TensorType.UINT8,
    "int16": schema.TensorType.INT16,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
    "bool": schema.TensorType.BOOL,
}
# The version of an operator with integers, as tensorflow/compiler/mlir/lite/tools/versioning/op_version.cc has it; else 1.
_INTEGER_VERSIONS = {
    "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4, "TRANSPOSE_CONV": 2, "ADD": 2, "SUB": 2, "MUL": 2,
    "AVERAGE_POOL_2D": 2, "MAX_POOL_2D": 2, "CONCATENATION": 2, "MEAN": 2, "PAD": 2, "TRANSPOSE": 2, "DEQUANTIZE": 2,
    "STRIDED_SLICE": 2,
}  # fmt: skip
_HALF_VERSIONS = {"DEQUANTIZE": 3}
_PRODUCTS = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL", "TRANSPOSE_CONV"})
# Operators that started later than at 1.
_VERSIONS = {"BROADCAST_TO": 2}
# An operator code above this is not in the byte that old files have for it.
_OLD_CODES = 127
# The largest offset that a flatbuffer can hold.
_LARGEST = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Integers stand for ``scale * (q - zero)``.

    Attributes:
        scale: One number, or one for each position of ``axis``.
    """

    scale: np.ndarray
    zero: np.ndarray
    axis: int = 0

    def same(self, other: Grid) -> bool:
        """Whether integers mean the same on both."""
        return np.array_equal(self.scale, other.scale) and np.array_equal(self.zero, other.zero)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor of a subgraph; ``index`` is -1 for an operand that is left out."""

    index: int
    shape: Shape
    dtype: np.dtype[Any]
    grid: Grid | None = None


NOTHING = Tensor(index=-1, shape=(), dtype=np.dtype(np.float32))


class File:
    """The file: operator codes, buffers, subgraphs and their signatures."""

    def __init__(self) -> None:
        self._model = schema.ModelT()
        self._model.version, self._model.description = 3, "optkit"
        self._model.operatorCodes, self._model.subgraphs, self._model.signatureDefs = [], [], []
        # The first buffer is the empty one of tensors that are computed.
        self._model.buffers = [schema.BufferT()]
        self._codes: dict[tuple[str, int], int] = {}
        self._buffers: dict[bytes, int] = {}

    def code(self, name: str, kinds: Set[str]) -> int:
        """Index of an operator with elements of these types."""
        versions = (
            _HALF_VERSIONS if "float16" in kinds else _INTEGER_VERSIONS if "int8" in kinds else _VERSIONS
        )
        version = versions.get(name, 1)
        key = (name, version)
        if key not in self._codes:
            made = schema.OperatorCodeT()
            made.builtinCode, made.version = getattr(schema.BuiltinOperator, name), version
            made.deprecatedBuiltinCode = min(made.builtinCode, _OLD_CODES)
            self._codes[key] = len(self._model.operatorCodes)
            self._model.operatorCodes.append(made)
        return self._codes[key]

    def buffer(self, array: np.ndarray) -> int:
        """Index of the buffer with these bytes; equal ones are stored once."""
        data = np.ascontiguousarray(array)
        key = hashlib.sha256(data.tobytes()).digest()
        if key not in self._buffers:
            made = schema.BufferT()
            made.data = data.reshape(-1).view(np.uint8)
            self._buffers[key] = len(self._model.buffers)
            self._model.buffers.append(made)
        return self._buffers[key]

    def add(
        self, graph: Graph, key: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        """Take in a finished subgraph under a signature."""
        table = graph.table
        table.inputs = [t.index for t in inputs.values()]
        table.outputs = [t.index for t in outputs.values()]
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = key, len(self._model.subgraphs)
        signature.inputs, signature.outputs = _maps(inputs), _maps(outputs)
        self._model.subgraphs.append(table)
        self._model.signatureDefs.append(signature)

    def bytes(self) -> bytes:
        """The flatbuffer.

        Raises:
            ModelError: It is larger than its offsets reach.
        """
        size = sum(b.data.nbytes for b in self._model.buffers if b.data is not None)
        if size >= _LARGEST:
            raise ModelError(
                f"the weights take {size} bytes, and a .tflite file holds less than {_LARGEST}",
                hint="quantize the weights",
            )
        builder = flatbuffers.Builder(size + 2**20)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def _maps(tensors: Mapping[str, Tensor]) -> list[Any]:
    made = []
    for name, tensor in tensors.items():
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name, tensor.index
        made.append(entry)
    return made


class Graph:
    """A subgraph under construction; operators are added in the order in which they run."""

    def __init__(self, file: File, name: str) -> None:
        self._file = file
        self.table = schema.SubGraphT()
        self.table.name, self.table.tensors, self.table.operators = name, [], []
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        self._products: list[tuple[str, bool]] = []

    def tensor(
        self, name: str, shape: Sequence[int], dtype: Any, grid: Grid | None = None, buffer: int = 0
    ) -> Tensor:
        """A tensor; without a buffer, one that is computed."""
        kind = np.dtype(dtype)
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name, list(shape), _TYPES[kind.name], buffer
        made.hasRank = True
        if grid is not None:
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale = np.atleast_1d(grid.scale).astype(np.float32)
            made.quantization.zeroPoint = np.atleast_1d(grid.zero).astype(np.int64)
            made.quantization.quantizedDimension = grid.axis
        self.table.tensors.append(made)
        return Tensor(index=len(self.table.tensors) - 1, shape=tuple(map(int, shape)), dtype=kind, grid=grid)

    def constant(self, array: np.ndarray, name: str = "constant", grid: Grid | None = None) -> Tensor:
        """A tensor that is stored."""
        buffer = self._file.buffer(array)
        key = (
            buffer,
            array.shape,
            array.dtype.name,
            None if grid is None else (grid.scale.tobytes(), grid.axis),
        )
        if key not in self._constants:
            self._constants[key] = self.tensor(name, array.shape, array.dtype, grid, buffer)
        return self._constants[key]

    def op(
        self, code: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], settings: Settings | None = None
    ) -> None:
        """An operator.

        Raises:
            NotTakenError: Its kernel does not take these inputs.
        """
        check(code, inputs)
        made = schema.OperatorT()
        kinds = {t.dtype.name for t in (*inputs, *outputs) if t is not NOTHING}
        made.opcodeIndex = self._file.code(code, kinds)
        if code in _PRODUCTS:
            self._products.append((self.table.tensors[outputs[0].index].name, outputs[0].dtype == np.int8))
        made.inputs, made.outputs = [t.index for t in inputs], [t.index for t in outputs]
        if settings is not None:
            kind, fields = settings
            made.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            made.builtinOptions = getattr(schema, f"{kind}T")()
            for field, value in fields.items():
                setattr(made.builtinOptions, field, value)
        self.table.operators.append(made)

    def products(self, *, integers: bool) -> list[str]:
        """Names of what products make, those from integers to integers or the others."""
        return [name for name, eight in self._products if eight == integers]
