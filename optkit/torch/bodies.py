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
    values: dict[ir.Value, Any] = dict(zip(function.inputs, inputs, strict=True))
    device = inputs[0].device
    for node in function:
        found = {name: _attribute(a, attributes) for name, a in node.attributes.items()}
        given = [None if v is None else values[v] for v in node.inputs]
        if node.op_type == "Constant":
            # Shapes and axes have to be known where there are no numbers: they stay outside of torch.
            made: Any = np.asarray(next(iter(found.values())))
            results: Any = (made.astype(np.float32) if made.dtype == np.float64 else made,)
        else:
            kept = _NUMBERS.get(node.op_type, ())
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
    return sorted({n.op_type for n in function} - set(_OPERATORS) - {"Constant"})


def _attribute(attribute: ir.Attr, given: Mapping[str, Any]) -> Any:
    if attribute.is_ref():
        return given[str(attribute.ref_attr_name)]
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.value.numpy()
    return attribute.as_string() if attribute.type == ir.AttributeType.STRING else attribute.value


def _cast(a: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    return x.to(_KINDS[ir.DataType(a["to"])])


def _layer_norm(
    a: Mapping[str, Any], x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    axis = int(a.get("axis", -1)) % x.dim()
    return torch.nn.functional.layer_norm(x, x.shape[axis:], scale, bias, float(a.get("epsilon", 1e-5)))


def _mean(a: Mapping[str, Any], x: torch.Tensor, axes: np.ndarray) -> torch.Tensor:
    return x.mean([int(i) for i in axes], keepdim=bool(a.get("keepdims", 1)))


def _quantize(_: Mapping[str, Any], x: torch.Tensor, scale: Any, zero: np.ndarray) -> torch.Tensor:
    limits, kind = np.iinfo(zero.dtype), _KINDS[ir.DataType.from_numpy(zero.dtype)]
    return torch.clamp(torch.round(x / scale) + int(zero), int(limits.min), int(limits.max)).to(kind)


def _reshape(a: Mapping[str, Any], x: torch.Tensor, shape: np.ndarray) -> torch.Tensor:
    assert not a.get("allowzero", 0)
    return x.reshape([x.shape[i] if d == 0 else int(d) for i, d in enumerate(shape)])


def _shift(a: Mapping[str, Any], x: torch.Tensor, by: Any) -> torch.Tensor:
    return torch.bitwise_right_shift(x, by) if a["direction"] == "RIGHT" else torch.bitwise_left_shift(x, by)


def _split(a: Mapping[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    parts: tuple[torch.Tensor, ...] = torch.chunk(x, int(a["num_outputs"]), int(a.get("axis", 0)))
    return parts


def _unsqueeze(_: Mapping[str, Any], x: torch.Tensor, axes: np.ndarray) -> torch.Tensor:
    for axis in sorted(int(i) for i in axes):
        x = x.unsqueeze(axis)
    return x


_OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": lambda a, x, y: x + y,
    "BitShift": _shift,
    "BitwiseAnd": lambda a, x, y: x & y,
    "Cast": _cast,
    "CastLike": lambda a, x, like: x.to(like.dtype),
    "Concat": lambda a, *x: torch.cat(x, int(a["axis"])),
    "Div": lambda a, x, y: x / y,
    "Gelu": lambda a, x: torch.nn.functional.gelu(x, approximate=str(a.get("approximate", "none"))),
    "LayerNormalization": _layer_norm,
    "MatMul": lambda a, x, y: x @ y,
    "MatMulInteger": lambda a, x, y: x.to(torch.int32) @ y.to(torch.int32),
    "Mul": lambda a, x, y: x * y,
    "Neg": lambda a, x: -x,
    "Pow": lambda a, x, y: x**y,
    "QuantizeLinear": _quantize,
    "ReduceMean": _mean,
    "Relu": lambda a, x: torch.relu(x),
    "Reshape": _reshape,
    "Sigmoid": lambda a, x: torch.sigmoid(x),
    "Softmax": lambda a, x: torch.softmax(x, int(a.get("axis", -1))),
    "Split": _split,
    "Sqrt": lambda a, x: torch.sqrt(x),
    "Sub": lambda a, x, y: x - y,
    "Transpose": lambda a, x: x.permute([int(i) for i in a["perm"]]),
    "Unsqueeze": _unsqueeze,
}
# Inputs that are shapes, axes, or tell a type.
_NUMBERS = {"ReduceMean": (1,), "Reshape": (1,), "Unsqueeze": (1,), "QuantizeLinear": (2,)}
