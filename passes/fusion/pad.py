"""Zero padding becomes an attribute of the convolution behind it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from optkit.graph import attribute, constant, rank, scalar, walk
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, Match

logger = logging.getLogger(__name__)


def _pads(node: ir.Node, axes: int) -> list[int] | None:
    """Begin and end of every axis, as in the ``pads`` of a Pad with all ``axes``; None where they are not known."""
    amounts = constant(node.inputs[1])
    if amounts is None:
        return None
    chosen = constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    if len(node.inputs) > 3 and node.inputs[3] is not None and chosen is None:
        return None
    places = list(range(axes)) if chosen is None else [int(a) % axes for a in chosen]
    full = [0] * (2 * axes)
    for index, axis in enumerate(places):
        full[axis], full[axes + axis] = int(amounts[index]), int(amounts[len(places) + index])
    return full


def _check(x: ir.Value, root: ir.Node, pad: ir.Node) -> Match:
    match, axes = Match(), rank(x)
    if axes is None:
        return match.fail("the rank of the input is not known", x)
    if attribute(pad, "mode", "constant") != "constant":
        return match.fail(f"the padding is {attribute(pad, 'mode')}", pad)
    if len(pad.inputs) > 2 and pad.inputs[2] is not None and scalar(pad.inputs[2]) != 0:
        return match.fail("the padding is not 0", pad)
    amounts = _pads(pad, axes)
    if amounts is None:
        return match.fail("the amounts are not constant", pad)
    if min(amounts) < 0:
        return match.fail("it crops", pad)
    if any(amounts[:2]) or any(amounts[axes : axes + 2]):
        return match.fail("it pads the batch or the channels", pad)
    if attribute(root, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return match.fail("the convolution pads by itself", root)
    return match


def _fold(conv: ir.Node, pad: ir.Node, x: ir.Value) -> None:
    axes = rank(x)
    amounts = _pads(pad, axes or 0)
    assert axes is not None and amounts is not None
    own: Any = attribute(conv, "pads", [0] * (2 * (axes - 2)))
    added = amounts[2:axes] + amounts[axes + 2 :]
    conv.attributes.pop("auto_pad", None)
    conv.attributes["pads"] = ir.AttrInt64s("pads", [int(a) + b for a, b in zip(own, added, strict=True)])
    conv.replace_input_with(0, x)


class FoldPad(GraphPass):
    """Move a Pad with zeros on the spatial axes into the ``pads`` of the Conv that reads it.

    Before: ``Conv(Pad(x, pads, 0), w)``. After: ``Conv(x, w, pads=...)``. Exact: a convolution pads with zeros. The Pad
    goes when no other node reads it.
    """

    name: ClassVar[str] = "fold-pad"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Fold every suitable Pad."""
        changes: list[Change] = []
        for node in tuple(walk(model)):
            if node.op_type != "Conv" or node.domain != "" or node.inputs[0] is None:
                continue
            pad = node.inputs[0].producer()
            if pad is None or pad.op_type != "Pad" or pad.domain != "" or pad.inputs[0] is None:
                continue
            x = pad.inputs[0]
            if verdict := _check(x, node, pad):
                _fold(node, pad, x)
                if (
                    not pad.outputs[0].uses()
                    and not pad.outputs[0].is_graph_output()
                    and pad.graph is not None
                ):
                    pad.graph.remove(pad, safe=True)
                changes.append(Change(rule=self.name, node=str(node.name)))
            else:
                logger.debug("%s: %s", node.name, verdict.reason)
        return changes
