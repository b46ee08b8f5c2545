"""Cross-layer equalization: weights of neighbouring layers get the same range in each channel between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, graphs
from optkit.passes.base import Context, GraphPass
from optkit.passes.fusion.weights import Port
from optkit.passes.quantization.links import Link, links
from optkit.rewrite import Change, Names, label

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# A pair is left alone when no channel would change by more than this factor.
_ENOUGH = 1.05
# Rounds over all pairs; each brings them closer, and some ten are usually enough.
_ROUNDS = 100


class EqualizeLayers(GraphPass):
    """Scale the channels between two layers so that both layers' weights have the same range in each.

    ``s_i = sqrt(r1_i / r2_i)`` with the ranges ``r1_i = max |W1[i]|`` and ``r2_i = max |W2[:, i]|``; the first layer is
    divided by ``s``, the second multiplied, all pairs in turn until nothing changes (Nagel et al., "Data-Free Quantization
    Through Weight Equalization and Bias Correction", 2019, arXiv:1906.04721, eq. 11). Needs no data. Exact but for
    rounding where only functions with ``f(s x) = s f(x)`` lie between: Relu, LeakyRelu and pools, but not Clip.

    Channels that are zero on either side keep their scale.
    """

    name: ClassVar[str] = "equalize-layers"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Equalize all pairs."""
        names, changed = Names(model), dict[str, Change]()
        pairs = [
            link for graph in graphs(model) for link in links(graph) if link.source.node.op_type in _LAYERS
        ]
        for _ in range(_ROUNDS):
            moved = False
            for link in pairs:
                factor = 1 / _scale(link)
                if max(factor.max(), (1 / factor).max()) > _ENOUGH and link.rescale(factor, names):
                    moved = True
                    where = ", ".join(label(r.node) for r in link.readers)
                    change = Change(rule=self.name, node=label(link.source.node), detail=f"with {where}")
                    changed[change.node] = change
            if not moved:
                break
        return list(changed.values())


def _scale(link: Link) -> np.ndarray:
    """``[channels]``: what the source is divided by."""
    made = output_range(link.source)
    read = np.max([input_range(r) for r in link.readers], axis=0)
    usable = (made > 0) & (read > 0) & np.isfinite(made) & np.isfinite(read)
    scale: np.ndarray = np.sqrt(np.where(usable, made, 1) / np.where(usable, read, 1))
    return scale


def output_range(port: Port) -> np.ndarray:
    """``[channels]``: the largest magnitude among the weights of each output channel."""
    node, held = port.node, _magnitudes(port.node)
    axes: tuple[int, ...]
    match node.op_type:
        case "ConvTranspose":
            group = node.attributes.get_int("group", 1)
            held, axes = held.reshape(group, -1, held.shape[1], held[0, 0].size), (1, 3)
        case "MatMul":
            axes = (0,)
        case "Gemm" if not attribute(node, "transB", 0):
            axes = (0,)
        case _:
            axes = tuple(range(1, held.ndim))
    return np.asarray(held.max(axes)).reshape(-1)


def input_range(port: Port) -> np.ndarray:
    """``[channels]``: the largest magnitude among the weights that each input channel is multiplied with."""
    node, held = port.node, _magnitudes(port.node)
    axes: tuple[int, ...]
    match node.op_type:
        case "Conv":
            group = node.attributes.get_int("group", 1)
            held, axes = held.reshape(group, -1, held.shape[1], held[0, 0].size), (1, 3)
        case "Gemm" if attribute(node, "transB", 0):
            axes = (0,)
        case _:
            axes = tuple(range(1, held.ndim))
    return np.asarray(held.max(axes)).reshape(-1)


def _magnitudes(node: ir.Node) -> np.ndarray:
    weight = constant(node.inputs[1])
    assert weight is not None
    return np.asarray(np.abs(weight), np.float64)
