"""Weights in 8 or 4 bits, computed with in float."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.graph import drop_unused_initializers
from optkit.passes.base import Context, GraphPass
from optkit.passes.quantization.compensate import compensated, observed, remembered
from optkit.passes.quantization.rounding import as_rows, from_rows
from optkit.passes.quantization.stored import Site, sites
from optkit.rewrite import Change, Names, register

# Shares of the largest weight of a block that the largest integer may stand for; the one with the least squared error is
# taken. Rounding half a step more or less is worth more than the few weights that are cut off, in 4 bits.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# All of four bits: without -8 the squared error of SmolLM2's weights is a sixth more.
_LOW, _HIGH = -8, 7
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


class QuantizeWeights(GraphPass):
    """Store weights of products, convolutions and looked-up tables as integers with scales.

    Before: ``MatMul(x, w)``. After: ``MatMul(x, DequantizeLinear(q, scale))`` with symmetric ``q``: in 8 bits a scale for
    each output channel, in 4 bits a scale for each ``block`` of weights along the summed axis. Weights that blocks do not
    divide, and kernels wider than one element, take 8 bits. Activations stay as they are.

    Attributes:
        bits: Of each weight.
        block: How many weights share a scale, in 4 bits.
        rest: Whether weights that cannot have 4 bits are stored in 8; without it they are left to another pass.
        least: Down to how many may share one, where ``block`` does not divide them; ``block`` when left out.
        negative: Whether scales of blocks may be negative, so that the lowest integer, which is larger than the highest, stands for
            the largest weight whatever its sign. TensorRT refuses such scales.
        compensate: Whether weights make up for each other's errors on the calibration data
            (``optkit.passes.quantization.compensate``); without data each is rounded to nearest.
        targets: Globs, or ``re:`` expressions, of node names, operators or module paths to quantize; ``=name`` is the one
            node of that name.
        ignore: The same, for what stays in float.
        smallest: Weights with fewer elements stay in float.
    """

    name: ClassVar[str] = "quantize-weights"
    exact: ClassVar[bool] = False

    bits: Literal[4, 8] = 8
    block: int = Field(default=32, ge=16)
    least: int | None = Field(default=None, ge=8)
    rest: bool = True
    negative: bool = False
    compensate: bool = False
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    smallest: int = 2048

    def needs_format(self, context: Context) -> str | None:
        """That of 4 bits; any target reads integers of 8."""
        return "w4a16" if self.bits == 4 else None

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Store every suitable constant."""
        self.refuse(context)
        changes: list[Change] = []
        names = Names(model)
        chosen = [
            site
            for site in sites(model, self.targets, self.ignore, self.smallest)
            if self.rest or self.bits == 8 or self._block(site) is not None
        ]
        found = self._found(model, chosen, context)
        for site in chosen:
            block = self._block(site)
            integers, scale = found[str(site.value.name)]
            _store(site, integers, scale, block, names)
            detail = f"s4 in blocks of {block}" if block else "s8 per channel"
            changes.append(
                Change(
                    rule=self.name,
                    node=str(site.node.name),
                    detail=f"{site.node.op_type} weights to {detail}",
                )
            )
        if changes:
            drop_unused_initializers(model)
        return changes

    def _block(self, site: Site) -> int | None:
        """How many weights share a scale in 4 bits; None for weights that take 8."""
        shape = site.array.shape
        if self.bits == 8 or math.prod(shape[2:]) != 1:
            return None
        sizes = range(self.block, (self.least or self.block) - 1, -1)
        return next((b for b in sizes if shape[site.inputs] % b == 0), None)

    def _found(
        self, model: ir.Model, chosen: Sequence[Site], context: Context
    ) -> Mapping[str, tuple[np.ndarray, ...]]:
        """Integers and scales by the names of the weights."""
        if not self.compensate:
            return {str(s.value.name): self._rounded(s, None) for s in chosen}
        known = remembered(context, (self.name, self.bits, self.block, self.least, self.negative))
        missing = [s for s in chosen if str(s.value.name) not in known]
        for site, moments in observed(model, missing, context):
            known[str(site.value.name)] = self._rounded(site, moments)
        return known

    def _rounded(self, site: Site, moments: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        weight, block = site.array, self._block(site)
        if block is None:
            integers, scale = _channels(weight, site.outputs)
        else:
            integers, scale = _blocks(weight, site.inputs, block, negative=self.negative)
        if moments is None:
            return integers, scale
        if block is None:
            spread = np.broadcast_to(
                scale.reshape([-1 if i == site.outputs else 1 for i in range(weight.ndim)]), weight.shape
            )
        else:
            spread = np.repeat(scale, block, site.inputs)
        low, high = (-127, 127) if block is None else (_LOW, _HIGH)
        steps = as_rows(site.node, np.ascontiguousarray(spread)).astype(np.float64)

        def nearest(j: int, values: np.ndarray) -> np.ndarray:
            return np.clip(np.rint(values / steps[:, :, j]), low, high) * steps[:, :, j]

        rounded = compensated(as_rows(site.node, weight), moments, nearest)
        return from_rows(site.node, np.rint(rounded / steps).astype(np.int8), weight.shape), scale


def _channels(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.maximum(np.abs(weight).max(axis=others) / 127, _SMALLEST_SCALE).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return np.clip(np.rint(weight / scale.reshape(shape)), -127, 127).astype(np.int8), scale


def _blocks(
    weight: np.ndarray, axis: int, block: int, *, negative: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Integers from -8 to 7 and scales ``[..., in // block, ...]``."""
    shape = [*weight.shape[:axis], weight.shape[axis] // block, block, *weight.shape[axis + 1 :]]
    parts = weight.reshape(shape)
    top = np.abs(parts).max(axis=axis + 1, keepdims=True)
    least = np.float32(_SMALLEST_SCALE)
    candidates = [np.maximum(top * np.float32(share / _HIGH), least) for share in _SHARES]
    if negative:
        # -8 stands for the largest weight, which where that is positive takes a negative scale.
        sign = np.where(parts.max(axis=axis + 1, keepdims=True) == top, np.float32(-1), np.float32(1))
        candidates += [sign * np.maximum(top * np.float32(share / -_LOW), least) for share in _SHARES]
    best = np.full(top.shape, np.inf, np.float32)
    scale = np.empty(top.shape, np.float32)
    for candidate in candidates:
        rounded = np.clip(np.rint(parts / candidate), _LOW, _HIGH)
        error = np.square(rounded * candidate - parts).sum(axis=axis + 1, keepdims=True)
        better = error < best
        scale, best = np.where(better, candidate, scale), np.where(better, error, best)
    integers = np.clip(np.rint(parts / scale), _LOW, _HIGH).astype(np.int8).reshape(weight.shape)
    return integers, np.squeeze(scale, axis + 1)


def _store(site: Site, integers: np.ndarray, scale: np.ndarray, block: int | None, names: Names) -> None:
    name = str(site.value.name)
    dtype = ir.DataType.INT8 if block is None else ir.DataType.INT4
    held = ir.Tensor(integers.astype(dtype.numpy()), dtype=dtype)
    q = register(site.graph, names.new(f"{name}/q"), held)
    s = register(site.graph, names.new(f"{name}/scale"), scale)
    attributes = {"axis": site.outputs} if block is None else {"axis": site.inputs, "block_size": block}
    node = ir.node(
        "DequantizeLinear", [q, s], attributes=attributes, name=names.new(f"{name}/DequantizeLinear")
    )
    site.replace(node, names.new(f"{name}/dq"))
