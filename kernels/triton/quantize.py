"""Activations to int8, in front of products of integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, scalar
from optkit.kernels.base import BYTES, DOMAIN, Argument, Kernel, Problem, Program, columns_of, format_of
from optkit.kernels.triton.drawing import draw
from optkit.kernels.triton.gated import BLOCKS
from optkit.rewrite import Match, Rule

_STEP = 16


class _Grid(Kernel):
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")
    examples: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp16", "columns": 1536, "scale": "0.02"},
        {"format": "fp32", "columns": 4096, "scale": "0.02"},
    )
    small: ClassVar[tuple[Problem, ...]] = tuple(
        {"format": f, "columns": 128, "scale": "0.02"} for f in ("fp16", "bf16", "fp32")
    )

    def problem(self, node: ir.Node) -> Problem | str:
        fmt, columns = format_of(node.inputs[0]), columns_of(node.inputs[0])
        if fmt is None or fmt not in self.formats:
            return f"no format of {self.name}"
        if columns is None or columns % _STEP:
            return f"the last axis is no fixed multiple of {_STEP}"
        return {"format": fmt, "columns": columns, "scale": repr(float(attribute(node, "scale", 1.0)))}  # type: ignore[arg-type]

    def program(self, problem: Problem, capability: tuple[int, int]) -> Program:
        fmt = str(problem["format"])
        warps, reads = BLOCKS[capability]
        block = warps * 32 * reads * 16 // BYTES[fmt]
        return Program(
            function="optkit.kernels.triton.device.quantize:quantize",
            arguments=(
                Argument(name="x", type=f"*{fmt}", binds="input:0", aligned=True),
                Argument(name="y", type="*i8", binds="output:0", aligned=True),
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

    def output_format(self, problem: Problem) -> str:
        return "int8"

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
        # ONNX divides in the format of the scale, float32: in another, ties would be none.
        quotient = inputs[0].astype(np.float32) / np.float32(str(problem["scale"]))
        return [np.clip(np.rint(quotient.astype(np.float64)), -128, 127)]

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
        if format_of(root.outputs[0]) != "int8" or zeros is None or zeros.any():
            return match.fail("not to int8 around 0", root)
        if scalar(scale) is None:
            return match.fail("no constant scale for all elements", scale)
        if columns is None or columns % _STEP:
            return match.fail(f"the last axis is no fixed multiple of {_STEP}", x)
        return match

    def _rewrite(self, op: Any, root: ir.Node, x: ir.Value, scale: ir.Value, zero: ir.Value) -> Any:
        (y,) = op.node(self.op, [x], {"scale": float(scalar(scale) or 1.0)}, domain=DOMAIN)
        y.type, y.shape = ir.TensorType(ir.DataType.INT8), x.shape
        return y


def _pattern(cast: bool) -> Callable[..., Any]:
    if cast:
        return lambda op, x, scale, zero: op.QuantizeLinear(op.Cast(x), scale, zero)
    return lambda op, x, scale, zero: op.QuantizeLinear(x, scale, zero)


class Quantize(_Grid):
    """``y = clamp(round(x / scale), -128, 127)`` in int8, one scale for all elements.

    Jacob et al. 2018, arXiv:1712.05877, eq. 1, without a zero point; ONNX's QuantizeLinear, ties to even. In float32.
    """

    name, op = "quantize", "Quantize"
    size: ClassVar[int] = 2
    source: ClassVar[str] = "arXiv:1712.05877, ONNX QuantizeLinear"
    body: ClassVar[str] = (
        f'<domain: "optkit", opset_import: ["" : %d]> {op} <scale> (x) => (y) {{ '
        "f = Cast <to = 1> (x) s = Constant <value_float: float = @scale> () z = Constant <value = int8 {0}> () "
        "y = QuantizeLinear (f, s, z) }"
    )
