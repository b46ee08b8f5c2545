"""Softmax of the last axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, rank
from optkit.kernels.base import (
    BYTES,
    DOMAIN,
    Argument,
    Kernel,
    Problem,
    Program,
    columns_of,
    format_of,
    power_of_two,
)
from optkit.kernels.triton.drawing import draw
from optkit.kernels.triton.norm import BLOCKS, fits
from optkit.rewrite import Match, Rule
from optkit.targets.gpu import Capability


class _Rows(Kernel):
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")
    examples: ClassVar[tuple[Problem, ...]] = ({"format": "bf16", "columns": 4096},)
    small: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp16", "columns": 80},
        {"format": "bf16", "columns": 128},
        {"format": "fp32", "columns": 48},
    )

    def problem(self, node: ir.Node) -> Problem | str:
        fmt, columns = format_of(node.inputs[0]), columns_of(node.inputs[0])
        if fmt is None or fmt not in self.formats:
            return f"no format of {self.name}"
        if columns is None:
            return "the last axis is not fixed"
        return fits(columns) or {"format": fmt, "columns": columns}

    def program(self, problem: Problem, capability: Capability) -> Program:
        fmt, columns = str(problem["format"]), int(problem["columns"])
        elements, most = BLOCKS[capability]
        block = power_of_two(columns)
        rows = max(1, min(elements // block, 8))
        return Program(
            function="optkit.kernels.triton.device.softmax:softmax",
            arguments=(
                Argument(name="x", type=f"*{fmt}", binds="input:0", aligned=True),
                Argument(name="y", type=f"*{fmt}", binds="output:0", aligned=True),
                Argument(name="rows", type="i32", binds="rows"),
            ),
            constants={"COLUMNS": columns, "BLOCK": block, "ROWS": rows},
            grid=(f"cdiv(rows, {rows})", "1", "1"),
            # Each thread reads 16 bytes at a time.
            warps=max(1, min(most, rows * block * BYTES[fmt] // (16 * 32))),
        )

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"rows": f"elements(0) // {problem['columns']}"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[0]]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        return [(rows, int(problem["columns"]))]

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        block = int(self.program(problem, capability).constants["ROWS"] or 1)
        return tuple(sorted({1, max(1, block - 1), block, block + 1}))

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        return draw(self.shapes(problem, rows), str(problem["format"]), seed)

    def allowed(self, problem: Problem) -> float:
        # Halves are rounded once; float32 also has the rounding of exp, of the sum and a quotient.
        return {"fp16": 0.51, "bf16": 0.51, "fp32": 4.0}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        assert inputs[0] is not None
        x = inputs[0].astype(np.float64)
        shares = np.exp(x - x.max(-1, keepdims=True))
        return [shares / shares.sum(-1, keepdims=True)]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        n = shapes[0][0] * shapes[0][1]
        return 5.0 * n, 2.0 * n * BYTES[str(problem["format"])]

    def rules(self) -> Sequence[Rule]:
        return [Rule(_pattern, self._rewrite, self._check, name=self.name)]

    def _check(self, root: ir.Node, x: ir.Value) -> Match:
        match, columns = Match(), columns_of(x)
        if format_of(x) not in self.formats:
            return match.fail("not known to be float32, float16 or bfloat16", x)
        if attribute(root, "axis", -1) not in (-1, (rank(x) or 0) - 1):
            return match.fail("not over the last axis", root)
        if columns is None or (why := fits(columns)) is not None:
            return match.fail("the last axis is not fixed" if columns is None else str(why), x)
        return match

    def _rewrite(self, op: Any, root: ir.Node, x: ir.Value) -> Any:
        (y,) = op.node(self.op, [x], domain=DOMAIN)
        y.type, y.shape = x.type, x.shape
        return y


def _pattern(op: Any, x: Any) -> Any:
    return op.Softmax(x)


class Softmax(_Rows):
    """``y = exp(x - max(x)) / sum(exp(x - max(x)))`` over the last axis, each row read once.

    Triton's tutorial 02. All in float32.
    """

    name, op = "softmax", "Softmax"
    size: ClassVar[int] = 1
    source: ClassVar[str] = "Triton tutorial 02"
    body: ClassVar[str] = (
        f'<domain: "optkit", opset_import: ["" : %d]> {op} (x) => (y) {{ y = Softmax <axis = -1> (x) }}'
    )
