"""Linear layers on floats of 4 or 8 bits with a scale for each short block, of activations while the model runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, describe, drop_unused_initializers, rank, walk
from optkit.microscaling import (
    BLOCK_FORMATS,
    DOMAIN,
    BlockFormat,
    block_scales,
    define,
    steps_of,
    tensor_scale,
    to_grid,
)
from optkit.passes.base import Context, GraphPass
from optkit.passes.quantization.calibrate import observe
from optkit.passes.quantization.stored import Site, sites
from optkit.rewrite import Builder, Change, Names, register

logger = logging.getLogger(__name__)

# TensorRT, "DynamicQuantize": "input and output_data are 2D or 3D tensors".
_RANKS = (2, 3)
# Multiples of the scale at which the largest weight of a block is the largest number. Between 4 and 6 there is none: blocks
# of large weights are better off where the largest is 4.
_SHARES = (1.0, 0.8, 0.9, 1.1, 1.25, 1.5)


class QuantizeMicroscaling(GraphPass):
    """Products with constant matrices read both operands in NVFP4 or MXFP8, with a scale for each block along the summed axis.

    OCP Microscaling Formats (MX) Specification v1.0, and NVIDIA's NVFP4: ``optkit.microscaling``. Scales of activations are
    computed when the model runs. NVFP4 has one more scale for a whole tensor, which for activations comes from calibration
    data; without data it is 1, which holds blocks whose largest number is between 0.01 and 2688.

    Before: ``MatMul(x, w)``. After: ``MatMul(Nvfp4Dequantize(Nvfp4Quantize(x, s), s), Nvfp4Dequantize(q, scales, t))``, functions
    in the domain ``optkit``. What blocks do not divide stays in float.

    Attributes:
        format: Of both operands.
        targets: Globs, or ``re:`` expressions, of node names, operators or module paths to quantize; ``=name`` is the one
            node of that name.
        ignore: The same, for what stays in float.
        smallest: Weights with fewer elements stay in float.
    """

    name: ClassVar[str] = "quantize-microscaling"
    exact: ClassVar[bool] = False

    format: Literal["nvfp4", "mxfp8"] = "nvfp4"
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    smallest: int = 2048

    def needs_format(self, context: Context) -> str:
        """Of both operands."""
        return self.format

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Quantize every suitable product."""
        self.refuse(context)
        fmt, names = BLOCK_FORMATS[self.format], Names(model)
        found = [s for s in sites(model, self.targets, self.ignore, self.smallest) if _suits(s, fmt)]
        readers = {use.node for site in found for use in site.value.uses()}
        chosen = [node for node in walk(model) if node in readers]
        scales = _scales(model, chosen, fmt, context)
        for site in found:
            _store(site, fmt, names)
        made: dict[tuple[ir.Value, object], ir.Value] = {}
        changes = list[Change]()
        for node in chosen:
            x = node.inputs[0]
            assert x is not None
            place = x, node.graph
            if place not in made:
                made[place] = _activations(x, node, fmt, scales.get(x), names)
            node.replace_input_with(0, made[place])
            detail = f"{node.op_type} to {fmt.name} x {fmt.name} in blocks of {fmt.size}"
            changes.append(Change(rule=self.name, node=str(node.name), detail=detail))
        if changes:
            define(model)
            drop_unused_initializers(model)
        return changes


def _suits(site: Site, fmt: BlockFormat) -> bool:
    depth = site.array.shape[site.inputs]
    nodes = [use.node for use in site.value.uses()]
    if not all(node.op_type in ("MatMul", "Gemm") for node in nodes):
        return False
    if depth % fmt.size:
        logger.info("%s stays in float: blocks of %d do not divide %d", describe(site.node), fmt.size, depth)
        return False
    return all(_plain(node) for node in nodes)


def _plain(node: ir.Node) -> bool:
    x = node.inputs[0]
    if x is None or (node.op_type == "Gemm" and attribute(node, "transA", 0)):
        return False
    if rank(x) not in _RANKS:
        logger.info("%s stays in float: its activations are not of 2 or 3 axes", describe(node))
    return rank(x) in _RANKS


def _scales(
    model: ir.Model, nodes: Sequence[ir.Node], fmt: BlockFormat, context: Context
) -> Mapping[ir.Value | None, np.float32]:
    """For nested formats the scale of each value that ``nodes`` multiply."""
    values = [x for x in dict.fromkeys(node.inputs[0] for node in nodes) if x is not None]
    if not fmt.nested or not values:
        return {}
    # What is in bodies of If and Loop is not observed.
    known = [x for x in values if x.graph is model.graph and x.name]
    if context.data is None or not known:
        return dict.fromkeys(values, np.float32(1))
    seen = observe(model, [str(x.name) for x in known], "min-max", 100.0, context)
    largest = {x: max(-seen[str(x.name)].low, seen[str(x.name)].high) for x in known}
    return {x: tensor_scale(float(largest[x])) if x in largest else np.float32(1) for x in values}


def _store(site: Site, fmt: BlockFormat, names: Names) -> None:
    name, weight, axis = str(site.value.name), site.array, site.inputs
    scale = tensor_scale(float(np.abs(weight).max())) if fmt.nested else None
    scales = block_scales(weight, fmt, axis, scale, _SHARES)
    numbers = to_grid(weight / steps_of(scales, fmt, axis, scale), fmt).astype(fmt.held.numpy())
    inputs = [
        register(site.graph, names.new(f"{name}/q"), ir.Tensor(numbers, dtype=fmt.held)),
        register(site.graph, names.new(f"{name}/scales"), ir.Tensor(scales, dtype=fmt.scales)),
    ]
    if scale is not None:
        inputs.append(register(site.graph, names.new(f"{name}/scale"), np.asarray(scale)))
    node = ir.node(
        fmt.dequantize,
        inputs,
        attributes={"axis": axis},
        domain=DOMAIN,
        name=names.new(f"{name}/{fmt.dequantize}"),
    )
    site.replace(node, names.new(f"{name}/dq"))


def _activations(
    x: ir.Value, reader: ir.Node, fmt: BlockFormat, scale: np.float32 | None, names: Names
) -> ir.Value:
    """``x`` in blocks and back, in front of the first that reads it."""
    op = Builder(reader, names)
    more = [] if scale is None else [op.constant(np.asarray(scale), "scale")]
    q, scales = op.node(fmt.quantize, [x, *more], domain=DOMAIN, outputs=2)
    q.type, q.shape = ir.TensorType(fmt.held), x.shape
    scales.type = ir.TensorType(fmt.scales)
    if x.shape is not None:
        last = x.shape[-1]
        scales.shape = ir.Shape([*x.shape[:-1], last // fmt.size if isinstance(last, int) else None])
    (found,) = op.node(fmt.dequantize, [q, scales, *more], {"axis": -1}, domain=DOMAIN)
    found.type, found.shape = x.type, x.shape
    return found
