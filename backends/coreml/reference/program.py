"""A saved package as plain Python: functions, blocks, operations, values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from optkit.backends.coreml.quiet import MIL_pb2, Model_pb2
from optkit.backends.coreml.reference.blobs import Blobs, unpack
from optkit.errors import ModelError

_FOLDER = "Data/com.apple.CoreML"
# What programs call the file of weights.
_WEIGHTS = "@model_path/weights/weight.bin"

_KINDS = {
    "FLOAT16": np.float16, "FLOAT32": np.float32, "FLOAT64": np.float64, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32,
    "INT64": np.int64, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64, "BOOL": np.bool_,
    "STRING": np.str_,
}  # fmt: skip
# Bits and sign of the types of less than a byte, which are held in a byte each.
_SHORT = {
    "INT4": (4, True), "UINT4": (4, False), "UINT1": (1, False), "UINT2": (2, False), "UINT3": (3, False), "UINT6": (6, False),
}  # fmt: skip
# Where values of a type stand in the program; of the rest as bytes, and integers of two bytes as either.
_FIELDS = {
    "FLOAT32": "floats", "FLOAT64": "doubles", "INT32": "ints", "INT64": "longInts", "BOOL": "bools", "STRING": "strings",
}  # fmt: skip
_EITHER = ("INT16", "UINT16")
# Under which an array of values of less than a byte keeps their type.
_KIND = "MIL"
# Elements of a value that stands in the program, up to which one of its kind is looked for.
_FEW = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Type:
    """Of a value.

    Attributes:
        kind: MIL's name: ``FLOAT16``, ``INT4`` ….
        dtype: How NumPy holds it.
        shape: Sizes; -1 where free. None where even the rank is.
        state: Whether it is kept between runs.
    """

    kind: str
    dtype: Any
    shape: tuple[int, ...] | None
    state: bool = False

    @property
    def short(self) -> bool:
        """Whether its values are of less than a byte."""
        return self.kind in _SHORT

    @property
    def bits(self) -> int:
        """Of one value."""
        return _SHORT[self.kind][0] if self.short else 8 * np.dtype(self.dtype).itemsize if self.dtype else 0

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a value of ``shape`` is of it."""
        return self.shape is None or (
            len(shape) == len(self.shape)
            and all(d in (-1, n) for n, d in zip(shape, self.shape, strict=True))
        )

    def __str__(self) -> str:
        sizes = "[?]" if self.shape is None else str(list(self.shape)).replace("-1", "?")
        return f"{'a state of ' if self.state else ''}{self.kind.lower()}{sizes}"


@dataclass(frozen=True, slots=True)
class Name:
    """A reference to a value."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What an operation gives."""

    name: str
    type: Type


@dataclass(slots=True, kw_only=True)
class Operation:
    """One operation.

    Attributes:
        inputs: By parameter: names, or values that stand in place; several where the parameter takes so many.
        attributes: The same for what is no input, but its name: the value of a constant, and the older compressed constants.
    """

    kind: str
    name: str
    inputs: Mapping[str, Sequence[Any]]
    attributes: Mapping[str, Any]
    outputs: tuple[Output, ...]
    blocks: tuple[Block, ...] = ()

    @property
    def names(self) -> list[str]:
        """Of the values that are its inputs."""
        return [b.name for bindings in self.inputs.values() for b in bindings if isinstance(b, Name)]

    @property
    def is_constant(self) -> bool:
        """Whether it gives the same in every run: a constant, or one that is stored compressed."""
        return self.kind == "const" or self.kind.startswith("constexpr_")

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


@dataclass(slots=True, kw_only=True)
class Block:
    """Operations in order."""

    inputs: list[Output]
    outputs: list[str]
    operations: list[Operation]


@dataclass(slots=True, kw_only=True)
class Function:
    """One function of a program.

    Attributes:
        opset: ``CoreML5`` (iOS 15) and up.
    """

    name: str
    opset: str
    inputs: list[Output]
    block: Block


@dataclass(slots=True, kw_only=True)
class Lazy:
    """A constant in the file of weights."""

    blobs: Blobs
    offset: int
    type: Type

    def check(self) -> None:
        """That the file holds values of its type and count, without reading them.

        Raises:
            ModelError: It does not.
        """
        count, size = math.prod(self.type.shape or ()), self.blobs.raw(self.offset).size
        stored = self.blobs.kind(self.offset)
        if (size, stored) != (-(-count * self.type.bits // 8), self.type.kind):
            raise ModelError(
                f"the blob at {self.offset} holds {size} bytes {stored.lower()}, the program says {self.type}"
            )

    def read(self) -> np.ndarray:
        """Its values; of whole bytes where they lie, without a copy."""
        shape = self.type.shape or ()
        count = math.prod(shape)
        raw = self.blobs.raw(self.offset)
        if self.type.kind in _SHORT:
            bits, signed = _SHORT[self.type.kind]
            return unpack(raw, count, bits, signed=signed).reshape(shape)
        values = raw.view(self.type.dtype)
        if values.size != count:
            raise ModelError(
                f"the blob at {self.offset} holds {values.size} values, the program says {self.type}"
            )
        return np.asarray(values.reshape(shape))


class Package:
    """A saved ``.mlpackage``.

    Attributes:
        spec: The protobuf.
        functions: By name.

    Raises:
        ModelError: It is no package with an ML Program.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / _FOLDER / "model.mlmodel"
        self.spec = Model_pb2.Model()
        try:
            self.spec.ParseFromString(file.read_bytes())
        except OSError as error:
            raise ModelError(f"{path.name}: no model inside: {error}") from error
        except Exception as error:
            raise ModelError(f"{path.name}: the model cannot be read: {error}") from error
        kind = self.spec.WhichOneof("Type")
        if kind != "mlProgram":
            raise ModelError(
                f"{path.name}: holds a {kind or 'model of unknown type'}, and only ML Programs are read"
            )
        self.blobs = Blobs(path / _FOLDER / "weights" / "weight.bin")
        # What is said many times is held once: of a small model the text is more than its weights.
        self._shared: dict[Any, Any] = {}
        self.functions = {name: self._function(name, f) for name, f in self.spec.mlProgram.functions.items()}

    def weights(self) -> dict[str, int]:
        """Bytes of the file of weights by the type of the values, ``float16``, ``uint4`` and so on; of shared ones once."""
        kinds = {w.offset: w.type for f in self.functions.values() for w in _stored(f.block)}
        found: dict[str, int] = {}
        for offset, kind in kinds.items():
            name = "float" if kind.kind == "FLOAT32" else kind.kind.lower()
            found[name] = found.get(name, 0) + self.blobs.raw(offset).size
        return found

    def _function(self, name: str, proto: Any) -> Function:
        if proto.opset not in proto.block_specializations:
            raise ModelError(f"{self.path.name}: function {name!r} has no block for {proto.opset}")
        return Function(
            name=name, opset=proto.opset, inputs=[self._output(v) for v in proto.inputs],
            block=self._block(proto.block_specializations[proto.opset]),
        )  # fmt: skip

    def _block(self, proto: Any) -> Block:
        return Block(
            inputs=[self._output(v) for v in proto.inputs], outputs=[self._once(n) for n in proto.outputs],
            operations=[self._operation(o) for o in proto.operations],
        )  # fmt: skip

    def _operation(self, proto: Any) -> Operation:
        name = proto.outputs[0].name if proto.outputs else proto.type
        try:
            inputs = {self._once(k): [self._binding(b) for b in a.arguments] for k, a in proto.inputs.items()}
            attributes = {self._once(k): self._value(v) for k, v in proto.attributes.items() if k != "name"}
        except ModelError as error:
            raise ModelError(f"{proto.type} {name!r}: {error}") from error
        return Operation(
            kind=self._once(proto.type), name=self._once(name), inputs=inputs, attributes=attributes,
            outputs=tuple(self._output(v) for v in proto.outputs), blocks=tuple(self._block(b) for b in proto.blocks),
        )  # fmt: skip

    def _once(self, value: Any) -> Any:
        """``value``, or the one equal to it that there is."""
        return self._shared.setdefault(value, value)

    def _output(self, proto: Any) -> Output:
        return Output(name=self._once(proto.name), type=self._once(_type(proto.type)))

    def _binding(self, proto: Any) -> Any:
        if proto.WhichOneof("binding") != "name":
            return self._value(proto.value)
        return self._once(Name(self._once(proto.name)))

    def _value(self, proto: Any) -> Any:
        if proto.WhichOneof("value") == "blobFileValue":
            kind = self._once(_type(proto.type))
            if proto.blobFileValue.fileName != _WEIGHTS:
                raise ModelError(
                    f"a value lies in {proto.blobFileValue.fileName!r}, and {_WEIGHTS} is the only file read"
                )
            return Lazy(blobs=self.blobs, offset=proto.blobFileValue.offset, type=kind)
        held = proto.immediateValue
        if held.WhichOneof("value") == "list":
            return [self._value(v) for v in held.list.values]
        if held.WhichOneof("value") != "tensor":
            raise ModelError(f"a value of kind {held.WhichOneof('value')} is not known")
        kind = self._once(_type(proto.type))
        value = _tensor(held.tensor, kind)
        if not isinstance(value, np.ndarray) or value.size > _FEW:
            return value
        value.flags.writeable = False
        return self._shared.setdefault((kind, value.tobytes()), value)


def _stored(block: Block) -> Iterator[Lazy]:
    """Constants of a block, and of those inside of it, that are in the file of weights."""
    for operation in block.operations:
        values = (*operation.attributes.values(), *chain.from_iterable(operation.inputs.values()))
        yield from (v for v in values if isinstance(v, Lazy))
        for inner in operation.blocks:
            yield from _stored(inner)


def _type(proto: Any) -> Type:
    which, state = proto.WhichOneof("type"), False
    if which == "stateType":
        proto, state = proto.stateType.wrappedType, True
        which = proto.WhichOneof("type")
    if which != "tensorType":
        return Type(kind=str(which), dtype=None, shape=None, state=state)
    tensor = proto.tensorType
    kind = MIL_pb2.DataType.Name(tensor.dataType)
    dtype = _KINDS.get(kind, (np.int8 if _SHORT[kind][1] else np.uint8) if kind in _SHORT else None)
    dims = [
        int(d.constant.size) if d.WhichOneof("dimension") == "constant" else -1 for d in tensor.dimensions
    ]
    known = len(dims) == tensor.rank or not tensor.rank
    return Type(kind=kind, dtype=dtype, shape=tuple(dims) if known else None, state=state)


def _tensor(proto: Any, kind: Type) -> Any:
    """A value that stands in the program: a string, or an array."""
    which = proto.WhichOneof("value")
    shape = kind.shape or ()
    if which is not None and which != _FIELDS.get(kind.kind, "bytes") and kind.kind not in _EITHER:
        raise ModelError(f"a value of {which} is declared as {kind}")
    if kind.kind == "STRING":
        strings = list(proto.strings.values)
        return strings[0] if not shape else strings
    if which == "bytes":
        raw = np.frombuffer(proto.bytes.values, np.uint8)
        if kind.kind in _SHORT:
            bits, signed = _SHORT[kind.kind]
            held = np.dtype(kind.dtype, metadata={_KIND: kind.kind})
            return unpack(raw, math.prod(shape), bits, signed=signed).reshape(shape).view(held)
        if raw.nbytes != math.prod(shape) * np.dtype(kind.dtype).itemsize:
            raise ModelError(f"{raw.nbytes} bytes are declared as {kind}")
        return raw.view(kind.dtype).reshape(shape)
    values = list(getattr(proto, which).values) if which is not None else []
    # A single zero may be left out.
    if not values and math.prod(shape) == 1:
        values = [0]
    array = np.asarray(values, kind.dtype)
    if array.size != math.prod(shape):
        raise ModelError(f"a value of {array.size} elements is declared as {kind}")
    return array.reshape(shape)


def kind_of(array: np.ndarray) -> str:
    """MIL's name of the type of a value that stands in the program."""
    told = array.dtype.metadata
    return str(told[_KIND]) if told else next(k for k, v in _KINDS.items() if v == array.dtype.type)
