"""Activations to 8 bits, integers or floats, in front of products of them; and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, scalar, users
from optkit.kernels.base import (
    BYTES,
    DOMAIN,
    TYPES,
    Argument,
    Kernel,
    Problem,
    Program,
    columns_of,
    format_of,
    pointer,
)  # fmt: skip
from optkit.kernels.triton.drawing import DTYPES, draw
from optkit.kernels.triton.gated import BLOCKS
from optkit.rewrite import Match, Rule

_STEP, _STORED = 16, ("int8", "fp8")


class _Grid(Kernel):
    stored: ClassVar[str]
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")

    def problem(self, node: ir.Node) -> Problem | str:
        fmt, columns = format_of(node.inputs[0]), columns_of(node.inputs[0])
        if fmt is None or fmt not in self.formats:
            return f"no format of {self.name}"
        if columns is None or columns % _STEP:
            return f"the last axis is no fixed multiple of {_STEP}"
        return {"format": fmt, "columns": columns, "stored": self.stored, "scale": _scale(node)}

    def program(self, problem: Problem, capability: tuple[int, int]) -> Program:
        fmt = str(problem["format"])
        warps, reads = BLOCKS[capability]
        block = warps * 32 * reads * 16 // BYTES[fmt]
        return Program(
            function="optkit.kernels.triton.device.quantize:quantize",
            arguments=(
                Argument(name="x", type=pointer(fmt), binds="input:0", aligned=True),
                Argument(name="y", type=pointer(self.stored), binds="output:0", aligned=True),
                # A multiple of 16, as its last axis is one.
                Argument(name="n", type="i32", binds="n", aligned=True),
            ),
            constants={"SCALE": float(str(problem["scale"])), "BLOCK": block},
            grid=(f"cdiv(n, {block})", "1", "1"),
            warps=warps,
        )

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"n": "elements(0)"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[0]]

    def output_format(self, problem: Problem, output: int = 0) -> str:
        return self.stored

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        return [(rows, int(problem["columns"]))]

    def edges(self, problem: Problem, capability: tuple[int, int]) -> tuple[int, ...]:
        block = int(self.program(problem, capability).constants["BLOCK"] or 1) // int(problem["columns"])
        return tuple(sorted({1, block - 1, block, block + 1}))

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        return draw(self.shapes(problem, rows), str(problem["format"]), seed)

    def allowed(self, problem: Problem) -> float:
        return 0.0

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        assert inputs[0] is not None
        return [on_grid(inputs[0], str(problem["scale"]), self.stored)]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        n = shapes[0][0] * shapes[0][1]
        return 4.0 * n, float(n * (BYTES[str(problem["format"])] + 1))

    def attributes(self, problem: Problem) -> dict[str, Any]:
        return {"scale": float(str(problem["scale"]))}

    def rules(self) -> Sequence[Rule]:
        return [Rule(_pattern(cast), self._rewrite, self._check, name=self.name) for cast in (True, False)]

    def _check(self, root: ir.Node, x: ir.Value, scale: ir.Value, zero: ir.Value) -> Match:
        match, columns, zeros = Match(), columns_of(x), constant(zero)
        if format_of(x) not in self.formats:
            return match.fail("not known to be float32, float16 or bfloat16", x)
        if format_of(root.outputs[0]) != self.stored or zeros is None or zeros.astype(np.float32).any():
            return match.fail(f"not to {self.stored} around 0", root)
        if scalar(scale) is None:
            return match.fail("no constant scale for all elements", scale)
        if columns is None or columns % _STEP:
            return match.fail(f"the last axis is no fixed multiple of {_STEP}", x)
        return match

    def _rewrite(self, op: Any, root: ir.Node, x: ir.Value, scale: ir.Value, zero: ir.Value) -> Any:
        (y,) = op.node(self.op, [x], {"scale": float(scalar(scale) or 1.0)}, domain=DOMAIN)
        y.type, y.shape = ir.TensorType(TYPES[self.stored]), x.shape
        return y


def on_grid(x: np.ndarray, step: str, stored: str) -> np.ndarray:
    """``x`` as QuantizeLinear puts it onto a grid around 0, in float64."""
    # ONNX divides in the format of the scale, float32: in another, ties would be none.
    quotient = x.astype(np.float32) / np.float32(step)
    if stored == "int8":
        return np.clip(np.rint(quotient.astype(np.float64)), -128, 127)
    return quotient.clip(-448, 448).astype(DTYPES["fp8"]).astype(np.float64)


def _scale(node: ir.Node) -> str:
    return repr(float(attribute(node, "scale", 1.0)))  # type: ignore[arg-type]


def _pattern(cast: bool) -> Callable[..., Any]:
    if cast:
        return lambda op, x, scale, zero: op.QuantizeLinear(op.Cast(x), scale, zero)
    return lambda op, x, scale, zero: op.QuantizeLinear(x, scale, zero)


_EXAMPLE: dict[str, int | str | bool] = {"format": "fp16", "columns": 1536, "scale": "0.02"}
_SMALL: tuple[dict[str, int | str | bool], ...] = tuple(
    {"format": f, "columns": 128, "scale": "0.02"} for f in ("fp16", "bf16", "fp32")
)
_GRID = (
    '<domain: "optkit", opset_import: ["" : %%d]> %s <scale> (x) => (y) { '
    "f = Cast <to = 1> (x) s = Constant <value_float: float = @scale> () o = Constant <value = int8 {0}> () "
    "z = Cast <to = %d> (o) y = QuantizeLinear (f, s, z) }"
)


class Quantize(_Grid):
    """``y = clamp(round(x / scale), -128, 127)`` in int8, one scale for all elements.

    Jacob et al. 2018, arXiv:1712.05877, eq. 1, without a zero point; ONNX's QuantizeLinear, ties to even. In float32.
    """

    name, op, stored = "quantize", "Quantize", "int8"
    size: ClassVar[int] = 2
    source: ClassVar[str] = "arXiv:1712.05877, ONNX QuantizeLinear"
    examples: ClassVar[tuple[Problem, ...]] = ({**_EXAMPLE, "stored": "int8"},)
    small: ClassVar[tuple[Problem, ...]] = tuple({**e, "stored": "int8"} for e in _SMALL)
    body: ClassVar[str] = _GRID % (op, 3)


class QuantizeFp8(_Grid):
    """``y = clamp(x / scale, -448, 448)`` in e4m3, one scale for all elements; from sm_89 on.

    Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433; ONNX's QuantizeLinear, ties to even.
    """

    name, op, stored = "quantize-fp8", "QuantizeFp8", "fp8"
    size: ClassVar[int] = 2
    source: ClassVar[str] = "arXiv:2209.05433, ONNX QuantizeLinear"
    examples: ClassVar[tuple[Problem, ...]] = ({**_EXAMPLE, "stored": "fp8"},)
    small: ClassVar[tuple[Problem, ...]] = tuple({**e, "stored": "fp8"} for e in _SMALL)
    body: ClassVar[str] = _GRID % (op, 17)


class _Back(Kernel):
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")

    def problem(self, node: ir.Node) -> Problem | str:
        x = node.inputs[0]
        kept, columns = format_of(x), columns_of(x)
        fmt = next((name for name, kind in TYPES.items() if int(kind) == attribute(node, "to")), None)
        if fmt not in self.formats or kept not in _STORED:
            return f"no formats of {self.name}"
        if columns is None or columns % _STEP:
            return f"the last axis is no fixed multiple of {_STEP}"
        return {"format": fmt, "stored": str(kept), "columns": columns, "scale": _scale(node)}

    def program(self, problem: Problem, capability: tuple[int, int]) -> Program:
        warps, reads = BLOCKS[capability]
        block = warps * 32 * reads * 16
        return Program(
            function="optkit.kernels.triton.device.quantize:dequantize",
            arguments=(
                Argument(name="x", type=pointer(str(problem["stored"])), binds="input:0", aligned=True),
                Argument(name="y", type=pointer(str(problem["format"])), binds="output:0", aligned=True),
                # A multiple of 16, as its last axis is one.
                Argument(name="n", type="i32", binds="n", aligned=True),
            ),
            constants={"SCALE": float(str(problem["scale"])), "BLOCK": block},
            grid=(f"cdiv(n, {block})", "1", "1"),
            warps=warps,
        )

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"n": "elements(0)"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[0]]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        return [(rows, int(problem["columns"]))]

    def edges(self, problem: Problem, capability: tuple[int, int]) -> tuple[int, ...]:
        block = int(self.program(problem, capability).constants["BLOCK"] or 1) // int(problem["columns"])
        return tuple(sorted({1, block - 1, block, block + 1}))

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        random = np.random.default_rng(seed)
        return [
            random.integers(-127, 128, self.shapes(problem, rows)[0]).astype(DTYPES[str(problem["stored"])])
        ]

    def allowed(self, problem: Problem) -> float:
        # One product, rounded once. The scale is float32.
        return {"fp16": 0.51, "bf16": 0.51, "fp32": 1.0}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        assert inputs[0] is not None
        return [inputs[0].astype(np.float64) * float(str(problem["scale"]))]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        n = shapes[0][0] * shapes[0][1]
        return 1.0 * n, float(n * (BYTES[str(problem["format"])] + 1))

    def attributes(self, problem: Problem) -> dict[str, Any]:
        return {"scale": float(str(problem["scale"])), "to": int(TYPES[str(problem["format"])])}

    def rules(self) -> Sequence[Rule]:
        return [Rule(_back(cast), self._rewrite, self._check, name=self.name) for cast in (True, False)]

    def _check(self, root: ir.Node, x: ir.Value, scale: ir.Value, zero: ir.Value) -> Match:
        match, columns, zeros = Match(), columns_of(x), constant(zero)
        if format_of(x) not in _STORED or constant(x) is not None:
            return match.fail("not activations in 8 bits", x)
        if zeros is None or zeros.astype(np.float32).any():
            return match.fail("not around 0", root)
        if scalar(scale) is None:
            return match.fail("no constant scale for all elements", scale)
        if format_of(root.outputs[0]) not in self.formats:
            return match.fail("not to float32, float16 or bfloat16", root)
        if root.op_type != "Cast" and any(n.op_type == "Cast" for n in users(root.outputs[0])):
            return match.fail("a cast follows, which the kernel does too", root)
        if columns is None or columns % _STEP:
            return match.fail(f"the last axis is no fixed multiple of {_STEP}", x)
        return match

    def _rewrite(self, op: Any, root: ir.Node, x: ir.Value, scale: ir.Value, zero: ir.Value) -> Any:
        kind = root.outputs[0].dtype
        assert kind is not None
        attributes = {"scale": float(scalar(scale) or 1.0), "to": int(kind)}
        (y,) = op.node(self.op, [x], attributes, domain=DOMAIN)
        y.type, y.shape = ir.TensorType(kind), x.shape
        return y


def _back(cast: bool) -> Callable[..., Any]:
    if cast:
        return lambda op, x, scale, zero: op.Cast(op.DequantizeLinear(x, scale, zero))
    return lambda op, x, scale, zero: op.DequantizeLinear(x, scale, zero)


class Dequantize(_Back):
    """``y = x * scale`` of int8 or e4m3, one scale for all elements, in the format that reads it.

    ONNX's DequantizeLinear without a zero point. The product is rounded once.
    """

    name, op = "dequantize", "Dequantize"
    size: ClassVar[int] = 2
    source: ClassVar[str] = "arXiv:1712.05877, ONNX DequantizeLinear"
    examples: ClassVar[tuple[Problem, ...]] = (
        {**_EXAMPLE, "stored": "int8"},
        {**_EXAMPLE, "stored": "fp8"},
    )
    small: ClassVar[tuple[Problem, ...]] = tuple(
        {**e, "stored": s} for e, s in zip(_SMALL, ("int8", "fp8", "int8"), strict=True)
    )
    body: ClassVar[str] = (
        f'<domain: "optkit", opset_import: ["" : %d]> {op} <scale, to> (x) => (y) {{ '
        "f = Cast <to = 1> (x) s = Constant <value_float: float = @scale> () p = Mul (f, s) y = Cast <to: int = @to> (p) }"
    )
