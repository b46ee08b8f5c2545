"""Weights in 8 or 4 bits, computed with in float."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.graph import drop_unused_initializers
from optkit.passes.base import Context, GraphPass
from optkit.passes.quantization.stored import Site, sites
from optkit.rewrite import Change, Names, register

# Shares of the largest weight of a block that the largest integer may stand for; the one with the least squared error is
# taken. Rounding half a step more or less is worth more than the few weights that are cut off, in 4 bits.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


class QuantizeWeights(GraphPass):
    """Store weights of products, convolutions and looked-up tables as integers with scales.

    Before: ``MatMul(x, w)``. After: ``MatMul(x, DequantizeLinear(q, scale))`` with symmetric ``q``: in 8 bits a scale for
    each output channel, in 4 bits a scale for each ``block`` of weights along the summed axis. Weights that blocks do not
    divide, and kernels wider than one element, take 8 bits. Activations stay as they are.

    Attributes:
        bits: Of each weight.
        block: How many weights share a scale, in 4 bits.
        targets: Globs, or ``re:`` expressions, of node names, operators or module paths to quantize; ``=name`` is the one
            node of that name.
        ignore: The same, for what stays in float.
        smallest: Weights with fewer elements stay in float.
    """

    name: ClassVar[str] = "quantize-weights"
    exact: ClassVar[bool] = False

    bits: Literal[4, 8] = 8
    block: int = Field(default=32, ge=16)
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    smallest: int = 2048

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Store every suitable constant."""
        changes: list[Change] = []
        names = Names(model)
        for site in tuple(sites(model, self.targets, self.ignore, self.smallest)):
            bits = 4 if self.bits == 4 and self._divides(site) else 8
            if bits == 4:
                integers, scale = _blocks(site.array, site.inputs, self.block)
            else:
                integers, scale = _channels(site.array, site.outputs)
            _store(site, integers, scale, bits, self.block, names)
            detail = f"weights to s{bits}" + (f" in blocks of {self.block}" if bits == 4 else " per channel")
            changes.append(Change(rule=self.name, node=str(site.node.name), detail=detail))
        if changes:
            drop_unused_initializers(model)
        return changes

    def _divides(self, site: Site) -> bool:
        shape = site.array.shape
        return math.prod(shape[2:]) == 1 and shape[site.inputs] % self.block == 0


def _channels(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.maximum(np.abs(weight).max(axis=others) / 127, _SMALLEST_SCALE).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return np.clip(np.rint(weight / scale.reshape(shape)), -127, 127).astype(np.int8), scale


def _blocks(weight: np.ndarray, axis: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers from -7 to 7 and scales ``[..., in // block, ...]``."""
    shape = [*weight.shape[:axis], weight.shape[axis] // block, block, *weight.shape[axis + 1 :]]
    parts = weight.reshape(shape)
    top = np.abs(parts).max(axis=axis + 1, keepdims=True)
    best = np.full(top.shape, np.inf, np.float32)
    scale = np.empty(top.shape, np.float32)
    for share in _SHARES:
        candidate = np.maximum(top * np.float32(share / 7), _SMALLEST_SCALE)
        rounded = np.clip(np.rint(parts / candidate), -7, 7)
        error = np.square(rounded * candidate - parts).sum(axis=axis + 1, keepdims=True)
        better = error < best
        scale, best = np.where(better, candidate, scale), np.where(better, error, best)
    integers = np.clip(np.rint(parts / scale), -7, 7).astype(np.int8).reshape(weight.shape)
    return integers, np.squeeze(scale, axis + 1)


def _store(site: Site, integers: np.ndarray, scale: np.ndarray, bits: int, block: int, names: Names) -> None:
    name = str(site.value.name)
    dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    held = ir.Tensor(integers.astype(dtype.numpy()), dtype=dtype)
    q = register(site.graph, names.new(f"{name}/q"), held)
    s = register(site.graph, names.new(f"{name}/scale"), scale)
    attributes = {"axis": site.inputs, "block_size": block} if bits == 4 else {"axis": site.outputs}
    node = ir.node(
        "DequantizeLinear", [q, s], attributes=attributes, name=names.new(f"{name}/DequantizeLinear")
    )
    site.replace(node, names.new(f"{name}/dq"))
