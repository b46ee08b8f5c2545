"""SmoothQuant: what is hard to quantize moves from activations into the weights that they are multiplied with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.graph import rank
from optkit.passes.base import Context, GraphPass
from optkit.passes.fusion.weights import Port, store, take_input
from optkit.passes.quantization.calibrate import observe_channels
from optkit.passes.quantization.equalize import input_range
from optkit.passes.quantization.links import Link, links, readers
from optkit.rewrite import Builder, Change, Names, label

# A value is left alone when no channel would change by more than this factor.
_ENOUGH = 1.05
# Rounds over all values: a layer may be the reader of one and the source of the next.
_ROUNDS = 100


class SmoothActivations(GraphPass):
    """Divide the channels of activations, and multiply the weights that read them, so that outlier channels shrink.

    ``s_j = max |X_j| ** alpha / max |W_j| ** (1 - alpha)`` for every channel j in front of matrix products and convolutions
    (Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2023,
    arXiv:2211.10438, eq. 4). The division goes into the norm or layer that makes the activations, where only functions
    with ``f(s x) = s f(x)`` lie between; then the graph costs what it did. Exact but for rounding.

    Attributes:
        alpha: How much of the difficulty moves; 0.5 shares it evenly.
        insert: Whether values that no layer can divide get a ``Mul`` in front of their products.
    """

    name: ClassVar[str] = "smooth-activations"
    needs_data: ClassVar[bool] = True

    alpha: float = Field(default=0.5, ge=0, le=1)
    insert: bool = False

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Observe once, then smooth until nothing changes."""
        found = list(links(model.graph))
        free = {link.value: link for link in found}
        apart = _apart(model, free) if self.insert else {}
        axes = {link.value: link.axis for link in found} | {value: axis for value, (axis, _) in apart.items()}
        if not axes:
            return []
        seen = observe_channels(model, {str(v.name): axis for v, axis in axes.items()}, "ReduceMax", context)
        largest = {v: seen[str(v.name)] for v in axes}
        names, changed = Names(model), dict[str, Change]()
        for _ in range(_ROUNDS):
            moved = False
            for link in found:
                scale = self._scale(largest[link.value], link.readers)
                if _matters(scale) and link.rescale(1 / scale, names):
                    largest[link.value] = largest[link.value] / scale
                    changed[str(link.value.name)] = self._change(link.source.node, link.readers)
                    moved = True
            if not moved:
                break
        for value, (_, ports) in apart.items():
            scale = self._scale(largest[value], ports)
            if _matters(scale) and _insert(value, ports, scale, names):
                changed[str(value.name)] = self._change(ports[0].node, ports)
        return list(changed.values())

    def _scale(self, activations: np.ndarray, ports: Sequence[Port]) -> np.ndarray:
        """``[channels]``: what the activations are divided by."""
        weights = np.max([input_range(p) for p in ports], axis=0)
        usable = (activations > 0) & (weights > 0) & np.isfinite(activations) & np.isfinite(weights)
        x, w = np.where(usable, activations, 1), np.where(usable, weights, 1)
        scale: np.ndarray = np.where(usable, x**self.alpha / w ** (1 - self.alpha), 1)
        return scale

    def _change(self, node: ir.Node, ports: Sequence[Port]) -> Change:
        return Change(
            rule=self.name, node=label(node), detail=f"into {', '.join(label(p.node) for p in ports)}"
        )


def _matters(scale: np.ndarray) -> bool:
    return bool(max(scale.max(), (1 / scale).max()) > _ENOUGH)


def _apart(model: ir.Model, free: Mapping[ir.Value, Link]) -> dict[ir.Value, tuple[int, list[Port]]]:
    """Values in front of matrix products that no layer can divide, with the axis of their channels and the products."""
    found: dict[ir.Value, tuple[int, list[Port]]] = {}
    values = [node.inputs[0] for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    for value in dict.fromkeys(values):
        axes = rank(value)
        if (
            value is None
            or value in free
            or value.const_value is not None
            or axes is None
            or _smoothed(value)
        ):
            continue
        ports = [
            p for p in readers(value) if p.node.op_type in ("MatMul", "Gemm") and p.node.graph is model.graph
        ]
        if ports:
            found[value] = (axes - 1, ports)
    return found


def _smoothed(value: ir.Value) -> bool:
    """Whether a factor for each channel was multiplied in right before: by an earlier run."""
    node = value.producer()
    return node is not None and node.metadata_props.get("optkit.smoothed") == "yes"


def _insert(value: ir.Value, ports: Sequence[Port], scale: np.ndarray, names: Names) -> bool:
    edits = [take_input(p, scale, np.zeros_like(scale)) for p in ports]
    dtype = value.dtype
    if any(e is None for e in edits) or dtype is None:
        return False
    store([edit for group in edits if group is not None for edit in group], names)
    first = next(n for n in ports[0].node.graph or () if any(n is p.node for p in ports))
    divided = Builder(first, names).Mul(value, (1 / scale).astype(dtype.numpy()))
    maker = divided.producer()
    assert maker is not None
    maker.metadata_props["optkit.smoothed"] = "yes"
    for port in ports:
        port.node.replace_input_with(0, divided)
    return True
