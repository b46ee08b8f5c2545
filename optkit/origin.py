"""Where in Python code a node comes from: the path of its module and the line, where a graph was exported from code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.graph import graphs, users

if TYPE_CHECKING:
    import onnx_ir as ir

MODULE, SOURCE = "optkit.module", "optkit.source"
_BOTH = (MODULE, SOURCE)


def inherit(model: ir.Model) -> None:
    """Nodes that came later get the origin of what reads them, else of what they read.

    Nothing happens to a graph that knows no origins.
    """
    nodes = [list(graph) for graph in graphs(model)]
    if not any(_known(node) for part in nodes for node in part):
        return
    for part in nodes:
        for node in reversed(part):
            _take(node, [reader for output in node.outputs for reader in users(output)])
        for node in part:
            _take(node, [value.producer() for value in node.inputs if value is not None])


def _known(node: ir.Node) -> bool:
    return any(key in node.metadata_props for key in _BOTH)


def _take(node: ir.Node, neighbours: list[ir.Node] | list[ir.Node | None]) -> None:
    if _known(node):
        return
    origin = next((n for n in neighbours if n is not None and _known(n)), None)
    if origin is not None:
        node.metadata_props.update({k: v for k, v in origin.metadata_props.items() if k in _BOTH})
