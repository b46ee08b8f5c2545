"""Constants that hold sizes: where they lie, and how they follow when channels go."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from optkit.graph import constant
from optkit.rewrite import Names, register

_SAME = frozenset({"Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape"})


def editable(value: ir.Value | None) -> bool:
    """Whether the elements of a vector of sizes can be changed one by one: constants, or pieces that are joined."""
    if value is None or constant(value) is not None:
        return True
    node = value.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type == "Concat":
        return all(v is not None and v.shape is not None and v.shape.is_static() for v in node.inputs)
    return False


def edit(node: ir.Node, index: int, changes: Mapping[int, int], names: Names) -> None:
    """Set elements of input ``index`` of ``node``, a vector of sizes, that are constants and name a size.

    Elements of -1 and 0 follow by themselves, and so do those that are computed where the model runs.
    """
    value = node.inputs[index]
    assert value is not None
    array = constant(value)
    if array is not None:
        new = array.copy()
        for i, size in changes.items():
            if new.ravel()[i] > 0:
                new.reshape(-1)[i] = size
        if not np.array_equal(new, array):
            graph = node.graph
            assert isinstance(graph, ir.Graph)
            node.replace_input_with(index, register(graph, names.new(f"{node.name}/sizes"), new))
        return
    joined = value.producer()
    assert joined is not None
    assert joined.op_type == "Concat"
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    pieces, start = list(joined.inputs), 0
    changed = False
    for k, piece in enumerate(pieces):
        assert piece is not None
        assert piece.shape is not None
        n = int(piece.shape.numpy()[0])
        array = constant(piece)
        if array is not None:
            new = array.copy()
            for i, size in changes.items():
                if start <= i < start + n and new[i - start] > 0:
                    new[i - start] = size
            if not np.array_equal(new, array):
                pieces[k] = register(graph, names.new(f"{node.name}/size"), new)
                changed = True
        start += n
    if not changed:
        return
    own = ir.node("Concat", pieces, attributes={"axis": 0}, name=names.new(f"{node.name}/sizes"))
    out = own.outputs[0]
    out.name, out.type, out.shape = names.new(f"{node.name}/sizes"), value.type, value.shape
    own.metadata_props.update(node.metadata_props)
    node.prepend(own)
    node.replace_input_with(index, out)
