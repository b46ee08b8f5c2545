"""Scales and shifts by constants move into the weights of neighbouring layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import constant, graphs, rank, read_once, users
from optkit.passes.base import Context, GraphPass
from optkit.passes.cleanup.noops import fits_into
from optkit.passes.fusion.weights import (
    Edit,
    Port,
    affine_of_batch_norm,
    input_port,
    output_port,
    per_channel,
    store,
    take_input,
    take_output,
)
from optkit.rewrite import Builder, Change, Names, label, remove_unused, replaceable, substitute

# How much larger than the sum the parts of a sum of shifts may be. Beyond, as in ``(x + 2**23) - 2**23``, the rounding
# in between may be what was meant.
_CANCELLATION = 1 << 13
# More elements than any layer has channels: a position embedding, say, that nothing could take in.
_LARGEST = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """``y = scale * x + shift`` by constants, as one node or a chain of them computes it.

    Attributes:
        nodes: In the order of the data; each but the last is read by the next alone.
        x: What the first node reads.
        scale: Broadcasts against ``x`` without widening it; float64.
        shift: Same.
        largest: A bound of what is added on the way, in units of ``y``.
    """

    nodes: tuple[ir.Node, ...]
    x: ir.Value
    scale: np.ndarray
    shift: np.ndarray
    largest: float

    @property
    def y(self) -> ir.Value:
        """What the last node computes."""
        return self.nodes[-1].outputs[0]

    def then(self, other: Affine) -> Affine | None:
        """The chain with ``other`` behind it; None where constants would become larger or cancel."""
        scale = np.asarray(self.scale * other.scale)
        shift = np.asarray(self.shift * other.scale + other.shift)
        sizes = (self.scale.size, self.shift.size, other.scale.size, other.shift.size)
        largest = self.largest * float(np.max(np.abs(other.scale))) + other.largest
        bound = max(float(np.max(np.abs(shift))), float(np.max(np.abs(scale))))
        if max(scale.size, shift.size) > max(sizes) or largest > _CANCELLATION * bound:
            return None
        if not np.all(np.isfinite(scale)) or not np.all(np.isfinite(shift)):
            return None
        return Affine(nodes=(*self.nodes, *other.nodes), x=self.x, scale=scale, shift=shift, largest=largest)

    @property
    def scales(self) -> bool:
        """Whether there is a factor other than one."""
        return bool(np.any(self.scale != 1))

    @property
    def shifts(self) -> bool:
        """Whether there is a summand other than zero."""
        return bool(np.any(self.shift != 0))


class FoldAffine(GraphPass):
    """Fold Mul, Add, Sub, Div, Neg and BatchNormalization by constants into the layers before and behind them.

    Before: ``Conv -> Mul(s) -> Add(t)``. After: ``Conv`` with weights ``s * w`` and bias ``s * b + t``; s and t are
    single numbers or have one for each channel. A layer behind takes in a scale always, and a shift unless zeros are
    padded to its input; where they are, ``s * x + t`` leaves the addition of ``t / s``. Chains that no layer can take in
    become as short as they can be.

    Exact but for rounding: constants are computed in float64 and rounded once. What sines are taken of stays as it is, but for
    factors of powers of two: rounding the weights of an angle of many turns once more moves it as far as its sum does.
    """

    name: ClassVar[str] = "fold-affine"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Fold until no chain can become shorter."""
        names = Names(model)
        changes: list[Change] = []
        while found := [change for graph in graphs(model) for change in _fold(graph, names)]:
            changes += found
        return changes


def affine_of(node: ir.Node) -> Affine | None:
    """What ``node`` computes, if that is a scale and a shift by constants that leave shape and type alone."""
    if node.domain != "" or not node.inputs or node.inputs[0] is None:
        return None
    x, constants = node.inputs[0], [constant(v) for v in node.inputs[1:]]
    one, zero = np.ones(()), np.zeros(())
    if node.op_type == "BatchNormalization":
        found, axes = affine_of_batch_norm(node), rank(x)
        if found is None or axes is None or axes < 2:
            return None
        scale, shift = (v.reshape(-1, *(1,) * (axes - 2)) for v in found)
        return Affine(
            nodes=(node,), x=x, scale=scale, shift=shift, largest=float(np.max(np.abs(shift), initial=0))
        )
    if node.op_type == "Neg":
        return Affine(nodes=(node,), x=x, scale=-one, shift=zero, largest=0.0) if _float(x) else None
    if node.op_type not in ("Mul", "Add", "Sub", "Div"):
        return None
    held, swapped = constants[0], False
    if held is None and node.op_type != "Div" and node.inputs[1] is not None:
        held, x, swapped = constant(node.inputs[0]), node.inputs[1], True
    if (
        held is None
        or not _float(x)
        or held.size == 0
        or not fits_into(held.shape, x)
        or constant(x) is not None
    ):
        return None
    if held.size > _LARGEST:
        return None
    c = np.asarray(held, np.float64)
    if not np.all(np.isfinite(c)) or (node.op_type == "Div" and np.any(c == 0)):
        return None
    match node.op_type:
        case "Mul":
            scale, shift = c, zero
        case "Div":
            scale, shift = 1 / c, zero
        case "Add":
            scale, shift = one, c
        case _:
            scale, shift = (-one, c) if swapped else (one, -c)
    return Affine(nodes=(node,), x=x, scale=scale, shift=shift, largest=float(np.max(np.abs(shift))))


def _float(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


def _fold(graph: ir.Graph, names: Names) -> Iterator[Change]:
    for node in tuple(graph):
        if node.graph is graph and (first := affine_of(node)) is not None and not _continues(first.x, graph):
            chain = _chain(first)
            if _is_angle(chain):
                continue
            change = fold_before(chain, names) or fold_behind(chain, names)
            for index, part in enumerate(chain[:-1]):
                if change is None and part.nodes[0].op_type == "BatchNormalization":
                    change = fold_before(chain[index + 1 :], names)
            change = change or _shorten(chain, names)
            if change is not None:
                yield change


def _is_angle(chain: Sequence[Affine]) -> bool:
    """Whether sines alone read what a chain gives, and the constants that would take it in would be rounded."""
    readers = users(chain[-1].y)
    if not readers or any(reader.op_type not in ("Sin", "Cos") for reader in readers):
        return False
    total = _joined(chain)
    return total is None or bool(np.any(np.frexp(np.abs(total.scale))[0] != 0.5) or total.shifts)


def _continues(x: ir.Value, graph: ir.Graph) -> bool:
    """Whether a chain that ends in ``x`` goes on behind it, so that its first node is another."""
    node = x.producer()
    return node is not None and node.graph is graph and read_once(x) and affine_of(node) is not None


def _chain(first: Affine) -> list[Affine]:
    """The chain that starts with ``first``, as one ``Affine`` a node."""
    chain = [first]
    while read_once(chain[-1].y):
        (user,) = users(chain[-1].y)
        following = affine_of(user)
        if user.graph is not first.nodes[0].graph or following is None or following.x is not chain[-1].y:
            break
        chain.append(following)
    return chain


def _joined(parts: Sequence[Affine]) -> Affine | None:
    total: Affine | None = parts[0]
    for part in parts[1:]:
        total = None if total is None else total.then(part)
    return total


def _vectors(affine: Affine, port: Port, order: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and shift for each channel at ``port``, whose axes are those of ``affine.x`` in another ``order``."""
    axes = rank(affine.x)
    found = []
    for array in (affine.scale, affine.shift):
        if order and array.size > 1:
            array = array.reshape((1,) * (len(order) - array.ndim) + array.shape).transpose(order)
        found.append(per_channel(array, port, axes))
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _order(node: ir.Node | None) -> list[int]:
    """How a Transpose orders the axes; empty for everything else."""
    if node is None or node.op_type != "Transpose" or node.domain != "":
        return []
    axes = rank(node.inputs[0])
    return list(node.attributes.get_ints("perm", range(axes - 1, -1, -1) if axes is not None else ()))


def fold_before(chain: Sequence[Affine], names: Names) -> Change | None:
    """Let the layer that computes ``x`` take in as much of the beginning of the chain as it can."""
    x = chain[0].x
    layer = x.producer()
    alone = read_once(x)
    order = [int(i) for i in np.argsort(_order(layer))]
    if order and layer is not None and layer.inputs[0] is not None:
        alone = alone and read_once(layer.inputs[0])
        layer = layer.inputs[0].producer()
    if layer is None or layer.graph is not chain[0].nodes[0].graph or not alone:
        return None
    port = output_port(layer)
    if port is None:
        return None
    for length in range(len(chain), 0, -1):
        total = _joined(chain[:length])
        vectors = _vectors(total, port, order) if total is not None else None
        if total is None or vectors is None:
            continue
        scale, shift = vectors
        if port.shifts or not total.shifts:
            edits = take_output(port, scale, shift) if replaceable(total.y, x) else None
            if edits is not None:
                store(edits, names)
                return _gone(total, x, f"into {label(layer)}")
        elif total.scales and length > 1:
            edits = take_output(port, scale, np.zeros_like(shift))
            if edits is not None:
                store(edits, names)
                rest = replace(total, scale=np.ones(()))
                return _replace(total, rest, names, f"scale into {label(layer)}")
    return None


def fold_behind(chain: Sequence[Affine], names: Names) -> Change | None:
    """Let all layers that read ``y`` take in as much of the end of the chain as they can."""
    y = chain[-1].y
    known = _ports_behind(y, ())
    if not known or y.is_graph_output() or any(p.node.graph is not chain[0].nodes[0].graph for p, _ in known):
        return None
    # Runtimes fuse a norm that is written out together with its scale, and without it they do not.
    if _normalizes(chain[0].x):
        return None
    for start in range(len(chain)):
        total = _joined(chain[start:])
        vectors = [_vectors(total, port, order) for port, order in known] if total is not None else [None]
        if total is None or any(v is None for v in vectors):
            continue
        pairs = [(port, *v) for (port, _), v in zip(known, vectors, strict=True) if v is not None]
        where = f"into {', '.join(label(port.node) for port, _ in known)}"
        if not total.shifts or all(port.shifts for port, _ in known):
            edits = [take_input(port, scale, shift) for port, scale, shift in pairs]
            if _store_all(edits, names):
                return _gone(total, total.x, where)
        elif total.scales and len(total.nodes) > 1 and np.all(total.scale):
            rest = replace(total, scale=np.ones(()), shift=np.asarray(total.shift / total.scale))
            edits = [take_input(port, scale, np.zeros_like(shift)) for port, scale, shift in pairs]
            if np.all(np.isfinite(rest.shift)) and _store_all(edits, names):
                return _replace(total, rest, names, f"scale {where}")
    return None


def _ports_behind(y: ir.Value, order: Sequence[int]) -> list[tuple[Port, Sequence[int]]]:
    """The layers that read ``y``, also through a Transpose; none if anything else reads it."""
    found: list[tuple[Port, Sequence[int]]] = []
    for use in y.uses():
        port = input_port(use.node) if use.idx == 0 else None
        if port is not None:
            found.append((port, order))
            continue
        moved = _order(use.node)
        behind = _ports_behind(use.node.outputs[0], moved) if moved and not order else []
        if not behind or use.node.outputs[0].is_graph_output():
            return []
        found += behind
    return found


def _normalizes(x: ir.Value) -> bool:
    """Whether ``x`` is something divided by the root of a mean."""
    node = x.producer()
    if node is None or node.op_type not in ("Mul", "Div"):
        return False
    for value in node.inputs:
        root = value.producer() if value is not None else None
        if root is not None and root.op_type in ("Reciprocal", "Div"):
            root = next(
                (v.producer() for v in root.inputs if v is not None and v.producer() is not None), None
            )
        if root is None or root.op_type not in ("Sqrt", "Pow") or root.inputs[0] is None:
            continue
        total = root.inputs[0].producer()
        operands = (
            total.inputs if total is not None and total.op_type in ("Add", "Max", "Clip") else root.inputs[:1]
        )
        if any(
            v is not None and (n := v.producer()) is not None and n.op_type == "ReduceMean" for v in operands
        ):
            return True
    return False


def _store_all(edits: Sequence[list[Edit] | None], names: Names) -> bool:
    """Either all layers take it in, or none."""
    known = [edit for group in edits if group is not None for edit in group]
    if any(group is None for group in edits):
        return False
    store(known, names)
    return True


def _shorten(chain: Sequence[Affine], names: Names) -> Change | None:
    """Write the chain, or the longest part of it that gains, with as few nodes as can be."""
    for length in range(len(chain), 1, -1):
        for start in range(len(chain) - length + 1):
            total = _joined(chain[start : start + length])
            if total is None or total.scales + total.shifts >= length:
                continue
            if total.scales or total.shifts or replaceable(total.y, total.x):
                return _replace(total, total, names, "")
    return None


def _gone(old: Affine, x: ir.Value, where: str) -> Change:
    change = Change(rule="fold-affine", node=label(old.nodes[-1]), detail=where)
    substitute(old.y, x)
    remove_unused(reversed(old.nodes))
    return change


def _replace(old: Affine, new: Affine, names: Names, where: str) -> Change:
    """Write ``new`` in the place of ``old``."""
    change = Change(rule="fold-affine", node=label(old.nodes[-1]), detail=where)
    builder, dtype = Builder(old.nodes[-1], names), new.x.dtype
    assert dtype is not None
    value = new.x
    if new.scales:
        value = builder.Mul(value, np.asarray(new.scale, dtype.numpy()))
    if new.shifts:
        value = builder.Add(value, np.asarray(new.shift, dtype.numpy()))
    substitute(old.y, value)
    remove_unused(reversed(old.nodes))
    return change
