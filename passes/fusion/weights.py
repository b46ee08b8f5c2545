"""Move a scale and a shift of a layer's output or input into the layer's own weights.

All arithmetic is in float64 and rounded once, to the type of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, is_float
from optkit.rewrite import Names, label, register

# Elements that are in float64 at a time.
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One side of a layer, where a scale and a shift for each channel can be taken in.

    Attributes:
        node: The layer.
        axis: Of the value on this side, where the channels lie.
        rank: Of the value on this side; None where any rank will do, and ``axis`` counts from the end.
        channels: How many.
        shifts: Whether a shift can be taken in too.
    """

    node: ir.Node
    axis: int
    rank: int | None
    channels: int
    shifts: bool


def output_port(node: ir.Node) -> Port | None:
    """Where ``node`` takes in a scale and a shift of its output; None where it cannot."""
    if node.domain != "":
        return None
    match node.op_type:
        case "Conv" | "ConvTranspose":
            weight, bias = _weight(node, 1), _optional(node, 2)
            if weight is None or bias is _UNKNOWN:
                return None
            group = node.attributes.get_int("group", 1)
            channels = weight[0] if node.op_type == "Conv" else weight[1] * group
            return Port(node=node, axis=1, rank=len(weight), channels=channels, shifts=True)
        case "Gemm":
            weight, bias = _weight(node, 1), _optional(node, 2)
            if weight is None or bias is _UNKNOWN:
                return None
            channels = weight[0] if attribute(node, "transB", 0) else weight[1]
            if isinstance(bias, np.ndarray) and (bias.ndim > 2 or (bias.ndim == 2 and bias.shape[0] != 1)):
                return None
            return Port(node=node, axis=1, rank=2, channels=channels, shifts=True)
        case "MatMul":
            weight = _weight(node, 1)
            if weight is None or len(weight) != 2:
                return None
            return Port(node=node, axis=-1, rank=None, channels=weight[1], shifts=False)
        case "BatchNormalization":
            if affine_of_batch_norm(node) is None:
                return None
            shape, weight = node.inputs[0].shape if node.inputs[0] is not None else None, _weight(node, 1)
            if shape is None or len(shape) < 2 or weight is None:
                return None
            return Port(node=node, axis=1, rank=len(shape), channels=weight[0], shifts=True)
        case "LayerNormalization":
            weight, bias = _weight(node, 1), _optional(node, 2)
            if weight is None or len(weight) != 1 or bias is _UNKNOWN or len(node.outputs) > 1:
                return None
            return Port(node=node, axis=-1, rank=None, channels=weight[0], shifts=True)
        case "InstanceNormalization":
            weight, bias = _weight(node, 1), _optional(node, 2)
            shape = node.inputs[0].shape if node.inputs[0] is not None else None
            if weight is None or not isinstance(bias, np.ndarray) or shape is None:
                return None
            return Port(node=node, axis=1, rank=len(shape), channels=weight[0], shifts=True)
    return None


def input_port(node: ir.Node) -> Port | None:
    """Where ``node`` takes in a scale and a shift of its input 0; None where it cannot."""
    if node.domain != "":
        return None
    weight, bias = _weight(node, 1), _optional(node, 2)
    if weight is None or bias is _UNKNOWN:
        return None
    match node.op_type:
        case "Conv":
            channels = weight[1] * node.attributes.get_int("group", 1)
            return Port(node=node, axis=1, rank=len(weight), channels=channels, shifts=not _padded(node))
        case "ConvTranspose":
            # How many taps reach an element of the output depends on where it lies.
            return Port(node=node, axis=1, rank=len(weight), channels=weight[0], shifts=False)
        case "Gemm":
            if attribute(node, "transA", 0) or (
                isinstance(bias, np.ndarray) and bias.ndim == 2 and bias.shape[0] != 1
            ):
                return None
            channels = weight[1] if attribute(node, "transB", 0) else weight[0]
            return Port(node=node, axis=1, rank=2, channels=channels, shifts=True)
        case "MatMul":
            return (
                Port(node=node, axis=-1, rank=None, channels=weight[0], shifts=False)
                if len(weight) == 2
                else None
            )
    return None


def per_channel(array: np.ndarray, port: Port, rank: int | None) -> np.ndarray | None:
    """``array``, which broadcasts against the value at ``port``, as ``[channels]``; None if it varies otherwise.

    Args:
        array: A constant operand, any shape.
        port: The side of the layer.
        rank: Of the value, where known.
    """
    if array.size == 1:
        return np.broadcast_to(array.reshape(1), (port.channels,))
    rank = port.rank if port.rank is not None else rank
    if rank is None or array.ndim > rank or array.size != port.channels:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    return array.reshape(-1) if shape[port.axis] == port.channels else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """A new constant for one input of a layer."""

    node: ir.Node
    index: int
    array: np.ndarray


def take_output(port: Port, scale: np.ndarray, shift: np.ndarray) -> list[Edit] | None:
    """What lets the layer compute ``scale * y + shift`` instead of ``y``.

    Args:
        port: From ``output_port``.
        scale: ``[channels]``, float64.
        shift: Same; all zero unless ``port.shifts``.

    Returns:
        Edits for ``store``; None if a weight would not be finite any more.
    """
    node = port.node
    weight = node.inputs[1]
    assert weight is not None
    held = constant(weight)
    assert held is not None
    shape = held.shape
    old = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    factor = scale
    match node.op_type:
        case "Conv":
            by_weight = factor.reshape(-1, *(1,) * (held.ndim - 1))
        case "ConvTranspose":
            group = node.attributes.get_int("group", 1)
            held = held.reshape(group, -1, *held.shape[1:])
            by_weight = factor.reshape(group, 1, -1, *(1,) * (held.ndim - 3))
        case "Gemm":
            by_weight = factor[:, None] if attribute(node, "transB", 0) else factor[None, :]
            old = (
                None if old is None else np.asarray(old, np.float64) * node.attributes.get_float("beta", 1.0)
            )
        case "MatMul":
            by_weight = factor[None, :]
        case _:
            by_weight = factor
    new_weight = _times(held, by_weight)
    if new_weight is None:
        return None
    new_bias = None
    if old is not None or np.any(shift):
        before = 0.0 if old is None else np.asarray(old, np.float64).reshape(-1)
        new_bias = _rounded(np.broadcast_to(before * scale + shift, (port.channels,)), held.dtype)
        if new_bias is None:
            return None
    return _edits(node, new_weight.reshape(shape), new_bias)


def take_input(port: Port, scale: np.ndarray, shift: np.ndarray) -> list[Edit] | None:
    """What lets the layer compute from ``x`` what it computed from ``scale * x + shift``; like ``take_output``."""
    node = port.node
    weight = node.inputs[1]
    assert weight is not None
    held = constant(weight)
    assert held is not None
    shape, transposed = held.shape, bool(attribute(node, "transB", 0))
    added: np.ndarray | None = None
    match node.op_type:
        case "Conv":
            group = node.attributes.get_int("group", 1)
            # [group, out / group, in / group, taps]
            held = held.reshape(group, shape[0] // group, shape[1], -1)
            by_weight = scale.reshape(group, 1, -1, 1)
            if np.any(shift):
                added = np.einsum("goik,gi->go", held.astype(np.float64), shift.reshape(group, -1)).reshape(
                    -1
                )
        case "ConvTranspose":
            by_weight = scale.reshape(-1, *(1,) * (held.ndim - 1))
        case "Gemm":
            by_weight = scale[None, :] if transposed else scale[:, None]
            if np.any(shift):
                wide = held.astype(np.float64)
                added = (wide @ shift if transposed else shift @ wide) * node.attributes.get_float(
                    "alpha", 1.0
                )
        case _:
            by_weight = scale[:, None]
    new_weight = _times(held, by_weight)
    if new_weight is None:
        return None
    new_bias = None
    if added is not None:
        old = (
            constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(())
        )
        assert old is not None
        beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
        new_bias = _rounded(np.asarray(old, np.float64).reshape(-1) * beta + added, held.dtype)
        if new_bias is None:
            return None
    return _edits(node, new_weight.reshape(shape), new_bias)


def _edits(node: ir.Node, weight: np.ndarray, bias: np.ndarray | None) -> list[Edit]:
    edits = [Edit(node=node, index=1, array=weight)]
    return edits if bias is None else [*edits, Edit(node=node, index=2, array=bias)]


def affine_of_batch_norm(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and shift, ``[channels]`` in float64, of a BatchNormalization with constant statistics; else None."""
    if node.op_type != "BatchNormalization" or node.domain != "" or attribute(node, "training_mode", 0):
        return None
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return None
    held = [constant(v) for v in node.inputs[1:5]]
    if any(h is None for h in held):
        return None
    gamma, beta, mean, variance = (np.asarray(h, np.float64) for h in held)
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    shift = beta - mean * scale
    return (scale, shift) if np.all(np.isfinite(scale)) and np.all(np.isfinite(shift)) else None


_UNKNOWN = object()


def _weight(node: ir.Node, index: int) -> tuple[int, ...] | None:
    """The shape of a constant float input."""
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None or not is_float(value) or value.const_value is None or not _is_constant(value):
        return None
    return tuple(value.const_value.shape.numpy())


def _is_constant(value: ir.Value) -> bool:
    """Whether ``constant(value)`` is there, without touching the data."""
    if value.is_initializer():
        return value.const_value is not None and not value.is_graph_input()
    node = value.producer()
    return node is not None and node.op_type == "Constant" and value.const_value is not None


def _optional(node: ir.Node, index: int) -> object:
    """A constant input, None where it is absent, ``_UNKNOWN`` where it is computed."""
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None:
        return None
    array = constant(value)
    return _UNKNOWN if array is None else array


def _padded(node: ir.Node) -> bool:
    automatic = attribute(node, "auto_pad", "NOTSET")
    if automatic == "NOTSET":
        return any(node.attributes.get_ints("pads", ()))
    return automatic != "VALID"


def _times(weight: np.ndarray, factor: np.ndarray) -> np.ndarray | None:
    """``weight * factor``, some rows at a time; None if a product overflows."""
    if np.all(factor == 1):
        return weight
    new = np.empty(weight.shape, weight.dtype)
    factor = np.broadcast_to(factor, weight.shape)
    rows = max(1, _BLOCK // max(1, weight[:1].size))
    with np.errstate(over="ignore"):
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            new[part] = weight[part].astype(np.float64) * factor[part]
    return new if np.all(np.isfinite(new)) else None


def _rounded(array: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    with np.errstate(over="ignore"):
        new = array.astype(dtype)
    return new if np.all(np.isfinite(new)) else None


def store(edits: Iterable[Edit], names: Names) -> None:
    """Set constant inputs; a value that one node reads keeps its name, one that others read too is left to them."""
    for edit in edits:
        node, index = edit.node, edit.index
        value = node.inputs[index] if len(node.inputs) > index else None
        if node.op_type == "Gemm" and index == 2 and "beta" in node.attributes:
            node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        if (
            value is not None
            and value.is_initializer()
            and len(value.uses()) == 1
            and not value.is_graph_output()
        ):
            value.const_value = ir.tensor(np.asarray(edit.array, order="C"), name=value.name)
            value.shape = ir.Shape(edit.array.shape)
            continue
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        new = register(graph, names.new(f"{label(node)}/{('x', 'weight', 'bias')[index]}"), edit.array)
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        node.replace_input_with(index, new)
