"""Grids whose step is 1: convolutions store integers without a division."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import constant, initializer, made_for_one, read_once, users, walk
from optkit.rewrite import Names

# f(s x) = s f(x) for each s above 0; of a Clip where its bounds are multiplied, too.
_HOMOGENEOUS = ("Clip", "LeakyRelu", "PRelu", "Relu")
_WEIGHT = {"Conv": 1, "Gemm": 1, "MatMul": 1}


@dataclass(frozen=True, slots=True)
class _Pair:
    """A pair between layers with weights in integers.

    Attributes:
        maker: What computes the value.
        clips: Between it and the pair.
        readers: All that read it.
        step: Of its grid.
    """

    q: ir.Node
    dq: ir.Node
    maker: ir.Node
    clips: tuple[ir.Node, ...]
    readers: tuple[ir.Node, ...]
    step: float


def unit_steps(model: ir.Model) -> ir.Model | None:
    """A copy in which the steps of grids between convolutions are 1; None where there are none.

    What the step divides by goes into the scales of the weights, and the bias, of the layer before, and what it multiplies with
    into those of the layers behind. The integers are the same, but where two products of scales fall on different sides of a tie.
    OpenVINO multiplies each sum of a convolution with the scale of its weights, and divides by the step behind it, in the kernel;
    a division by 1 it leaves out, and an early layer of a network takes little longer than to store what it computes.
    """
    if not any(True for _ in _pairs(model)):
        return None
    model = model.clone()
    names, factors = Names(model), defaultdict[ir.Node, float](lambda: 1.0)
    for pair in list(_pairs(model)):
        one = initializer(_graph(pair.q), names.new(f"{pair.q.name}/step"), np.ones((), np.float32))
        pair.q.replace_input_with(1, one)
        pair.dq.replace_input_with(1, one)
        factors[pair.maker] /= pair.step
        for reader in pair.readers:
            factors[reader] *= pair.step
        _multiply(pair.maker, 2, 1 / pair.step, names)
        for clip in pair.clips:
            for index in (1, 2):
                _multiply(clip, index, 1 / pair.step, names)
    for node, factor in factors.items():
        weight = _weight(node)
        assert weight is not None
        _multiply(weight, 1, factor, names)
    return model


def _pairs(model: ir.Model) -> Iterator[_Pair]:
    for node in walk(model):
        if node.op_type == "QuantizeLinear" and node.domain == "" and (pair := _pair(node)) is not None:
            yield pair


def _pair(q: ir.Node) -> _Pair | None:
    step = constant(q.inputs[1])
    dq = _reader(q.outputs[0])
    if step is None or step.size != 1 or not _usual(step) or step < 0 or step == 1:
        return None
    if dq is None or dq.inputs[1:] != q.inputs[1:]:
        return None
    maker, clips = made_for_one(q.inputs[0]), []
    while maker is not None and maker.op_type in _HOMOGENEOUS:
        if maker.op_type == "Clip":
            # Before opset 11 its bounds are attributes.
            if maker.attributes:
                return None
            clips.append(maker)
        maker = made_for_one(maker.inputs[0])
    if maker is None or maker.op_type != "Conv" or _weight(maker) is None:
        return None
    fixed = [*maker.inputs[2:3], *(bound for clip in clips for bound in clip.inputs[1:])]
    if any(v is not None and constant(v) is None for v in fixed):
        return None
    value = dq.outputs[0]
    readers = users(value)
    layers = all(
        n.op_type in _WEIGHT and n.domain == "" and n.inputs[0] is value and _weight(n) is not None
        for n in readers
    )
    if not readers or not layers or value.is_graph_output() or len(value.uses()) != len(readers):
        return None
    return _Pair(q=q, dq=dq, maker=maker, clips=tuple(clips), readers=readers, step=float(step.reshape(())))


def _reader(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear that alone reads ``value``."""
    node = users(value)[0] if read_once(value) else None
    return node if node is not None and node.op_type == "DequantizeLinear" and node.domain == "" else None


def _weight(layer: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that gives a layer, and no other, its weights."""
    dq = made_for_one(layer.inputs[_WEIGHT[layer.op_type]], "DequantizeLinear")
    integers = None if dq is None else dq.inputs[0]
    fixed = integers is not None and integers.is_initializer() and not integers.is_graph_input()
    scale = constant(dq.inputs[1]) if dq is not None and fixed else None
    return dq if scale is not None and _usual(scale) else None


def _usual(scale: np.ndarray) -> bool:
    """Whether a few products of such float32 scales are neither 0 nor infinite."""
    return scale.dtype == np.float32 and bool(np.all((np.abs(scale) > 1e-9) & (np.abs(scale) < 1e9)))


def _multiply(node: ir.Node, index: int, factor: float, names: Names) -> None:
    """A constant that a node reads, where it does, times ``factor``; others that read it keep theirs."""
    array = constant(node.inputs[index]) if index < len(node.inputs) else None
    if array is None:
        return
    # The largest number stands for no bound.
    ends = np.finfo(array.dtype)
    made = np.asarray(np.clip(array.astype(np.float64) * factor, ends.min, ends.max), array.dtype)
    node.replace_input_with(index, initializer(_graph(node), names.new(f"{node.name}/{index}"), made))


def _graph(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph
