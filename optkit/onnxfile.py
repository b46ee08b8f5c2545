"""Read an ONNX file without copying its weights, and without trusting it.

The file is mapped. A small protobuf walk cuts the large tensors out before the rest is parsed, so that weights inside the
file cost as little memory as weights beside it: both end up as arrays over the mapping.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from optkit.errors import ModelError, UsageError
from optkit.protobuf import tag, varint

# Smaller tensors are parsed with the graph.
_SMALL = 1024
# The key of an external_data entry that says: not a file, but the nth range cut out of this one.
_CUT = "optkit.cut"
# Protobuf readers give up at this depth as well.
_DEPTH = 100
# Beyond these a file without its large tensors is a trap: parsed, it takes many times its size.
_LARGEST_SKELETON = 1 << 30
_MOST_NODES = 2_000_000

# Which fields of a message hold which message, as far as tensors may be inside (onnx.proto).
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}

_SIGNATURES = (
    (b"PK\x03\x04", "a zip archive (a PyTorch, Keras or NumPy file?)"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"\x89HDF", "an HDF5 file (Keras?)"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<!DOCTYPE", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<?xml", "an XML file (OpenVINO?)"),
)


def read(source: Path | bytes, *, name: str, unsafe: bool = False) -> ir.Model:
    """The model as it is in the file, structure and sizes checked; operators are not looked at.

    Args:
        source: The file or its bytes.
        name: For messages.
        unsafe: Also follow external data out of the folder of the file.

    Raises:
        ModelError: Says what is wrong, and where.
    """
    data, folder = (
        _map_model(source, name) if isinstance(source, Path) else (np.frombuffer(source, np.uint8), None)
    )
    if not data.size:
        raise ModelError(f"{name}: the file is empty")
    head = bytes(data[:64])
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            raise ModelError(
                f"{name}: this is {kind}, not an ONNX model", hint="export the model to ONNX first"
            )
    if head[4:8] == b"TFL3":
        raise ModelError(
            f"{name}: this is a TensorFlow Lite file, not an ONNX model", hint="convert it with tf2onnx first"
        )
    cutter = _Cutter(data, name)
    proto, skeleton = onnx.ModelProto(), cutter.skeleton()
    if len(skeleton) > _LARGEST_SKELETON:
        raise ModelError(
            f"{name}: {len(skeleton)} bytes without its large tensors", hint="keep weights as raw_data"
        )
    try:
        proto.ParseFromString(skeleton)
    except DecodeError as error:
        raise _not_onnx(name, str(error)) from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise _not_onnx(name, "no graph or no operator set in it")
    for entry in (*proto.opset_import, *(entry for f in proto.functions for entry in f.opset_import)):
        # Beyond 32 bits ONNX's own tables cannot be asked.
        if not 0 < entry.version < 2**31:
            raise _not_onnx(name, f"version {entry.version} of operator domain {entry.domain!r}")
    _check_text(proto, name)
    tensors = _Tensors(cutter, folder, name, unsafe)
    if folder is not None and isinstance(source, Path):
        tensors.roots.append(os.path.realpath(source.parent))
        # A model that is itself a link has its data beside what it links to, as in the cache of Hugging Face.
        tensors.roots.append(os.path.dirname(os.path.realpath(source)))
    _check_model(proto, tensors, name)
    try:
        model = ir.serde.deserialize_model(proto)
    except (
        ir.serde.SerdeError,
        ValueError,
        TypeError,
        RuntimeError,
        NotImplementedError,
        AssertionError,
        KeyError,
    ) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(
            f"{name}: {str(cause).splitlines()[0] if str(cause) else type(cause).__name__}"
        ) from error
    tensors.place(model)
    return model


def _not_onnx(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name}: not an ONNX model, or damaged ({why})", hint="check that the download or export finished"
    )


def _map(path: Path, place: str) -> tuple[np.ndarray, os.stat_result]:
    """The bytes of a regular file, mapped; a later replacement of the file does not change them."""
    try:
        # Opening a pipe would wait for its other end; a pipe is no regular file.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"{place}: cannot be opened: {reason}") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{place}: not a regular file")
        if not status.st_size:
            return np.empty(0, np.uint8), status
        return np.frombuffer(mmap.mmap(handle, 0, access=mmap.ACCESS_READ), np.uint8), status
    except OSError as error:
        raise ModelError(f"{place}: cannot be mapped: {error.strerror}") from error
    finally:
        os.close(handle)


def _map_model(path: Path, name: str) -> tuple[np.ndarray, Path]:
    if path.is_dir():
        found = sorted(p.name for p in path.glob("*.onnx"))
        hint = f"did you mean {path / found[0]}?" if found else None
        raise UsageError(f"{path} is a folder, not an ONNX file", hint=hint)
    if not os.path.lexists(path):
        raise UsageError(f"{path}: no such file")
    return _map(path, name)[0], path.parent


class _Damaged(ValueError):
    pass


@dataclass(slots=True)
class _Cutter:
    """Copies a serialized model without the bytes of its large tensors, whose ranges it notes in ``cuts``."""

    data: np.ndarray
    name: str
    cuts: list[tuple[int, int]] = field(default_factory=list)
    view: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.view = memoryview(self.data.data)

    def skeleton(self) -> bytes:
        try:
            return self._message(0, self.data.size, "model", 0)
        except _Damaged as error:
            raise _not_onnx(self.name, str(error)) from None

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        result, data = 0, self.view
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = data[at]
            at += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result, at
        raise _Damaged(f"broken or cut off at byte {at}")

    def _fields(self, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
        """``(number, wire type, start of the key, start of the content, end)`` of each field."""
        while at < end:
            start = at
            key, at = self._varint(at, end)
            number, wire = key >> 3, key & 7
            content = at
            if wire == 0:
                _, at = self._varint(at, end)
            elif wire == 1:
                at += 8
            elif wire == 5:
                at += 4
            elif wire == 2:
                length, content = self._varint(at, end)
                at = content + length
            else:
                raise _Damaged(f"unknown field at byte {start}")
            if at > end or number == 0:
                raise _Damaged(f"broken or cut off at byte {start} of {self.data.size}")
            yield number, wire, start, content, at

    def _message(self, at: int, end: int, kind: str, depth: int) -> bytes:
        if depth > _DEPTH:
            raise _Damaged("nested too deeply")
        if kind == "tensor":
            return self._tensor(at, end)
        parts, kept, inner = [], at, _MESSAGES[kind]
        for number, wire, start, content, stop in self._fields(at, end):
            if wire == 2 and number in inner and stop - content > _SMALL:
                body = self._message(content, stop, inner[number], depth + 1)
                parts += [self.data[kept:start].tobytes(), tag(number), varint(len(body)), body]
                kept = stop
        parts.append(self.data[kept:end].tobytes())
        return b"".join(parts)

    def _tensor(self, at: int, end: int) -> bytes:
        fields = list(self._fields(at, end))
        kinds = [
            self._varint(content, stop)[0]
            for number, wire, _, content, stop in fields
            if (number, wire) == (2, 0)
        ]
        # raw_data; packed float_data and double_data have the same bytes as raw ones.
        number = {1: 4, 11: 10}.get(kinds[-1] if kinds else 0)
        large = [f for f in fields if f[1] == 2 and f[0] in (9, number) and f[4] - f[3] > _SMALL]
        # More than one would have to be joined: rare, and protobuf does it.
        if len(large) != 1 or sum(f[0] in (4, 9, 10) for f in fields) != 1:
            return self.data[at:end].tobytes()
        _, _, start, content, stop = large[0]
        entry: bytes = onnx.StringStringEntryProto(key=_CUT, value=str(len(self.cuts))).SerializeToString()
        self.cuts.append((content, stop))
        reference = tag(13) + varint(len(entry)) + entry + varint(14 << 3) + b"\x01"
        return self.data[at:start].tobytes() + self.data[stop:end].tobytes() + reference


# The repeated field that holds the elements of a type, and how many entries an element takes.
_FIELDS = {
    ir.DataType.FLOAT: ("float_data", 1),
    ir.DataType.COMPLEX64: ("float_data", 2),
    ir.DataType.DOUBLE: ("double_data", 1),
    ir.DataType.COMPLEX128: ("double_data", 2),
    ir.DataType.INT64: ("int64_data", 1),
    ir.DataType.UINT32: ("uint64_data", 1),
    ir.DataType.UINT64: ("uint64_data", 1),
    ir.DataType.STRING: ("string_data", 1),
}


class _Tensors:
    """Checks the tensors of a model against the bytes there are, and puts arrays over the mapping in their place."""

    def __init__(self, cutter: _Cutter, folder: Path | None, name: str, unsafe: bool) -> None:
        self._cutter, self._folder, self._name, self._unsafe = cutter, folder, name, unsafe
        # Folders that links may lead into.
        self.roots: list[str] = []
        self.nodes = 0
        self._files: dict[str, np.ndarray] = {}
        # What ``check`` found, by the location that it leaves in the tensor.
        self._ranges: list[np.ndarray] = []

    def check(self, proto: onnx.TensorProto, place: str) -> None:
        """Compare sizes. Data that is elsewhere is looked up here and referred to by number."""
        label = (
            f"{self._name}: tensor {proto.name!r} of {place}"
            if proto.name
            else f"{self._name}: tensor of {place}"
        )
        try:
            dtype = ir.DataType(proto.data_type)
        except ValueError:
            raise ModelError(f"{label}: unknown element type {proto.data_type}") from None
        if dtype == ir.DataType.UNDEFINED:
            raise ModelError(f"{label}: no element type")
        if any(d < 0 for d in proto.dims):
            raise ModelError(f"{label}: negative size in {list(proto.dims)}")
        count = 1
        for d in proto.dims:
            count *= d
        if proto.HasField("segment"):
            raise ModelError(f"{label}: stored in segments, which no exporter writes")
        if proto.data_location == onnx.TensorProto.EXTERNAL or proto.external_data:
            if dtype == ir.DataType.STRING:
                raise ModelError(f"{label}: strings cannot be outside the file")
            self._look_up(proto, -(-count * dtype.bitwidth // 8), label)
            return
        if proto.HasField("raw_data") and dtype != ir.DataType.STRING:
            expected, found = -(-count * dtype.bitwidth // 8), len(proto.raw_data)
        else:
            name, entries = _FIELDS.get(dtype, ("int32_data", 1))
            expected, found = count * entries, len(getattr(proto, name))
            if dtype != ir.DataType.STRING and dtype.bitwidth < 8:
                expected = -(-count * dtype.bitwidth // 8)
        if expected != found:
            raise ModelError(
                f"{label}: shape {list(proto.dims)} needs {expected} bytes or entries, {found} are there"
            )

    def _look_up(self, proto: onnx.TensorProto, size: int, label: str) -> None:
        entries = {entry.key: entry.value for entry in proto.external_data}
        if _CUT in entries:
            if not entries[_CUT].isdecimal() or int(entries[_CUT]) >= len(self._cutter.cuts):
                raise ModelError(f"{label}: no location of its data")
            start, stop = self._cutter.cuts[int(entries[_CUT])]
            if stop - start != size:
                raise ModelError(
                    f"{label}: shape {list(proto.dims)} needs {size} bytes, {stop - start} are there"
                )
            found = self._cutter.data[start:stop]
        else:
            found = self._external(entries, size, label)
        proto.ClearField("external_data")
        proto.external_data.add(key="location", value=str(len(self._ranges)))
        self._ranges.append(found)

    def _external(self, entries: dict[str, str], size: int, label: str) -> np.ndarray:
        location = entries.get("location", "")
        numbers = {
            key: entries.get(key, default) for key, default in (("offset", "0"), ("length", str(size)))
        }
        for key, text in numbers.items():
            if not (text.isascii() and text.isdecimal() and len(text) < 20):
                raise ModelError(f"{label}: {key} {text!r} of its external data is not a number of bytes")
        offset, length = int(numbers["offset"]), int(numbers["length"])
        if length != size:
            raise ModelError(f"{label}: its shape needs {size} bytes, the entry says {length}")
        if self._folder is None:
            raise ModelError(
                f"{label}: its data is in a file beside the model ({location!r})",
                hint="give the path of the model, not its bytes",
            )
        data = self._open(location, label)
        if offset + length > data.size:
            raise ModelError(
                f"{label}: bytes {offset} to {offset + length} of {location!r}, which has {data.size}"
            )
        return data[offset : offset + length]

    def _open(self, location: str, label: str) -> np.ndarray:
        if location in self._files:
            return self._files[location]
        assert self._folder is not None
        place = f"{label}: external data {location!r}"
        hint = "keep the data in the folder of the model; if you trust the file, allow it with --unsafe-load"
        pure = Path(location)
        if not location or "\0" in location:
            raise ModelError(f"{label}: no location of its data")
        if not self._unsafe and (
            pure.is_absolute() or ".." in pure.parts or "\\" in location or ":" in location
        ):
            raise ModelError(f"{place} is not below the folder of the model", hint=hint)
        path = self._folder / location
        if not path.exists():
            raise ModelError(
                f"{place}: no such file in {self._folder}", hint="copy it there together with the model"
            )
        resolved = Path(os.path.realpath(path))
        if not self._unsafe and not any(resolved.is_relative_to(root) for root in self.roots):
            raise ModelError(f"{place} is a link that leads out of the folder of the model", hint=hint)
        data, status = _map(resolved, place)
        if not self._unsafe and status.st_nlink > 1:
            raise ModelError(f"{place} has another name elsewhere (a hard link)", hint=hint)
        self._files[location] = data
        return data

    def take(self, tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        """The tensor over the mapping that ``tensor`` describes."""
        entries = {"location": str(tensor.location), "offset": str(tensor.offset or 0)}
        if tensor.length is not None:
            entries["length"] = str(tensor.length)
        data = self._external(entries, tensor.nbytes, f"{self._name}: tensor {tensor.name!r}")
        return _over(data, tensor)

    def place(self, model: ir.Model) -> None:
        """Replace the references that ``check`` left by tensors."""
        for graph in (model.graph, *(f.graph for f in model.functions.values())):
            for scope in (graph, *graph.subgraphs()):
                for value in scope.initializers.values():
                    if isinstance(value.const_value, ir.ExternalTensor):
                        value.const_value = self._tensor(value.const_value)
                for node in scope:
                    for attribute in tuple(node.attributes.values()):
                        self._place_attribute(node, attribute)

    def _place_attribute(self, node: ir.Node, attribute: ir.Attr) -> None:
        if attribute.is_ref():
            return
        if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, self._tensor(attribute.value))
        elif attribute.type == ir.AttributeType.TENSORS:
            tensors = [
                self._tensor(t) if isinstance(t, ir.ExternalTensor) else t for t in attribute.as_tensors()
            ]
            node.attributes[attribute.name] = ir.AttrTensors(attribute.name, tensors)

    def _tensor(self, reference: ir.ExternalTensor) -> ir.TensorProtocol:
        return _over(self._ranges[int(str(reference.location))], reference)


def _over(data: np.ndarray, like: ir.TensorProtocol) -> ir.TensorProtocol:
    """A tensor over ``data`` with the type, shape and name of ``like``."""
    shape, dtype = like.shape.numpy(), like.dtype
    if dtype.bitwidth < 8:
        return ir.PackedTensor(data, dtype, shape=shape, name=like.name, doc_string=like.doc_string)
    array = data.view(np.dtype(dtype.numpy())).reshape(shape)
    return ir.Tensor(array, dtype=dtype, shape=ir.Shape(shape), name=like.name, doc_string=like.doc_string)


def map_external(model: ir.Model, *, name: str, unsafe: bool = False) -> None:
    """Replace tensors that are in files, as ``onnx_ir.load`` makes them, by arrays over these files, checked alike."""
    folders: dict[str, _Tensors] = {}
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        for scope in (graph, *graph.subgraphs()):
            for value in scope.initializers.values():
                tensor = value.const_value
                if tensor is None:
                    raise ModelError(f"{name}: initializer {value.name!r} has no data")
                if isinstance(tensor, ir.ExternalTensor):
                    base = str(tensor.base_dir) or "."
                    if base not in folders:
                        # Without a folder, the path is the caller's own.
                        nothing = _Cutter(np.empty(0, np.uint8), name)
                        folders[base] = _Tensors(
                            nothing, Path(base), name, unsafe or not str(tensor.base_dir)
                        )
                        folders[base].roots.append(os.path.realpath(base))
                    value.const_value = folders[base].take(tensor)


def _check_model(proto: onnx.ModelProto, tensors: _Tensors, name: str) -> None:
    """What building the graph would not notice or would not explain: doubles, names nobody defines, sizes."""
    if proto.training_info:
        raise ModelError(f"{name}: holds a training graph", hint="export the model for inference")
    for function in proto.functions:
        place = f"function {function.domain}.{function.name}"
        names = _unique((*function.input,), f"{name}: {place}", "input")
        _check_nodes(function.node, names, [], tensors, place, name)
        for output in function.output:
            if output not in names:
                raise ModelError(f"{name}: {place}: output {output!r} is not computed")
    if not proto.graph.output:
        raise ModelError(f"{name}: the graph has no outputs")
    _unique(tuple(o.name for o in proto.graph.output), name, "output")
    _check_graph(proto.graph, [], tensors, "the graph", name)


def _check_text(message: Message, name: str) -> None:
    """Every name is UTF-8: the parser lets other bytes through, and fails when they are read or written."""
    for kind, value in message.ListFields():
        if kind.type == kind.TYPE_MESSAGE:
            for inner in (value,) if isinstance(value, Message) else value:
                _check_text(inner, name)
        elif kind.type == kind.TYPE_STRING:
            for text in (value,) if isinstance(value, str | bytes) else value:
                if not isinstance(text, str):
                    raise _not_onnx(name, f"{kind.full_name} is not UTF-8: {bytes(text[:40])!r}")


def _holds_maps(given: onnx.TypeProto) -> bool:
    while (kind := given.WhichOneof("value")) in ("sequence_type", "optional_type"):
        given = getattr(given, kind).elem_type
    return bool(kind == "map_type")


def _unique(names: tuple[str, ...], place: str, kind: str) -> set[str]:
    seen: set[str] = set()
    for one in names:
        if one in seen or not one:
            raise ModelError(
                f"{place}: {kind} {one!r} is there twice" if one else f"{place}: an {kind} has no name"
            )
        seen.add(one)
    return seen


def _check_graph(
    graph: onnx.GraphProto, outer: list[set[str]], tensors: _Tensors, place: str, name: str
) -> None:
    if graph.sparse_initializer:
        raise ModelError(
            f"{name}: {place} has sparse initializers, which are not supported", hint="export dense weights"
        )
    names = _unique(tuple(i.name for i in graph.input), f"{name}: {place}", "input")
    names |= _unique(tuple(t.name for t in graph.initializer), f"{name}: {place}", "initializer")
    for tensor in graph.initializer:
        tensors.check(tensor, place)
    _check_nodes(graph.node, names, outer, tensors, place, name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if _holds_maps(value.type):
            maker = next((f" of {n.op_type}" for n in graph.node if value.name in n.output), "")
            raise ModelError(
                f"{name}: {place}: {value.name!r}{maker} is a map or a sequence of maps, which is no tensor",
                hint="convert a classifier of scikit-learn with options={id(model): {'zipmap': False}}, which gives its probabilities as a tensor",
            )
    for output in graph.output:
        if output.name not in names and not (outer and any(output.name in scope for scope in outer)):
            raise ModelError(f"{name}: {place}: output {output.name!r} is not computed by any node")


def _decode(text: bytes, place: str) -> None:
    try:
        text.decode()
    except UnicodeDecodeError:
        raise ModelError(f"{place}: not UTF-8: {text[:40]!r}") from None


def _check_nodes(
    nodes: Iterable[onnx.NodeProto],
    names: set[str],
    outer: list[set[str]],
    tensors: _Tensors,
    place: str,
    name: str,
) -> None:
    """Adds the outputs of ``nodes`` to ``names``. The order is not looked at: nodes are sorted later."""
    makers: dict[str, str] = {}
    for index, node in enumerate(nodes):
        tensors.nodes += 1
        if tensors.nodes > _MOST_NODES:
            raise ModelError(f"{name}: more than {_MOST_NODES} nodes")
        label = f"node {node.name or index} ({node.op_type})"
        for output in node.output:
            if output and output in names:
                other = (
                    f"by {makers[output]} as well"
                    if output in makers
                    else "as an input or initializer as well"
                )
                raise ModelError(f"{name}: {label} in {place}: {output!r} is defined {other}")
            if output:
                names.add(output)
                makers[output] = label
    scopes = [*outer, names]
    for index, node in enumerate(nodes):
        label = f"node {node.name or index} ({node.op_type})"
        for value in node.input:
            if value and not any(value in scope for scope in reversed(scopes)):
                raise ModelError(f"{name}: {label} in {place}: its input {value!r} is not defined anywhere")
        for attribute in node.attribute:
            inside = f"{label}, {attribute.name}"
            if node.domain in ("", "ai.onnx"):
                for text in (attribute.s, *attribute.strings):
                    _decode(text, f"{name}: {inside}")
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise ModelError(f"{name}: {inside}: sparse tensors are not supported")
            kind = attribute.type
            for tensor in (attribute.t,) if kind == onnx.AttributeProto.TENSOR else attribute.tensors:
                if not attribute.ref_attr_name:
                    tensors.check(tensor, inside)
            for body in (attribute.g,) if kind == onnx.AttributeProto.GRAPH else attribute.graphs:
                _check_graph(body, scopes, tensors, inside, name)
