"""Number formats with a scale for each short block: their arithmetic in NumPy, and the same as ONNX functions.

``Nvfp4Quantize`` and the like are calls in a graph. What their bodies compute is what NVIDIA's tensor cores read: a backend that
has the format takes the calls, every other runtime the bodies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from optkit.graph import OPSET, walk

DOMAIN = "optkit"
# Smallest positive e4m3 number: a scale of 0 would leave nothing to divide by.
_LEAST_E4M3 = 2.0**-9
_LARGEST_E4M3 = 448.0
# OCP Microscaling Formats (MX) Specification v1.0: E8M0 is 2 to the power of its code less 127.
_BIAS = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """Numbers of a small float format, of which ``size`` in a row share a scale.

    Attributes:
        name: As a precision has it.
        numbers: Their format.
        held: What holds them where a runtime has no tensors of that format; it has all of its numbers.
        high: The largest.
        size: Numbers of a block.
        scales: How scales are stored.
        nested: Whether scales are themselves numbers of a grid, with one float32 scale for the whole tensor.
        call: What the names of its functions begin with.
    """

    name: str
    numbers: ir.DataType
    held: ir.DataType
    high: float
    size: int
    scales: ir.DataType
    nested: bool
    call: str

    @property
    def quantize(self) -> str:
        """The function that gives numbers and scales."""
        return f"{self.call}Quantize"

    @property
    def dequantize(self) -> str:
        """The function that gives floats of them again."""
        return f"{self.call}Dequantize"


BLOCK_FORMATS: dict[str, BlockFormat] = {
    f.name: f
    for f in (
        # TensorRT, "Quantization Schemes": E2M1 in blocks of 16, scales in E4M3, one scale in float32 for the tensor.
        BlockFormat(
            name="nvfp4", numbers=ir.DataType.FLOAT4E2M1, held=ir.DataType.FLOAT8E4M3FN, high=6.0, size=16,
            scales=ir.DataType.FLOAT8E4M3FN, nested=True, call="Nvfp4",
        ),
        # OCP MX v1.0: E4M3 in blocks of 32, scales in E8M0, which ONNX functions here hold in uint8.
        BlockFormat(
            name="mxfp8", numbers=ir.DataType.FLOAT8E4M3FN, held=ir.DataType.FLOAT8E4M3FN, high=448.0, size=32,
            scales=ir.DataType.UINT8, nested=False, call="Mxfp8",
        ),
    )
}  # fmt: skip


def to_e2m1(x: np.ndarray) -> np.ndarray:
    """``x`` at the nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with its sign; ties go to the even code, what is beyond 6 to 6."""
    x = np.clip(np.asarray(x, np.float32), -6, 6)
    size = np.abs(x)
    step = np.where(size < 2, np.float32(0.5), np.where(size < 4, np.float32(1), np.float32(2)))
    found: np.ndarray = np.round(x / step) * step
    return found


def to_e8m0(x: np.ndarray) -> np.ndarray:
    """Codes of the smallest powers of two that are not below ``x``, as far as E8M0 has them.

    Rounding up is what NVIDIA does (cuDNN, "Block Scaling": ``quantize_round_up``), so that no number of a block is cut off. The
    conversion that the MX specification has as an example, section 6.3, rounds down and cuts off.
    """
    share, exponent = np.frexp(np.maximum(np.asarray(x, np.float32), np.float32(2.0**-_BIAS)))
    found: np.ndarray = (exponent - (share == 0.5) + _BIAS).astype(np.uint8)
    return found


def tensor_scale(largest: float) -> np.float32:
    """Of a tensor whose numbers are up to ``largest``: with it the scale of its largest block is the largest of E4M3."""
    if not largest > 0:
        return np.float32(1)
    return np.float32(max(largest / (6 * _LARGEST_E4M3), float(np.finfo(np.float32).tiny)))


def block_scales(
    x: np.ndarray, fmt: BlockFormat, axis: int, scale: np.float32 | None, shares: Sequence[float] = (1.0,)
) -> np.ndarray:
    """The scale of each block, as stored: with it the largest number is near ``fmt.high``.

    Args:
        x: Float32, finite; the blocks lie along ``axis``, which ``fmt.size`` divides.
        scale: Of the tensor, for nested formats.
        shares: Multiples of that scale to choose from, for nested formats: the one with the least squared error is taken.
    """
    parts = _parts(x, fmt, axis)
    wanted = np.abs(parts).max(-1) / np.float32(fmt.high)
    if scale is None:
        return np.ascontiguousarray(np.moveaxis(to_e8m0(wanted), -1, axis))
    found, best = np.empty(wanted.shape, fmt.scales.numpy()), np.full(wanted.shape, np.inf)
    for share in shares:
        small = np.clip(
            wanted * np.float32(share) / scale, np.float32(_LEAST_E4M3), np.float32(_LARGEST_E4M3)
        )
        stored = small.astype(found.dtype)
        steps = (stored.astype(np.float32) * scale)[..., None]
        error = np.square(to_e2m1(parts / steps) * steps - parts, dtype=np.float64).sum(-1)
        found, best = np.where(error < best, stored, found), np.minimum(error, best)
    return np.ascontiguousarray(np.moveaxis(found, -1, axis))


def steps_of(scales: np.ndarray, fmt: BlockFormat, axis: int, scale: np.float32 | None) -> np.ndarray:
    """What each number of a tensor is multiplied with, in float32."""
    if scale is None:
        steps = np.ldexp(np.float32(1), scales.astype(np.int32) - _BIAS)
    else:
        steps = scales.astype(np.float32) * scale
    return np.repeat(steps, fmt.size, axis)


def to_grid(x: np.ndarray, fmt: BlockFormat) -> np.ndarray:
    """``x``, in steps, at the nearest number of the format, in float32."""
    return to_e2m1(x) if fmt.nested else x.astype(fmt.held.numpy()).astype(np.float32)


def quantize(
    x: np.ndarray, fmt: BlockFormat, axis: int, scale: np.float32 | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers in the type that holds them, shaped like ``x``, and scales in theirs with one for each block: what the functions do."""
    scales = block_scales(x, fmt, axis, scale)
    return to_grid(x / steps_of(scales, fmt, axis, scale), fmt).astype(fmt.held.numpy()), scales


def _parts(x: np.ndarray, fmt: BlockFormat, axis: int) -> np.ndarray:
    """The blocks along ``axis``, one a row of the last."""
    last = np.moveaxis(np.asarray(x, np.float32), axis, -1)
    return last.reshape(*last.shape[:-1], -1, fmt.size)


# The largest of a row of 16 over 6, as a number of E4M3; the row over that, on the grid of E2M1 as ``to_e2m1`` has it.
_NVFP4_QUANTIZE = """
<opset_import: ["" : %d], domain: "optkit">
Nvfp4Quantize (x, scale) => (q, scales) {
  f = Cast <to = 1> (x)
  form = Constant <value_ints = [-1, 16]> ()
  parts = Reshape (f, form)
  last = Constant <value_ints = [1]> ()
  size = Abs (parts)
  top = ReduceMax (size, last)
  six = Constant <value_float = 6.0> ()
  wanted = Div (top, six)
  small = Div (wanted, scale)
  least = Constant <value_float = 0.001953125> ()
  most = Constant <value_float = 448.0> ()
  held = Clip (small, least, most)
  stored = Cast <to = 17> (held)
  exact = Cast <to = 1> (stored)
  steps = Mul (exact, scale)
  below = Constant <value_float = -6.0> ()
  far = Div (parts, steps)
  v = Clip (far, below, six)
  a = Abs (v)
  two = Constant <value_float = 2.0> ()
  four = Constant <value_float = 4.0> ()
  half = Constant <value_float = 0.5> ()
  one = Constant <value_float = 1.0> ()
  under_two = Less (a, two)
  under_four = Less (a, four)
  wide = Where (under_four, one, two)
  step = Where (under_two, half, wide)
  count = Div (v, step)
  whole = Round (count)
  r = Mul (whole, step)
  shape = Shape (x)
  flat = Reshape (r, shape)
  q = Cast <to = 17> (flat)
  front = Shape <end = -1> (x)
  rest = Constant <value_ints = [-1]> ()
  outer = Concat <axis = 0> (front, rest)
  scales = Reshape (stored, outer)
}"""
_NVFP4_DEQUANTIZE = """
<opset_import: ["" : %d], domain: "optkit">
Nvfp4Dequantize <axis> (q, scales, scale) => (y) {
  steps = DequantizeLinear (scales, scale)
  y = DequantizeLinear <axis: int = @axis, block_size = 16> (q, steps)
}"""
# The exponent is first taken 0.01 too low, which errors of the logarithm do not reach, and then put right exactly.
_MXFP8_QUANTIZE = """
<opset_import: ["" : %d], domain: "optkit">
Mxfp8Quantize (x) => (q, scales) {
  f = Cast <to = 1> (x)
  form = Constant <value_ints = [-1, 32]> ()
  parts = Reshape (f, form)
  last = Constant <value_ints = [1]> ()
  size = Abs (parts)
  top = ReduceMax (size, last)
  most = Constant <value_float = 448.0> ()
  over = Div (top, most)
  least = Constant <value_float = 5.877471754111438e-39> ()
  wanted = Max (over, least)
  natural = Log (wanted)
  turn = Constant <value_float = 1.4426950408889634> ()
  binary = Mul (natural, turn)
  margin = Constant <value_float = 0.01> ()
  lower = Sub (binary, margin)
  guess = Ceil (lower)
  two = Constant <value_float = 2.0> ()
  power = Pow (two, guess)
  short = Greater (wanted, power)
  one_more = Cast <to = 1> (short)
  exponent = Add (guess, one_more)
  steps = Pow (two, exponent)
  bias = Constant <value_float = 127.0> ()
  code = Add (exponent, bias)
  stored = Cast <to = 2> (code)
  far = Div (parts, steps)
  shape = Shape (x)
  flat = Reshape (far, shape)
  q = Cast <to = 17> (flat)
  front = Shape <end = -1> (x)
  rest = Constant <value_ints = [-1]> ()
  outer = Concat <axis = 0> (front, rest)
  scales = Reshape (stored, outer)
}"""
_MXFP8_DEQUANTIZE = """
<opset_import: ["" : %d], domain: "optkit">
Mxfp8Dequantize <axis> (q, scales) => (y) {
  code = Cast <to = 1> (scales)
  bias = Constant <value_float = 127.0> ()
  exponent = Sub (code, bias)
  two = Constant <value_float = 2.0> ()
  steps = Pow (two, exponent)
  y = DequantizeLinear <axis: int = @axis, block_size = 32> (q, steps)
}"""
_BODIES = {
    "Nvfp4Quantize": _NVFP4_QUANTIZE,
    "Nvfp4Dequantize": _NVFP4_DEQUANTIZE,
    "Mxfp8Quantize": _MXFP8_QUANTIZE,
    "Mxfp8Dequantize": _MXFP8_DEQUANTIZE,
}


def function(name: str) -> ir.Function:
    """The ONNX function called ``name``."""
    return ir.serde.deserialize_function(onnx.parser.parse_function(_BODIES[name] % OPSET))


def define(model: ir.Model) -> None:
    """Give ``model`` the functions that it calls."""
    for name in sorted({node.op_type for node in walk(model) if is_call(node)}):
        found = function(name)
        model.functions.setdefault(found.identifier(), found)
        model.opset_imports[DOMAIN] = 1


def is_call(node: ir.Node) -> bool:
    """Whether ``node`` calls a function here; its first output is shaped like its first input."""
    return node.domain == DOMAIN and node.op_type in _BODIES


def format_of(node: ir.Node) -> BlockFormat | None:
    """The format that ``node`` gives floats of, where it is a call of a function here."""
    if node.domain != DOMAIN:
        return None
    return next((f for f in BLOCK_FORMATS.values() if f.dequantize == node.op_type), None)


def numbers_of(value: ir.Value) -> ir.DataType | None:
    """The type of the numbers that the constant ``value`` holds for a call here; None where it holds none."""
    found = (format_of(use.node) for use in value.uses() if use.idx == 0)
    return next((fmt.numbers for fmt in found if fmt is not None), None)
