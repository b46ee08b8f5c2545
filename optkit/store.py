"""Write models and folders: a reader sees the old or the new one, and the same model always gives the same bytes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import onnx_ir as ir

import optkit
from optkit.errors import ModelError, OptkitError, UsageError
from optkit.protobuf import tag, varint

logger = logging.getLogger(__name__)

# Protobuf readers stop at 2 GiB. Larger models keep their weights in a second file.
_LARGEST_FILE = 1_500_000_000
# Smaller tensors stay in the .onnx file even then: shapes, axes and scales are read together with the graph.
_SMALL = 1024
# Page size on all platforms that map files, so that a reader can map each large weight by itself.
_ALIGNMENT = 65536
_BLOCK = 1 << 24


def save(model: ir.Model, path: str | Path) -> tuple[Path, ...]:
    """Write ``model`` and return the files: one, or with more than 1.5 GB also ``<name>.data`` for the weights.

    Weights are evaluated, written and dropped one at a time, so lazy tensors need the memory of the largest only.
    They may be mapped from the very file that is replaced. ``model`` is left as it is.

    Args:
        path: A file ending in ``.onnx``, or a folder, where the file is then ``model.onnx``. Folders are made as needed.

    Raises:
        OptkitError: The disk is full or the place cannot be written; what was there before still is.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        path /= "model.onnx"
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    shell, weights = _shell(model), tuple(model.graph.initializers.values())
    graph = shell.graph.SerializeToString(deterministic=True)
    shell.ClearField("graph")
    outside = len(graph) + sum(_tensor(v).nbytes for v in weights) > _LARGEST_FILE
    data = _free_data_name(path) if outside else None
    blobs = _layout(weights, data)
    entries = [_field(5, blob.header, blob.raw) for blob in blobs]
    if len(graph) + sum(map(len, entries)) > 2**31 - 2**20:
        raise ModelError(f"{path.name}: constants inside the graph exceed the 2 GiB of a protobuf file")
    size = len(graph) + sum(len(e) + (b.raw or 0) for e, b in zip(entries, blobs, strict=True))
    need = size + sum(b.size for b in blobs)

    def write_data(file: IO[bytes]) -> None:
        for blob in blobs:
            if blob.raw is None and blob.size:
                file.write(b"\0" * (blob.offset - file.tell()))
                _write(blob.tensor, file)

    def write_graph(file: IO[bytes]) -> None:
        file.write(shell.SerializeToString(deterministic=True))
        file.write(tag(7) + varint(size))
        file.write(graph)
        for entry, blob in zip(entries, blobs, strict=True):
            file.write(entry)
            if blob.raw is not None:
                _write(blob.tensor, file)

    written = []
    if data is not None:
        written.append(_replace_file(path.with_name(data), write_data, need))
    written.insert(0, _replace_file(path, write_graph, need))
    for stale in _data_names(path):
        if stale != data:
            path.with_name(stale).unlink(missing_ok=True)
    return tuple(written)


def detached(model: ir.Model) -> tuple[bytes, dict[str, ir.TensorProtocol]]:
    """The model serialized without its large weights, and these by name.

    ONNX Runtime takes the two together (``SessionOptions.add_external_initializers``), so that a session can be made
    without a second copy of the weights. Types that NumPy does not have stay in the bytes.
    """
    shell, weights = _shell(model), tuple(model.graph.initializers.values())
    apart = {}
    for value in weights:
        tensor = _tensor(value)
        if not value.uses() and not value.is_graph_output():
            # ONNX Runtime drops such a weight first, and then misses it when it is handed over.
            continue
        if tensor.nbytes > _SMALL and tensor.dtype.numpy().kind in "fiub" and tensor.dtype.bitwidth >= 8:
            proto = shell.graph.initializer.add(
                name=value.name or "", data_type=int(tensor.dtype), dims=tensor.shape.numpy()
            )
            proto.data_location = onnx.TensorProto.EXTERNAL
            proto.external_data.add(key="location", value="detached")
            apart[value.name or ""] = tensor
        else:
            ir.serde.serialize_tensor_into(shell.graph.initializer.add(), tensor)
            shell.graph.initializer[-1].name = value.name or ""
    return shell.SerializeToString(deterministic=True), apart


def outline(model: ir.Model) -> onnx.ModelProto:
    """The model without its large weights, of which only type and shape are left: what shape inference needs."""
    proto = _shell(model)
    for value in model.graph.initializers.values():
        tensor = _tensor(value)
        if tensor.nbytes <= _SMALL:
            ir.serde.serialize_tensor_into(proto.graph.initializer.add(), tensor)
            proto.graph.initializer[-1].name = value.name or ""
        elif not value.is_graph_input():
            kind = onnx.helper.make_tensor_type_proto(int(tensor.dtype), tensor.shape.numpy())
            proto.graph.value_info.add(name=value.name or "", type=kind)
    return proto


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blob:
    """One weight on disk: the protobuf fields before its bytes, and where these go.

    Attributes:
        raw: Number of bytes that follow ``header`` in the .onnx file, or None where the header says it all.
        offset: Where the bytes are in the data file, if they are there: then ``size`` is their number.
    """

    tensor: ir.TensorProtocol
    header: bytes
    raw: int | None = None
    offset: int = 0
    size: int = 0


def _layout(weights: Sequence[ir.Value], data: str | None) -> list[_Blob]:
    blobs, end = [], 0
    for value in weights:
        tensor = _tensor(value)
        proto = onnx.TensorProto(
            name=value.name or "", data_type=int(tensor.dtype), dims=tensor.shape.numpy()
        )
        if tensor.doc_string:
            proto.doc_string = tensor.doc_string
        if tensor.dtype == ir.DataType.STRING:
            proto.string_data.extend(tensor.numpy().reshape(-1).tolist())
            blobs.append(_Blob(tensor=tensor, header=proto.SerializeToString(deterministic=True)))
        elif data is None or tensor.nbytes <= _SMALL:
            blobs.append(
                _Blob(tensor=tensor, header=proto.SerializeToString(deterministic=True), raw=tensor.nbytes)
            )
        else:
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = offset + tensor.nbytes
            proto.data_location = onnx.TensorProto.EXTERNAL
            for key, text in (("location", data), ("offset", str(offset)), ("length", str(tensor.nbytes))):
                proto.external_data.add(key=key, value=text)
            header = proto.SerializeToString(deterministic=True)
            blobs.append(_Blob(tensor=tensor, header=header, offset=offset, size=tensor.nbytes))
    return blobs


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ModelError(f"initializer {value.name!r} has no data")
    return value.const_value


def _shell(model: ir.Model) -> onnx.ModelProto:
    """Everything but the weights of the main graph."""
    proto = onnx.ModelProto(
        ir_version=model.ir_version, producer_name="optkit", producer_version=optkit.__version__
    )
    for name in ("domain", "model_version", "doc_string"):
        if getattr(model, name):
            setattr(proto, name, getattr(model, name))
    for domain, number in sorted(model.opset_imports.items()):
        proto.opset_import.add(domain=domain, version=number)
    for key, text in sorted(model.metadata_props.items()):
        proto.metadata_props.add(key=key, value=text)
    graph = model.graph
    proto.graph.name = graph.name or "graph"
    if graph.doc_string:
        proto.graph.doc_string = graph.doc_string
    for key, text in sorted(graph.metadata_props.items()):
        proto.graph.metadata_props.add(key=key, value=text)
    for value in graph.inputs:
        ir.serde.serialize_value_into(proto.graph.input.add(), value)
    for value in graph.outputs:
        ir.serde.serialize_value_into(proto.graph.output.add(), value)
    for node in graph:
        ir.serde.serialize_node_into(proto.graph.node.add(), node, model_ir_version=model.ir_version)
        for value in node.outputs:
            if value.name and value.type is not None and not value.is_graph_output():
                ir.serde.serialize_value_into(proto.graph.value_info.add(), value)
    for _, function in sorted(model.functions.items()):
        ir.serde.serialize_function_into(proto.functions.add(), function, model_ir_version=model.ir_version)
    return proto


def _field(field: int, header: bytes, raw: int | None) -> bytes:
    """A TensorProto as field ``field`` of its parent, up to the ``raw`` bytes of its raw_data (field 9) that follow."""
    head = b"" if raw is None else tag(9) + varint(raw)
    return tag(field) + varint(len(header) + len(head) + (raw or 0)) + header + head


def _write(tensor: ir.TensorProtocol, file: IO[bytes]) -> None:
    """Write the bytes of ``tensor``, evaluating it if it is lazy and keeping nothing."""
    whole: ir.TensorProtocol = tensor.raw() if isinstance(tensor, ir.LazyTensor) else tensor
    bits = tensor.dtype.bitwidth
    little = np.dtype(np.uint16).newbyteorder("=") == np.dtype("<u2")
    if isinstance(whole, ir.Tensor) and isinstance(whole.raw, np.ndarray) and bits >= 8 and little:
        array = np.ascontiguousarray(whole.raw)
        data = memoryview(array.reshape(-1).view(np.uint8).data)
    else:
        data = memoryview(whole.tobytes())
    if data.nbytes != tensor.nbytes:
        raise ModelError(
            f"tensor {tensor.name!r} has {data.nbytes} bytes instead of the {tensor.nbytes} of its shape and type"
        )
    for start in range(0, data.nbytes, _BLOCK):
        file.write(data[start : start + _BLOCK])


def _data_names(path: Path) -> tuple[str, str]:
    return f"{path.name}.data", f"{path.name}.1.data"


def _free_data_name(path: Path) -> str:
    """A name that the model now at ``path`` does not use: until that is replaced its data must stay."""
    first, second = _data_names(path)
    return second if path.exists() and path.with_name(first).exists() else first


def _replace_file(path: Path, write: Callable[[IO[bytes]], None], need: int) -> Path:
    with _explained(path, need):
        name = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with name.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
            _sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                name.unlink()
            raise
    return path


@contextlib.contextmanager
def _explained(path: Path, need: int = 0) -> Iterator[None]:
    """Turn what the operating system refuses into an error that says what, where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(path.parent).free
                hint = f"about {need / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free; make room or write elsewhere"
                raise OptkitError(f"cannot write {path}: {error.strerror}", hint=hint) from error
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        advice = "choose a place that can be written" if refused else None
        raise OptkitError(f"cannot write {path}: {error.strerror or error}", hint=advice) from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def temporary_folder(final: str | Path) -> Iterator[Path]:
    """A folder beside ``final``, to be filled and handed to ``replace_folder``; it goes away at the end.

    What processes that were killed left behind is removed on the way in, and an old ``final`` that such a process had
    put aside is put back. ``final`` is looked at now, so that hours of work do not end in a refusal.

    Raises:
        UsageError: ``final`` is a file, or a folder with something else than an artifact in it.
        OptkitError: The place cannot be written.
    """
    final = _resolve(final)
    with _explained(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _recover(final)
        _check_replaceable(final)
        folder, handle = _locked_folder(final)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def replace_folder(new: str | Path, final: str | Path) -> None:
    """Put ``new`` in the place of ``final``, whole: whenever this is killed, ``final`` is the old or the new folder.

    Where the file system cannot exchange two names in one step (other than on Linux, NFS), there is a moment without
    ``final``; the old one is then put back by the next ``temporary_folder``.

    Args:
        new: On the file system of ``final``; gone afterwards.

    Raises:
        UsageError: As ``temporary_folder``.
    """
    new, final = Path(new), _resolve(final)
    with _explained(final):
        for root, _, files in os.walk(new):
            for name in files:
                _sync(Path(root, name))
            _sync(Path(root))
        _check_replaceable(final)
        if not final.exists():
            new.rename(final)
        elif not _exchange(new, final):
            aside = _aside(final)
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
            new.rename(final)
            new = aside
        _sync(final.parent)
        if new.exists():
            shutil.rmtree(new, ignore_errors=True)


def _resolve(final: str | Path) -> Path:
    # A link to a folder is followed: the folder is replaced, the link stays.
    return Path(os.path.realpath(final))


def _check_replaceable(final: Path) -> None:
    hint = "choose another folder for the output, or move this one away"
    if final.is_dir():
        if any(final.iterdir()) and not (final / "manifest.json").is_file():
            raise UsageError(f"{final} holds other things than an artifact and is not overwritten", hint=hint)
    elif final.exists():
        raise UsageError(f"{final} is a file, the output needs a folder", hint=hint)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _recover(final: Path) -> None:
    """Undo what a killed process had begun: put back the folder put aside, remove temporary folders nobody holds."""
    aside = _aside(final)
    if aside.is_dir():
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(final)
    for folder in sorted(final.parent.glob(f".{_escape(final.name)}.tmp-*")):
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # The lock goes with the process that made the folder, also when it is killed or on another machine.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                logger.info("removing %s, left behind by a process that was stopped", folder)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _locked_folder(final: Path) -> tuple[Path, int]:
    for number in itertools.count():
        folder = final.with_name(f".{final.name}.tmp-{os.getpid()}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between making and locking it, another process may have taken it for left behind.
            if folder.stat().st_ino == os.fstat(handle).st_ino:
                return folder, handle
        os.close(handle)
    raise AssertionError


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step (renameat2 with RENAME_EXCHANGE); False where that does not exist."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2
    if rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))
