"""What a file computes, and in what."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from optkit.backends.base import Executed

if TYPE_CHECKING:
    from optkit.backends.litert.session import LiteRtSession

_NAMES = {v: k for k, v in vars(schema.BuiltinOperator).items() if k.isupper()}
_TYPES = {v: k for k, v in vars(schema.TensorType).items() if k.isupper()}
# Runs that a duration is the least of.
_RUNS = 3


def operators(session: LiteRtSession, file: Path, feeds: Mapping[str, np.ndarray]) -> Sequence[Executed]:
    """The operators of the subgraph that runs ``feeds``, as they are stored."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(file.read_bytes(), 0))
    key = session.key(feeds)
    index = next(s.subgraphIndex for s in model.signatureDefs if s.signatureKey.decode() == key)
    graph = model.subgraphs[index]
    took = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        session.run(feeds)
        took.append(time.perf_counter() - start)
    rows = [
        _one(op, graph, _NAMES[model.operatorCodes[op.opcodeIndex].builtinCode]) for op in graph.operators
    ]
    total = sum(macs for *_, macs in rows)
    return [
        Executed(
            name=name, op=code, where="cpu", format=fmt, macs=macs,
            seconds=min(took) * (macs / total if total else 1 / len(rows)),
        )
        for name, code, fmt, macs in rows
    ]  # fmt: skip


def weights(file: Path) -> dict[str, int]:
    """Bytes of constants by stored type, ``float16``, ``int8`` and so on; of shared ones once."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(file.read_bytes(), 0))
    kinds = {t.buffer: _TYPES[t.type] for graph in model.subgraphs for t in graph.tensors}
    found: dict[str, int] = {}
    for index, buffer in enumerate(model.buffers):
        if index in kinds and buffer.data is not None:
            name = "float" if kinds[index] == "FLOAT32" else kinds[index].lower()
            found[name] = found.get(name, 0) + len(buffer.data)
    return found


def _one(op: Any, graph: Any, code: str) -> tuple[str, str, str, int]:
    tensors = [graph.tensors[i] if i >= 0 else None for i in op.inputs]
    out = graph.tensors[op.outputs[0]]
    weights = tensors[1] if len(tensors) > 1 else None
    sizes = [tuple(map(int, t.shape)) if t is not None and t.shape is not None else () for t in tensors]
    volume = int(np.prod(out.shape)) if out.shape is not None else 1
    macs = 0
    if code == "CONV_2D":
        macs = volume * int(np.prod(sizes[1][1:]))
    elif code == "DEPTHWISE_CONV_2D":
        macs = volume * int(np.prod(sizes[1][1:3]))
    elif code == "FULLY_CONNECTED":
        macs = volume * sizes[1][1]
    elif code == "BATCH_MATMUL":
        macs = volume * sizes[0][-1]
    elif code == "TRANSPOSE_CONV":
        macs = int(np.prod(sizes[2])) * int(np.prod(sizes[1][:3]))
    eight = schema.TensorType.INT8
    integers = out.type == eight if not macs else weights is not None and weights.type == eight
    return out.name.decode(), code, "int8" if integers else "fp32", macs
