"""ONNX functions of kernels, operator by operator in PyTorch: what a kernel means, on any device and for shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

_KINDS = {
    ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64, ir.DataType.INT8: torch.int8, ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT32: torch.int32, ir.DataType.INT64: torch.int64, ir.DataType.BOOL: torch.bool,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
}  # fmt: skip
ONNX = {kind: name for name, kind in _KINDS.items()}
"""ONNX's types, by torch's."""


def run(
    function: ir.Function, inputs: Sequence[torch.Tensor], attributes: Mapping[str, Any]
) -> tuple[torch.Tensor, ...]:
    """The outputs of a function's body.

    Raises:
        KeyError: It has an operator that is not here; ``missing`` tells.
    """
    # Constants, sizes and what is worked out from them alone stay outside of torch, which has no numbers while it traces.
    values: dict[ir.Value, Any] = dict(zip(function.inputs, inputs, strict=True))
    device = inputs[0].device
    for node in function:
        found = {name: _attribute(a, attributes) for name, a in node.attributes.items()}
        given = [None if v is None else values[v] for v in node.inputs]
        if node.op_type == "Constant":
            made: Any = np.asarray(next(iter(found.values())))
            results: Any = made.astype(np.float32) if made.dtype == np.float64 else made
        elif node.op_type in _NUMBERS and all(isinstance(v, np.ndarray) for v in given):
            results = np.asarray(_NUMBERS[node.op_type](found, *given))
        elif node.op_type == "Range":
            results = torch.arange(*(np.asarray(v).reshape(-1)[0] for v in given), device=device)
        else:
            kept = _AS_THEY_ARE.get(node.op_type, ())
            operands = [v if i in kept else _operand(v, device) for i, v in enumerate(given)]
            results = _OPERATORS[node.op_type](found, *operands)
        results = results if isinstance(results, tuple) else (results,)
        values.update(zip(node.outputs, results, strict=False))
    return tuple(values[v] for v in function.outputs)


def _operand(value: Any, device: torch.device) -> Any:
    """A constant as torch takes it: single numbers as they are, so that a trace has no tensors of its own."""
    if not isinstance(value, np.ndarray):
        return value
    return value.item() if value.size == 1 else torch.from_numpy(value).to(device)


def missing(function: ir.Function) -> list[str]:
    """Operators of a body that are not here."""
    return sorted({n.op_type for n in function} - set(_OPERATORS) - {"Constant", "Range"})


def _attribute(attribute: ir.Attr, given: Mapping[str, Any]) -> Any:
    if attribute.is_ref():
        return given[str(attribute.ref_attr_name)]
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.value.numpy()
    return attribute.as_string() if attribute.type == ir.AttributeType.STRING else attribute.value


def _cast(a: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    return x.to(_KINDS[ir.DataType(a["to"])])


def _cast_like(_: Mapping[str, Any], x: Any, like: torch.Tensor) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to(like.dtype)
    return torch.full((), x, dtype=like.dtype, device=like.device)


def _conv(
    a: Mapping[str, Any], x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    axes = x.dim() - 2
    pads = [int(p) for p in a.get("pads", [0] * 2 * axes)]
    # Torch pads the last axis first, ONNX has all beginnings before all ends.
    x = torch.nn.functional.pad(x, [p for i in reversed(range(axes)) for p in (pads[i], pads[axes + i])])
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[axes - 1]
    steps, gaps = ([int(v) for v in a.get(k, [1] * axes)] for k in ("strides", "dilations"))
    return convolve(x, w, bias, stride=steps, dilation=gaps, groups=int(a.get("group", 1)))


def _cum_sum(a: Mapping[str, Any], x: torch.Tensor, axis: np.ndarray) -> torch.Tensor:
    found = torch.cumsum(x, int(axis.reshape(-1)[0]), dtype=x.dtype)
    return found - x if a.get("exclusive", 0) else found


def _dequantize(
    a: Mapping[str, Any], x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
) -> torch.Tensor:
    axis, block = int(a.get("axis", 1)) % x.dim(), int(a.get("block_size", 0))
    if block:
        scale = scale.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    else:
        scale = _along(x, scale, axis)
    wide = x.to(scale.dtype)
    return (wide if zero is None else wide - _along(x, zero, axis).to(scale.dtype)) * scale


def _along(x: torch.Tensor, value: Any, axis: int) -> Any:
    """One number for each place of an axis, so that it meets ``x`` there; single numbers as they are."""
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    return value.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def _div(_: Mapping[str, Any], x: Any, y: Any) -> Any:
    whole = not any(
        isinstance(v, float) or (isinstance(v, torch.Tensor) and v.is_floating_point()) for v in (x, y)
    )
    return torch.div(x, y, rounding_mode="trunc") if whole else x / y


def _expand(_: Mapping[str, Any], x: torch.Tensor, shape: np.ndarray) -> torch.Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))


def _gather(a: Mapping[str, Any], x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    assert a.get("axis", 0) == 0
    return x[places.long()]


def _gather_nd(a: Mapping[str, Any], x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    assert a.get("batch_dims", 0) == 1
    sample = torch.arange(x.shape[0], device=x.device).reshape([-1] + [1] * (places.dim() - 2))
    return x[(sample, *places.unbind(-1))]


def _layer_norm(
    a: Mapping[str, Any], x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    axis = int(a.get("axis", -1)) % x.dim()
    return torch.nn.functional.layer_norm(x, x.shape[axis:], scale, bias, float(a.get("epsilon", 1e-5)))


def _mean(a: Mapping[str, Any], x: torch.Tensor, axes: np.ndarray) -> torch.Tensor:
    return x.mean([int(i) for i in axes], keepdim=bool(a.get("keepdims", 1)))


def _quantize(a: Mapping[str, Any], x: torch.Tensor, scale: Any, zero: Any) -> torch.Tensor:
    known = isinstance(zero, np.ndarray)
    kind = _KINDS[ir.DataType.from_numpy(zero.dtype)] if known else zero.dtype
    scale, zero = (_along(x, v, int(a.get("axis", 1))) for v in (scale, zero))
    if kind.is_floating_point:
        most = torch.finfo(kind).max
        return torch.clamp(x / scale, -most, most).to(kind)
    limits = torch.iinfo(kind)
    offset = int(zero) if known else zero.to(x.dtype)
    return torch.clamp(torch.round(x / scale) + offset, limits.min, limits.max).to(kind)


def _reshape(a: Mapping[str, Any], x: torch.Tensor, shape: np.ndarray) -> torch.Tensor:
    assert not a.get("allowzero", 0)
    sizes = shape.tolist()
    return x.reshape([x.shape[i] if isinstance(d, int) and d == 0 else d for i, d in enumerate(sizes)])


def _scatter_nd(
    _: Mapping[str, Any], x: torch.Tensor, places: torch.Tensor, new: torch.Tensor
) -> torch.Tensor:
    return x.index_put(tuple(places.unbind(-1)), new)


def _shape(a: Mapping[str, Any], x: torch.Tensor) -> np.ndarray:
    sizes = list(x.shape)[slice(a.get("start", 0), a.get("end"))]
    return np.array(sizes, np.int64 if all(isinstance(d, int) for d in sizes) else object)


def _shift(a: Mapping[str, Any], x: torch.Tensor, by: Any) -> torch.Tensor:
    return torch.bitwise_right_shift(x, by) if a["direction"] == "RIGHT" else torch.bitwise_left_shift(x, by)


def _slice(_: Mapping[str, Any], x: torch.Tensor, *along: np.ndarray) -> torch.Tensor:
    whole = [slice(None)] * x.dim()
    for start, end, axis, step in zip(*(v.tolist() for v in along), strict=True):
        whole[axis] = slice(start, end, step)
    return x[tuple(whole)]


def _split(a: Mapping[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    parts: tuple[torch.Tensor, ...] = torch.chunk(x, int(a["num_outputs"]), int(a.get("axis", 0)))
    return parts


def _sum(a: Mapping[str, Any], x: torch.Tensor, axes: np.ndarray) -> torch.Tensor:
    return x.sum([int(i) for i in axes], keepdim=bool(a.get("keepdims", 1)), dtype=x.dtype)


def _top(a: Mapping[str, Any], x: torch.Tensor, count: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    # Of equals, the first: torch.topk leaves that open.
    values, places = torch.sort(
        x, dim=int(a.get("axis", -1)), descending=bool(a.get("largest", 1)), stable=True
    )
    k = int(count.reshape(-1)[0])
    return values[..., :k], places[..., :k]


def _unsqueeze(_: Mapping[str, Any], x: torch.Tensor, axes: np.ndarray) -> torch.Tensor:
    for axis in sorted(int(i) for i in axes):
        x = x.unsqueeze(axis)
    return x


def _max(_: Mapping[str, Any], x: torch.Tensor, y: Any) -> torch.Tensor:
    return torch.maximum(x, y) if isinstance(y, torch.Tensor) else torch.clamp(x, min=y)


def _quantized(_: Mapping[str, Any], x: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    kind = _KINDS[ir.DataType.from_numpy(zero.dtype)]
    limits = torch.finfo(kind) if kind.is_floating_point else torch.iinfo(kind)
    steps = x / scale if kind.is_floating_point else np.rint(x / scale) + zero
    return np.asarray(np.clip(steps, limits.min, limits.max), zero.dtype)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "Abs": lambda a, x: torch.abs(x),
    "Add": lambda a, x, y: x + y,
    "And": lambda a, x, y: x & y,
    "BitShift": _shift,
    "BitwiseAnd": lambda a, x, y: x & y,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": lambda a, *x: torch.cat(x, int(a["axis"])),
    "Conv": _conv,
    "CumSum": _cum_sum,
    "DequantizeLinear": _dequantize,
    "Div": _div,
    "Equal": lambda a, x, y: x == y,
    "Exp": lambda a, x: torch.exp(x),
    "Expand": _expand,
    "Flatten": lambda a, x: x.flatten(int(a.get("axis", 1))),
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gelu": lambda a, x: torch.nn.functional.gelu(x, approximate=str(a.get("approximate", "none"))),
    "GreaterOrEqual": lambda a, x, y: x >= y,
    "LayerNormalization": _layer_norm,
    "Less": lambda a, x, y: x < y,
    "LessOrEqual": lambda a, x, y: x <= y,
    "Log": lambda a, x: torch.log(x),
    "MatMul": lambda a, x, y: x @ y,
    "MatMulInteger": lambda a, x, y, zx=0, zy=0: (x.to(torch.int32) - zx) @ (y.to(torch.int32) - zy),
    "Max": _max,
    "Mod": lambda a, x, y: torch.remainder(x, y),
    "Mul": lambda a, x, y: x * y,
    "Neg": lambda a, x: -x,
    "Or": lambda a, x, y: x | y,
    "Pow": lambda a, x, y: x**y,
    "QuantizeLinear": _quantize,
    "ReduceMax": lambda a, x, axes: x.amax([int(i) for i in axes], keepdim=bool(a.get("keepdims", 1))),
    "ReduceMean": _mean,
    "ReduceSum": _sum,
    "Relu": lambda a, x: torch.relu(x),
    "Reshape": _reshape,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Sigmoid": lambda a, x: torch.sigmoid(x),
    "Slice": _slice,
    "Softmax": lambda a, x: torch.softmax(x, int(a.get("axis", -1))),
    "SoftmaxCrossEntropyLoss": lambda a, x, y: torch.nn.functional.cross_entropy(
        x, y.long(), reduction=a["reduction"]
    ),
    "Split": _split,
    "Sqrt": lambda a, x: torch.sqrt(x),
    "Squeeze": lambda a, x: x.squeeze(),
    "Sub": lambda a, x, y: x - y,
    "TopK": _top,
    "Transpose": lambda a, x: x.permute([int(i) for i in a["perm"]]),
    "Unsqueeze": _unsqueeze,
    "Where": lambda a, x, y, z: torch.where(x, y, z),
}
# Inputs that are shapes or axes, or tell a type.
_AS_THEY_ARE = {
    "CumSum": (1,), "Expand": (1,), "QuantizeLinear": (2,), "ReduceMax": (1,), "ReduceMean": (1,), "ReduceSum": (1,), "Reshape": (1,), "Slice": (1, 2, 3, 4),
    "TopK": (1,), "Unsqueeze": (1,),
}  # fmt: skip
# Of numbers that are known before torch runs.
_NUMBERS: dict[str, Callable[..., Any]] = {
    "Add": lambda a, x, y: x + y,
    "Cast": lambda a, x: x.astype(ir.DataType(a["to"]).numpy()),
    "Concat": lambda a, *x: np.concatenate(x, int(a["axis"])),
    "Equal": lambda a, x, y: x == y,
    "Mod": lambda a, x, y: x % y,
    "Mul": lambda a, x, y: x * y,
    "Neg": lambda a, x: -x,
    "QuantizeLinear": _quantized,
    "Reshape": lambda a, x, shape: x.reshape([int(d) for d in shape]),
    "Squeeze": lambda a, x: x.squeeze(),
    "Sub": lambda a, x, y: x - y,
    "Unsqueeze": lambda a, x, axes: np.expand_dims(x, tuple(int(i) for i in axes)),
}
