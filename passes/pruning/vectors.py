"""Constants that hold sizes: where they lie, and how they follow when channels go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

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


def settle(
    node: ir.Node,
    index: int,
    sizes: Mapping[int, int],
    changed: Collection[int],
    cut: Callable[[ir.Value], bool],
    names: Names,
) -> None:
    """Let elements of input ``index`` be ``sizes``, where those are known and the elements are read off other shapes.

    Exporters take sizes from wherever they were computed first: the heads of one attention from those of another, of
    which either may have lost some: those ``changed``, or what is ``cut``.
    """
    value, graph = node.inputs[index], node.graph
    joined = None if value is None else value.producer()
    if value is None or joined is None or not isinstance(graph, ir.Graph):
        return
    given = list(joined.inputs) if joined.op_type == "Concat" and joined.domain == "" else [value]
    pieces, start = list[ir.Value](), 0
    for piece in given:
        if piece is None or piece.shape is None or not piece.shape.is_static():
            return
        n = int(piece.shape.numpy()[0])
        here = range(start, start + n)
        moved = any(i in changed for i in here) or any(map(cut, _measured(piece)))
        if constant(piece) is not None or not moved or not any(i in sizes for i in here):
            pieces.append(piece)
        else:
            for i in range(n):
                if start + i in sizes:
                    known = np.asarray([sizes[start + i]], np.int64)
                    pieces.append(register(graph, names.new(f"{node.name}/size"), known))
                else:
                    pieces.append(_element(node, piece, i, names))
        start += n
    if pieces != given:
        _join(node, index, pieces, names)


def _element(node: ir.Node, vector: ir.Value, i: int, names: Names) -> ir.Value:
    """Element ``i`` as a vector, computed before ``node``."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    ends = [register(graph, names.new(f"{node.name}/at"), np.asarray([k], np.int64)) for k in (i, i + 1)]
    slice_ = ir.node("Slice", [vector, *ends], name=names.new(f"{node.name}/element"))
    out = slice_.outputs[0]
    out.name, out.type, out.shape = names.new(f"{node.name}/element"), vector.type, ir.Shape([1])
    slice_.metadata_props.update(node.metadata_props)
    node.prepend(slice_)
    return out


def _measured(size: ir.Value) -> list[ir.Value]:
    """The values whose shapes ``size`` is computed from."""
    found, seen, left = list[ir.Value](), set[ir.Value](), [size]
    while left:
        value = left.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        inputs = [v for v in node.inputs if v is not None]
        if node.op_type == "Shape" and node.domain == "":
            found += inputs
        else:
            left += inputs
    return found


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
    _join(node, index, pieces, names)


def scale(
    node: ir.Node, index: int, at: int, old: int, new: int, cut: Callable[[ir.Value], bool], names: Names
) -> None:
    """Let element ``at`` of input ``index``, which is computed as a multiple of ``old``, be as many times ``new``.

    A constant there is -1, which follows by itself, and so does what is read off the shape of what is ``cut``.
    """
    value = node.inputs[index]
    joined = None if value is None else value.producer()
    if value is None or constant(value) is not None or joined is None:
        return
    pieces, start = list[ir.Value | None](), 0
    for piece in joined.inputs:
        assert piece is not None
        assert piece.shape is not None
        n = int(piece.shape.numpy()[0])
        if not start <= at < start + n or constant(piece) is not None or any(map(cut, _measured(piece))):
            pieces.append(piece)
        else:
            parts = [piece] if n == 1 else [_element(node, piece, i, names) for i in range(n)]
            parts[at - start] = _times(node, parts[at - start], old, new, names)
            pieces += parts
        start += n
    if pieces != list(joined.inputs):
        _join(node, index, pieces, names)


def _times(node: ir.Node, element: ir.Value, old: int, new: int, names: Names) -> ir.Value:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    for op, number in (("Div", old), ("Mul", new)):
        by = register(graph, names.new(f"{node.name}/units"), np.asarray([number], np.int64))
        step = ir.node(op, [element, by], name=names.new(f"{node.name}/{op.lower()}"))
        out = step.outputs[0]
        out.name, out.type, out.shape = names.new(f"{node.name}/scaled"), element.type, element.shape
        step.metadata_props.update(node.metadata_props)
        node.prepend(step)
        element = out
    return element


def _join(node: ir.Node, index: int, pieces: Sequence[ir.Value | None], names: Names) -> None:
    """Give ``node`` a vector of its own."""
    value = node.inputs[index]
    assert value is not None
    own = ir.node("Concat", pieces, attributes={"axis": 0}, name=names.new(f"{node.name}/sizes"))
    out = own.outputs[0]
    out.name, out.type, out.shape = names.new(f"{node.name}/sizes"), value.type, value.shape
    own.metadata_props.update(node.metadata_props)
    node.prepend(own)
    node.replace_input_with(index, out)
