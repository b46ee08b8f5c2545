"""What the compiler knows about an ONNX operator; one row an operator, in the file of its family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from optkit.graph import attribute, elements


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSpec:
    """One operator.

    Attributes:
        name: ONNX operator type, standard domain.
        family: ``conv``, ``matmul``, ``elementwise``, ``norm``, ``attention``, ``reduce``, ``shape`` or ``quant``.
        activations: Inputs that a static quantizer may put on an integer grid; None for all, however many there are.
        weight: Input with the weights, where the operator has one.
        bias: Input with the bias.
        channel_axis: Axis of the weights along which output channels lie; takes the node.
        same_grid: The output holds nothing but values of input 0, so scale and zero point pass through; may take the
            node to tell.
        activation: Elementwise and monotone or smooth: may be merged into the operator before it.
        macs: Multiply-accumulates of one run at the shapes that the graph states; None where they are symbolic.
    """

    name: str
    family: str
    activations: tuple[int, ...] | None = (0,)
    weight: int | None = None
    bias: int | None = None
    channel_axis: Callable[[ir.Node], int] | None = None
    same_grid: bool | Callable[[ir.Node], bool] = False
    activation: bool = False
    macs: Callable[[ir.Node], int | None] | None = None

    def operands(self, node: ir.Node) -> list[ir.Value]:
        """The inputs of ``node`` that ``activations`` names, as far as they are there."""
        count = len(node.inputs)
        chosen = range(count) if self.activations is None else (i for i in self.activations if i < count)
        return [value for i in chosen if (value := node.inputs[i]) is not None]

    def keeps_grid(self, node: ir.Node) -> bool:
        """Whether scale and zero point of input 0 are those of the output."""
        return self.same_grid(node) if callable(self.same_grid) else self.same_grid


def conv_macs(node: ir.Node) -> int | None:
    """Output elements times the weights that each reads."""
    out, weight = elements(node.outputs[0].shape), _static(node.inputs[1])
    return None if out is None or weight is None else out * math.prod(weight[1:])


def conv_transpose_macs(node: ir.Node) -> int | None:
    """Input elements times the weights that each is spread over."""
    x, weight = elements(_shape(node.inputs[0])), _static(node.inputs[1])
    return None if x is None or weight is None else x * math.prod(weight[1:])


def matmul_macs(node: ir.Node) -> int | None:
    """Output elements times the length of the contracted axis."""
    out, a = elements(node.outputs[0].shape), _shape(node.inputs[0])
    if out is None or a is None or not isinstance(a[-1], int):
        return None
    return out * a[-1]


def gemm_macs(node: ir.Node) -> int | None:
    """Output elements times the length of the contracted axis, transposed or not."""
    out, a = elements(node.outputs[0].shape), _shape(node.inputs[0])
    if out is None or a is None:
        return None
    inner = a[0 if attribute(node, "transA", 0) else 1]
    return out * inner if isinstance(inner, int) else None


def recurrent_macs(node: ir.Node) -> int | None:
    """Each step multiplies input and state with all weights of both."""
    x, weights = _shape(node.inputs[0]), [elements(_shape(v)) for v in node.inputs[1:3]]
    if x is None or len(x) != 3 or len(weights) != 2:
        return None
    steps = [d for d in x.dims[:2] if isinstance(d, int)]
    known = [w for w in weights if w is not None]
    return math.prod(steps) * sum(known) if len(steps) == len(known) == 2 else None


def _shape(value: ir.Value | None) -> ir.Shape | None:
    return None if value is None else value.shape


def _static(value: ir.Value | None) -> tuple[int, ...] | None:
    shape = _shape(value)
    return shape.numpy() if shape is not None and shape.is_static() else None
