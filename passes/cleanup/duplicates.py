"""What is computed or stored twice is computed and stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import RANDOM, graphs, subgraphs, walk
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, label, replaceable, substitute

_CHUNK = 1 << 20


class ShareDuplicates(GraphPass):
    """Merge equal nodes (operator, attributes, inputs) and equal initializers (type, shape, bytes).

    A body uses what its outer graphs have; the other way round nothing moves. Random operators and nodes with bodies
    are never merged, neither are initializers that are inputs or outputs of a graph.
    """

    name: ClassVar[str] = "share-duplicates"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Merge equal initializers, then equal nodes."""
        changes = _share_initializers(model)
        random = {key for key, function in model.functions.items() if _is_random(function.graph)}
        _share_nodes(model.graph, {}, random, changes)
        return changes


def _is_random(graph: ir.Graph) -> bool:
    # A function may call another; its nodes are judged by name, so that any call out counts.
    return any(
        node.domain != "" or node.op_type in RANDOM or node.op_type == "Dropout" for node in walk(graph)
    )


def _share_nodes(
    graph: ir.Graph, outer: dict[Hashable, ir.Node], random: set[ir.OperatorIdentifier], changes: list[Change]
) -> None:
    seen = dict(outer)
    for node in tuple(graph):
        bodies = list(subgraphs(node))
        for body in bodies:
            _share_nodes(body, seen, random, changes)
        if bodies or node.op_type in RANDOM or node.op_type == "Dropout" or node.op_identifier() in random:
            continue
        key = _key(node)
        first = seen.setdefault(key, node)
        if first is node or len(first.outputs) < len(node.outputs):
            continue
        pairs = list(zip(node.outputs, first.outputs, strict=False))
        if any(old.name and not new.name for old, new in pairs) or not all(
            replaceable(*pair) for pair in pairs
        ):
            continue
        changes.append(Change(rule="share-node", node=label(node), detail=label(first)))
        for old, new in pairs:
            substitute(old, new)
        graph.remove(node, safe=True)


def _key(node: ir.Node) -> Hashable:
    attributes = tuple(sorted((a.name, a.type, _attribute_key(a)) for a in node.attributes.values()))
    return node.op_identifier(), tuple(None if v is None else id(v) for v in node.inputs), attributes


def _attribute_key(found: ir.Attr) -> str:
    if found.is_ref():
        return f"@{found.ref_attr_name}"
    if found.type == ir.AttributeType.TENSOR:
        tensor = found.as_tensor()
        return f"{tensor.dtype}{list(tensor.shape)}{_digest(tensor)}"
    return repr(found.value)


def _share_initializers(model: ir.Model) -> list[Change]:
    changes: list[Change] = []
    alike: dict[Hashable, list[ir.Value]] = {}
    scopes = _scopes(model.graph, ())
    for value in (v for graph in graphs(model) for v in graph.initializers.values()):
        if value.const_value is not None and not value.is_graph_input() and not value.is_graph_output():
            tensor = value.const_value
            alike.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
    for group in alike.values():
        # Most weights of one shape differ in the first elements, so few are read whole.
        for equal in (equal for few in _split(group, _sample) for equal in _split(few, _digest)):
            # The outermost graphs come first, so what a body can see is already there.
            kept: list[ir.Value] = []
            for value in equal:
                first = next((k for k in kept if k.graph in scopes[value.graph] and _equal(k, value)), None)
                if first is None:
                    kept.append(value)
                    continue
                assert value.graph is not None
                assert value.name is not None
                changes.append(Change(rule="share-initializer", node=value.name, detail=str(first.name)))
                value.replace_all_uses_with(first)
                value.graph.initializers.pop(value.name)
    return changes


def _split(values: Sequence[ir.Value], key: Callable[[ir.TensorProtocol], Hashable]) -> list[list[ir.Value]]:
    """Those of ``values`` that have the same key, where there are two or more."""
    if len(values) < 2:
        return []
    found: dict[Hashable, list[ir.Value]] = {}
    for value in values:
        assert value.const_value is not None
        found.setdefault(key(value.const_value), []).append(value)
    return [group for group in found.values() if len(group) > 1]


def _sample(tensor: ir.TensorProtocol) -> Hashable:
    """Some bytes of the beginning, the middle and the end."""
    if tensor.dtype == ir.DataType.STRING or tensor.dtype.itemsize < 1:
        return None
    flat = np.asarray(tensor.numpy()).reshape(-1)
    middle, few = flat.size // 2, 256
    return b"".join(
        flat[part].tobytes() for part in (slice(few), slice(middle, middle + few), slice(-few, None))
    )


def _scopes(graph: ir.Graph, outer: tuple[ir.Graph, ...]) -> dict[ir.Graph | None, tuple[ir.Graph, ...]]:
    """For every graph the graphs whose values it may read, itself included."""
    visible = (*outer, graph)
    found: dict[ir.Graph | None, tuple[ir.Graph, ...]] = {graph: visible}
    for node in graph:
        for body in subgraphs(node):
            found |= _scopes(body, visible)
    return found


def _chunks(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor, a part at a time, so that a mapped file stays mapped."""
    if tensor.dtype == ir.DataType.STRING:
        yield repr(tensor.numpy().tolist()).encode()
    elif tensor.dtype.itemsize < 1:
        yield tensor.tobytes()
    else:
        flat = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
        for start in range(0, flat.size, _CHUNK):
            yield memoryview(flat[start : start + _CHUNK])  # type: ignore[arg-type]


def _digest(tensor: ir.TensorProtocol) -> str:
    h = hashlib.blake2b(digest_size=16)
    for chunk in _chunks(tensor):
        h.update(chunk)
    return h.hexdigest()


def _equal(a: ir.Value, b: ir.Value) -> bool:
    assert a.const_value is not None
    assert b.const_value is not None
    return all(x == y for x, y in zip(_chunks(a.const_value), _chunks(b.const_value), strict=True))
