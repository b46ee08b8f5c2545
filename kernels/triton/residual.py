"""The Add in front of a normalization becomes part of it, also where others read the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from optkit.dims import shape_of
from optkit.kernels.base import DOMAIN
from optkit.rewrite import remove_unused, substitute


def addends(total: ir.Value, root: ir.Node, vectors: Sequence[ir.Value]) -> str | None:
    """None where ``total`` is a sum that the kernel at ``root``'s place may compute, else why it is not.

    Args:
        total: What is normalized.
        root: The last node of the normalization.
        vectors: Its scale and bias: what they come from is not part of it.
    """
    add, graph = total.producer(), root.graph
    if add is None or add.op_type != "Add" or add.domain != "":
        return "not a sum"
    if add.graph is not graph or graph is None:
        return "the sum is computed in another graph"
    if any(
        v is None or v.shape is None or shape_of(v) != shape_of(total) or v.dtype != total.dtype
        for v in add.inputs
    ):
        return "the addends do not have the shape of the sum"
    within = _between(root, add, vectors)
    others = [node for node, _ in total.uses() if node not in within]
    if any(node.graph is not graph for node in others):
        return "the sum is read in a body"
    # The kernel stands where root does: nobody may need the sum before.
    place = {node: index for index, node in enumerate(graph)}
    return None if all(place[n] > place[root] for n in others) else "the sum is read before it is normalized"


def absorb(
    op: Any, op_type: str, total: ir.Value, vectors: Sequence[ir.Value], attributes: Mapping[str, Any]
) -> Any:
    """The call for ``total`` normalized; readers of the sum read the kernel's second output."""
    add = total.producer()
    assert add is not None
    y, summed = op.node(op_type, [*add.inputs, *vectors], attributes, domain=DOMAIN, outputs=2)
    for value in (y, summed):
        value.type, value.shape = total.type, total.shape
    substitute(total, summed)
    remove_unused([add])
    return y


def _between(root: ir.Node, add: ir.Node, vectors: Sequence[ir.Value]) -> set[ir.Node]:
    """The nodes of the normalization, ``root`` included: all that leads from the sum to it."""
    found: set[ir.Node] = set()
    open_ = [root]
    while open_:
        node = open_.pop()
        if node is add or node in found:
            continue
        found.add(node)
        inputs = [v for v in node.inputs if v is not None and v not in vectors]
        open_ += [p for v in inputs if (p := v.producer()) is not None and p.op_type != "Constant"]
    return found
