"""Where a scale can move from the layer that makes a value into the layers that read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import constant, rank, users
from optkit.passes.fusion.weights import Edit, Port, input_port, output_port, store, take_input, take_output
from optkit.rewrite import Names

# f(s * x) = s * f(x) for every s > 0, in each channel.
_HOMOGENEOUS = frozenset(
    {"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A value whose channels may get any positive scale: what makes it divides, all that reads it multiplies.

    Attributes:
        source: The layer, or the norm, that makes it.
        shift: ``Add`` of a vector behind a ``MatMul``, divided too.
        value: What is read: behind activations and pools that pass a positive scale on.
        axis: Of its channels, counted from the front.
        readers: All layers that read it.
    """

    source: Port
    shift: ir.Node | None
    value: ir.Value
    axis: int
    readers: tuple[Port, ...]

    def rescale(self, factor: np.ndarray, names: Names) -> bool:
        """Multiply ``value`` by ``factor`` (``[channels]``, positive) and divide it out again; False if weights would overflow."""
        nothing = np.zeros_like(factor)
        edits = [
            take_output(self.source, factor, nothing),
            *(take_input(r, 1 / factor, nothing) for r in self.readers),
        ]
        if any(e is None for e in edits):
            return False
        store([edit for group in edits if group is not None for edit in group], names)
        if self.shift is not None:
            known = _vector(self.shift)
            assert known is not None
            index, held = known
            array = (held.astype(np.float64) * factor.reshape(held.shape)).astype(held.dtype)
            store([Edit(node=self.shift, index=index, array=array)], names)
        return True


def links(graph: ir.Graph) -> Iterator[Link]:
    """Every link of the graph, bodies in it left out, in the order of the data."""
    for node in graph:
        port = output_port(node)
        link = None if port is None else _link(port)
        if link is not None:
            yield link


def readers(value: ir.Value) -> list[Port]:
    """The layers that read ``value`` as what they multiply their weights with."""
    ports = (input_port(use.node) if use.idx == 0 else None for use in value.uses())
    return [p for p in ports if p is not None]


def _link(port: Port) -> Link | None:
    value, shift = port.node.outputs[0], None
    while not value.is_graph_output():
        found = readers(value)
        if found and len(found) == len(value.uses()):
            axis, axes = _axis(port, value), {_axis(r, value) for r in found}
            same = axes == {axis} and all(r.channels == port.channels for r in found)
            inside = all(r.node.graph is port.node.graph for r in found)
            if axis is None or not same or not inside:
                return None
            return Link(source=port, shift=shift, value=value, axis=axis, readers=tuple(found))
        if len(value.uses()) != 1:
            return None
        (user,) = users(value)
        if user.domain != "" or user.graph is not port.node.graph:
            return None
        if (
            user.op_type == "Add"
            and shift is None
            and port.node.op_type == "MatMul"
            and value is port.node.outputs[0]
        ):
            known = _vector(user)
            if known is None or known[1].size != port.channels or known[1].shape[-1:] != (port.channels,):
                return None
            shift = user
        elif user.op_type not in _HOMOGENEOUS or len(user.outputs) != 1:
            return None
        value = user.outputs[0]
    return None


def _axis(port: Port, value: ir.Value) -> int | None:
    axes = port.rank if port.rank is not None else rank(value)
    return None if axes is None else port.axis % axes


def _vector(node: ir.Node) -> tuple[int, np.ndarray] | None:
    """Index and contents of the constant operand of a sum."""
    for index, value in enumerate(node.inputs):
        array = constant(value)
        if array is not None:
            return index, array
    return None
