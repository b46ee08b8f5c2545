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
from optkit.targets.gpu import Capability

_STEP, _STORED = 16, ("int8", "fp8")


class _OneGrid(Kernel):
    """What both have: a grid for all elements, its step and zero point the last two operands."""

    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")
    entry: ClassVar[str]

    def program(self, problem: Problem, capability: Capability) -> Program:
        given, made = self._ends(problem)
        warps, reads = BLOCKS[capability]
        block = warps * 32 * reads * 16 // BYTES[given]
        stored = str(problem["stored"])
        return Program(
            function=f"optkit.kernels.triton.device.quantize:{self.entry}",
            arguments=(
                Argument(name="x", type=pointer(given), binds="input:0", aligned=True),
                *grid_arguments(stored, 1),
                Argument(name="y", type=pointer(made), binds="output:0", aligned=True),
                # A multiple of 16, as its last axis is one.
                Argument(name="n", type="i32", binds="n", aligned=True),
            ),
            constants={**({} if stored == "int8" else {"zero": None}), "BLOCK": block},
            grid=(f"cdiv(n, {block})", "1", "1"),
            warps=warps,
        )

    def _ends(self, problem: Problem) -> tuple[str, str]:
        """Formats of what is read and of what is written."""
        return str(problem["format"]), str(problem["stored"])

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"n": "elements(0)"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[0]]

    def output_format(self, problem: Problem, output: int = 0) -> str:
        return self._ends(problem)[1]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        return [(rows, int(problem["columns"])), (), ()]

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        block = int(self.program(problem, capability).constants["BLOCK"] or 1) // int(problem["columns"])
        return tuple(sorted({1, block - 1, block, block + 1}))

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        n = shapes[0][0] * shapes[0][1]
        return 4.0 * n, float(n * (BYTES[str(problem["format"])] + 1))


def grid_arguments(stored: str, at: int) -> tuple[Argument, ...]:
    """Step and zero point of a grid, which are the inputs ``at`` and behind it; floats have no zero point."""
    step = Argument(name="step", type=pointer("fp32"), binds=f"input:{at}")
    zero = Argument(name="zero", type=pointer(stored), binds=f"input:{at + 1}")
    return (step, zero) if stored == "int8" else (step,)


def draw_grid(stored: str) -> list[np.ndarray | None]:
    """A step and a zero point."""
    return [np.array(0.02, np.float32), np.array(-3 if stored == "int8" else 0, DTYPES[stored])]


def grid_problem(node: ir.Node) -> str | None:
    """The format of the grid that the last two operands of ``node`` are of; None where they are of none."""
    step, zero = node.inputs[-2:]
    stored = format_of(zero)
    return stored if stored in _STORED and format_of(step) == "fp32" else None


def step_miss(step: ir.Value, stored: str | None) -> str | None:
    """Why a grid around 0 is none that a kernel has, or None."""
    if stored not in _STORED:
        return "not to int8 or e4m3"
    return "no constant step for all elements" if scalar(step) is None else None


def grid_miss(step: ir.Value, zero: ir.Value, stored: str | None) -> str | None:
    """Why a grid is none that a kernel has, or None."""
    if why := step_miss(step, stored):
        return why
    found = constant(zero)
    if found is None or found.size != 1:
        return "no constant zero point for all elements"
    return (
        "floats of 8 bits around another number than 0"
        if stored == "fp8" and found.astype(np.float32).any()
        else None
    )


def _wide(step: ir.Value) -> ir.Value | np.ndarray:
    """In float32, which programs read."""
    number = scalar(step)
    return step if format_of(step) == "fp32" or number is None else np.array(number, np.float32)


class _Onto(_OneGrid):
    entry: ClassVar[str] = "quantize"

    def problem(self, node: ir.Node) -> Problem | str:
        fmt, columns, stored = format_of(node.inputs[0]), columns_of(node.inputs[0]), grid_problem(node)
        if fmt is None or fmt not in self.formats or stored is None:
            return f"no formats of {self.name}"
        if columns is None or columns % _STEP:
            return f"the last axis is no fixed multiple of {_STEP}"
        return {"format": fmt, "columns": columns, "stored": stored}

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        x = draw([self.shapes(problem, rows)[0]], str(problem["format"]), seed)
        return [*x, *draw_grid(str(problem["stored"]))]

    def allowed(self, problem: Problem) -> float:
        return 0.0

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        return [on_grid(*(a for a in inputs if a is not None))]

    def rules(self) -> Sequence[Rule]:
        return [Rule(_pattern(cast), self._rewrite, self._check, name=self.name) for cast in (True, False)]

    def _check(self, root: ir.Node, x: ir.Value, step: ir.Value, zero: ir.Value) -> Match:
        match, columns = Match(), columns_of(x)
        if format_of(x) not in self.formats:
            return match.fail("not known to be float32, float16 or bfloat16", x)
        if why := grid_miss(step, zero, format_of(root.outputs[0])):
            return match.fail(why, root)
        if columns is None or columns % _STEP:
            return match.fail(f"the last axis is no fixed multiple of {_STEP}", x)
        return match

    def _rewrite(self, op: Any, root: ir.Node, x: ir.Value, step: ir.Value, zero: ir.Value) -> Any:
        (y,) = op.node(self.op, [x, _wide(step), zero], domain=DOMAIN)
        y.type, y.shape = root.outputs[0].type, x.shape
        return y


def on_grid(x: np.ndarray, step: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """``x`` as QuantizeLinear puts it onto a grid, in float64."""
    # ONNX divides in the format of the step, float32: in another, ties would be none.
    quotient: np.ndarray = x.astype(np.float32) / step
    if zero.dtype == DTYPES["int8"]:
        return np.asarray(np.clip(np.rint(quotient.astype(np.float64)) + float(zero), -128, 127))
    return np.asarray(quotient.clip(-448, 448).astype(DTYPES["fp8"]), np.float64)


def _pattern(cast: bool) -> Callable[..., Any]:
    if cast:
        return lambda op, x, step, zero: op.QuantizeLinear(op.Cast(x), step, zero)
    return lambda op, x, step, zero: op.QuantizeLinear(x, step, zero)


class Quantize(_Onto):
    """``y = clamp(round(x / step) + zero)`` in int8, or ``clamp(x / step)`` in e4m3 (from sm_89 on), one step for all elements.

    Jacob et al. 2018, arXiv:1712.05877, eq. 1; Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433;
    ONNX's QuantizeLinear, ties to even. In float32. The type of ``zero`` is that of the grid.
    """

    name, op = "quantize", "Quantize"
    size: ClassVar[int] = 2
    source: ClassVar[str] = "arXiv:1712.05877, arXiv:2209.05433, ONNX QuantizeLinear"
    body: ClassVar[str] = (
        f'<domain: "optkit", opset_import: ["" : %d]> {op} (x, step, zero) => (y) {{ '
        "f = Cast <to = 1> (x) y = QuantizeLinear (f, step, zero) }"
    )
    examples: ClassVar[tuple[Problem, ...]] = tuple(
        {"format": "fp16", "columns": 1536, "stored": s} for s in _STORED
    )
    small: ClassVar[tuple[Problem, ...]] = tuple(
        {"format": f, "columns": 128, "stored": s}
        for f, s in (("fp16", "int8"), ("bf16", "fp8"), ("fp32", "int8"))
    )


class _Back(_OneGrid):
    entry: ClassVar[str] = "dequantize"

    def _ends(self, problem: Problem) -> tuple[str, str]:
        return str(problem["stored"]), str(problem["format"])

    def problem(self, node: ir.Node) -> Problem | str:
        x = node.inputs[0]
        stored, columns = format_of(x), columns_of(x)
        fmt = next((name for name, kind in TYPES.items() if int(kind) == attribute(node, "to")), None)
        if fmt not in self.formats or stored is None or stored != grid_problem(node):
            return f"no formats of {self.name}"
        if columns is None or columns % _STEP:
            return f"the last axis is no fixed multiple of {_STEP}"
        return {"format": fmt, "columns": columns, "stored": stored}

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        random, stored = np.random.default_rng(seed), str(problem["stored"])
        x = random.integers(-127, 128, self.shapes(problem, rows)[0]).astype(DTYPES[stored])
        return [x, *draw_grid(stored)]

    def allowed(self, problem: Problem) -> float:
        # One product, rounded once. The step is float32.
        return {"fp16": 0.51, "bf16": 0.51, "fp32": 1.0}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        x, step, zero = (a.astype(np.float64) for a in inputs if a is not None)
        return [(x - zero) * step]

    def attributes(self, problem: Problem) -> dict[str, Any]:
        return {"to": int(TYPES[str(problem["format"])])}

    def rules(self) -> Sequence[Rule]:
        return [Rule(_back(cast), self._rewrite, self._check, name=self.name) for cast in (True, False)]

    def _check(self, root: ir.Node, x: ir.Value, step: ir.Value, zero: ir.Value) -> Match:
        match, columns = Match(), columns_of(x)
        if constant(x) is not None:
            return match.fail("no activations", x)
        if why := grid_miss(step, zero, format_of(x)):
            return match.fail(why, root)
        if format_of(root.outputs[0]) not in self.formats:
            return match.fail("not to float32, float16 or bfloat16", root)
        if root.op_type != "Cast" and any(n.op_type == "Cast" for n in users(root.outputs[0])):
            return match.fail("a cast follows, which the kernel does too", root)
        if columns is None or columns % _STEP:
            return match.fail(f"the last axis is no fixed multiple of {_STEP}", x)
        return match

    def _rewrite(self, op: Any, root: ir.Node, x: ir.Value, step: ir.Value, zero: ir.Value) -> Any:
        kind = root.outputs[0].dtype
        assert kind is not None
        (y,) = op.node(self.op, [x, _wide(step), zero], {"to": int(kind)}, domain=DOMAIN)
        y.type, y.shape = ir.TensorType(kind), x.shape
        return y


def _back(cast: bool) -> Callable[..., Any]:
    if cast:
        return lambda op, x, step, zero: op.Cast(op.DequantizeLinear(x, step, zero))
    return lambda op, x, step, zero: op.DequantizeLinear(x, step, zero)


class Dequantize(_Back):
    """``y = (x - zero) * step`` of int8 or e4m3, one step for all elements, in the format that reads it.

    ONNX's DequantizeLinear. The product is rounded once.
    """

    name, op = "dequantize", "Dequantize"
    size: ClassVar[int] = 2
    source: ClassVar[str] = "arXiv:1712.05877, ONNX DequantizeLinear"
    examples: ClassVar[tuple[Problem, ...]] = Quantize.examples
    small: ClassVar[tuple[Problem, ...]] = Quantize.small
    body: ClassVar[str] = (
        f'<domain: "optkit", opset_import: ["" : %d]> {op} <to> (x, step, zero) => (y) {{ '
        "f = DequantizeLinear (x, step, zero) y = Cast <to: int = @to> (f) }"
    )
