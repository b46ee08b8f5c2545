"""Weights and biases on their way to integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optkit.formats import FORMATS
from optkit.graph import constant
from optkit.ops import spec
from optkit.passes.fusion.weights import Edit
from optkit.passes.fusion.weights import store as store_constants
from optkit.passes.quantization.correction import shift_of
from optkit.passes.quantization.rounding import as_rows, from_rows, round_by_outputs
from optkit.qdq import (
    Stored,
    dequantize,
    dequantize_constant,
    quantized_tensor,
    scale_zero,
    store,
    weight_range,
)
from optkit.rewrite import Names, label
from optkit.saturation import SAFE, note_narrowed

if TYPE_CHECKING:
    from optkit.placement import Placement


class Weights:
    """Weights and biases on their way to integers; what several nodes read alike is stored once.

    Attributes:
        narrow: By label of the node, the output channels that get 7 bits.
        means: ``[channels]`` mean of the values that nodes read, by name of the value; where there is one, biases are
            corrected.
        moments: ``[groups, in, in]`` second moments of what nodes read; the weights of these are rounded by the outputs.
    """

    def __init__(self, placement: Placement, names: Names, narrow: Mapping[str, np.ndarray]) -> None:
        self.narrow = narrow
        self._fmt, self._per_channel, self.names = FORMATS[placement.weight], placement.per_channel, names
        self._bias = placement.bias
        self.means: Mapping[str, np.ndarray] = {}
        self.moments: Mapping[ir.Node, np.ndarray] = {}
        self._ranges: dict[tuple[ir.Value, int | None], np.ndarray] = {}
        self._stored: dict[tuple[ir.Value, int | None, bytes, ir.Value | None], Stored] = {}

    def _parts(self, node: ir.Node) -> tuple[ir.Value, int | None, np.ndarray | None]:
        """Weight, its channel axis, and the bias."""
        known = spec(node)
        assert known is not None
        assert known.weight is not None
        assert known.channel_axis is not None
        weight = node.inputs[known.weight]
        assert weight is not None
        index = known.bias
        bias = None if index is None or index >= len(node.inputs) else constant(node.inputs[index])
        return weight, known.channel_axis(node) if self._per_channel else None, bias

    def _range(self, weight: ir.Value, axis: int | None) -> np.ndarray:
        assert weight.const_value is not None
        if (weight, axis) not in self._ranges:
            self._ranges[weight, axis] = weight_range(weight.const_value.numpy(), axis)
        return self._ranges[weight, axis]

    def finite(self, node: ir.Node) -> bool:
        """Whether weights and bias are all numbers."""
        weight, axis, bias = self._parts(node)
        return bool(
            np.isfinite(self._range(weight, axis)).all() and (bias is None or np.isfinite(bias).all())
        )

    def _rounded(
        self, node: ir.Node, weight: np.ndarray, scale: np.ndarray, moments: np.ndarray
    ) -> np.ndarray:
        """Integers for ``weight`` that keep what each output is."""
        rows = as_rows(node, weight)
        scales = scale.reshape(len(rows), -1) if scale.ndim else np.broadcast_to(scale, (len(rows), 1))
        parts = [round_by_outputs(r, s, m, self._fmt) for r, s, m in zip(rows, scales, moments, strict=True)]
        return from_rows(node, np.stack(parts), weight.shape)

    def _corrected(self, node: ir.Node, bias: np.ndarray | None, shift: np.ndarray) -> np.ndarray:
        """The bias less ``shift``, stored as the input of the node."""
        new = ((0.0 if bias is None else bias.astype(np.float64)) - shift).astype(np.float32)
        store_constants([Edit(node=node, index=2, array=new)], self.names)
        return new

    def quantize(self, node: ir.Node, x_scale: np.ndarray) -> None:
        """Weights to integers, and the bias to int32 on the grid of the products."""
        weight, axis, bias = self._parts(node)
        known = spec(node)
        assert known is not None
        assert known.weight is not None
        assert isinstance(node.graph, ir.Graph)
        top = self._range(weight, axis).astype(np.float64)
        if bias is not None and self._bias:
            # The bias must fit into int32 on the grid x_scale * w_scale: channels whose weights are nearly 0 get a
            # coarser grid. Half of int32 is left to the products.
            smallest = np.maximum(np.abs(bias.astype(np.float64)) / 2.0**30, np.finfo(np.float32).tiny)
            need = smallest / float(x_scale) * self._fmt.high
            top = np.maximum(top, need if top.ndim else need.max(initial=0.0))
        channels = self.narrow.get(label(node))
        if channels is not None:
            # One step less than what is safe: the bias may have made the grid of a channel coarser, never finer.
            top = np.where(channels if top.ndim else channels.any(), top * self._fmt.high / (SAFE - 1), top)
            note_narrowed(node, channels if top.ndim else np.ones_like(channels))
        scale, zero = scale_zero(-top, top, self._fmt)
        x = node.inputs[0]
        assert x is not None
        moments = self.moments.get(node)
        key = (weight, axis, scale.tobytes(), None if moments is None else x)
        if key not in self._stored:
            assert weight.const_value is not None
            name = str(weight.name)
            if moments is None:
                tensor = quantized_tensor(weight.const_value, scale, zero, self._fmt, axis, name)
            else:
                tensor = ir.tensor(self._rounded(node, weight.const_value.numpy(), scale, moments), name=name)
            self._stored[key] = store(node.graph, name, tensor, scale, zero, axis, self.names)
        if str(x.name) in self.means and (bias is not None or node.op_type != "MatMul"):
            integers, floats = self._stored[key].integers.const_value, weight.const_value
            assert integers is not None
            assert floats is not None
            error = dequantize(integers.numpy(), scale, zero, axis) - floats.numpy()
            bias = self._corrected(node, bias, shift_of(node, error, self.means[str(x.name)]))
        dequantize_constant(node, known.weight, self._stored[key], f"{node.name}/weight", self.names)
        if bias is not None and self._bias:
            assert known.bias is not None
            b_scale = (x_scale * scale).astype(np.float32)
            q = np.round(bias.astype(np.float64) / b_scale).astype(np.int32)
            if b_scale.ndim:
                b_scale = np.broadcast_to(b_scale, q.shape)
            zeros = np.zeros(b_scale.shape, np.int32)
            axis = 0 if b_scale.ndim else None
            stored = store(node.graph, f"{node.name}/bias", q, b_scale, zeros, axis, self.names)
            dequantize_constant(node, known.bias, stored, f"{node.name}/bias", self.names)
