"""Cross-entropy of scores with labels, without the shares in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    pointer,
    power_of_two,
)
from optkit.kernels.triton.drawing import draw
from optkit.rewrite import Match, Rule
from optkit.targets.gpu import Capability

# Columns of a step, at most: with 4 warps, 32 bytes a thread in float16.
_BLOCK, _WARPS, _STEP = 2048, 4, 16
_REDUCTIONS = {"none": "", "mean": "ReduceMean", "sum": "ReduceSum"}


class _Loss(Kernel):
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")

    def problem(self, node: ir.Node) -> Problem | str:
        fmt, columns = format_of(node.inputs[0]), columns_of(node.inputs[0])
        labels = node.inputs[1]
        if fmt is None or fmt not in self.formats or labels is None or labels.dtype != ir.DataType.INT64:
            return f"no formats of {self.name}"
        if columns is None or columns % _STEP:
            return f"the last axis is no fixed multiple of {_STEP}"
        return {"format": fmt, "columns": columns}

    def program(self, problem: Problem, capability: Capability) -> Program:
        fmt, columns = str(problem["format"]), int(problem["columns"])
        return Program(
            function="optkit.kernels.triton.device.cross_entropy:cross_entropy",
            arguments=(
                Argument(name="x", type=pointer(fmt), binds="input:0", aligned=True),
                Argument(name="labels", type="*i64", binds="input:1", aligned=True),
                Argument(name="y", type=pointer(fmt), binds="output:0", aligned=True),
            ),
            constants={"COLUMNS": columns, "BLOCK": min(_BLOCK, power_of_two(columns))},
            grid=("rows", "1", "1"),
            warps=_WARPS,
        )

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"rows": "axis(1, 0)"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[1]]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        return [(rows, int(problem["columns"])), (rows,)]

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        # A row is a program: what is around a block is the number of columns, in ``small``.
        return (1, 2, 5)

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        x, labels = self.shapes(problem, rows)
        random = np.random.default_rng(seed + 1)
        return [*draw([x], str(problem["format"]), seed), random.integers(0, x[1], labels)]

    def allowed(self, problem: Problem) -> float:
        # Rounded once; float32 also has the rounding of exp, log and of the sum.
        return {"fp16": 0.51, "bf16": 0.51, "fp32": 4.0}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        x, labels = (a for a in inputs if a is not None)
        wide = x.astype(np.float64)
        most = wide.max(-1)
        return [most + np.log(np.exp(wide - most[:, None]).sum(-1)) - wide[np.arange(len(labels)), labels]]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        rows, columns = shapes[0]
        size = BYTES[str(problem["format"])]
        return 5.0 * rows * columns, float(rows * (columns * size + 8 + size))

    def rules(self) -> Sequence[Rule]:
        return [
            Rule(_pattern, self._rewrite(name), self._check(name), name=self.name) for name in _REDUCTIONS
        ]

    def _check(self, reduction: str) -> Callable[..., Match]:
        def check(root: ir.Node, x: ir.Value, labels: ir.Value) -> Match:
            match, columns = Match(), columns_of(x)
            if attribute(root, "reduction", "mean") != reduction:
                return match.fail(
                    f"the losses are reduced by {attribute(root, 'reduction', 'mean')}, not {reduction}", root
                )
            if (
                format_of(x) not in self.formats
                or rank(x) != 2
                or labels.dtype != ir.DataType.INT64
                or rank(labels) != 1
            ):
                return match.fail("not rows of float32, float16 or bfloat16 with int64 labels", x)
            if attribute(root, "ignore_index") is not None:
                return match.fail("leaves out labels", root)
            if len(root.outputs) > 1 and (root.outputs[1].uses() or root.outputs[1].is_graph_output()):
                return match.fail("the logarithms of the shares are used too", root)
            if columns is None or columns % _STEP:
                return match.fail(f"the last axis is no fixed multiple of {_STEP}", x)
            return match

        return check

    def _rewrite(self, reduction: str) -> Callable[..., Any]:
        def rewrite(op: Any, root: ir.Node, x: ir.Value, labels: ir.Value) -> Any:
            (y,) = op.node(self.op, [x, labels], domain=DOMAIN)
            y.type, y.shape = x.type, labels.shape
            reduce = _REDUCTIONS[reduction]
            return getattr(op, reduce)(y, keepdims=0) if reduce else y

        return rewrite


def _pattern(op: Any, x: Any, labels: Any) -> Any:
    return op.SoftmaxCrossEntropyLoss(x, labels)


class CrossEntropy(_Loss):
    """``y = log(sum(exp(x))) - x[label]`` of rows, each read once; any number of columns.

    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867, algorithm 3, in every column
    of a block by itself. In float32.
    """

    name, op = "cross-entropy", "CrossEntropy"
    size: ClassVar[int] = 2
    source: ClassVar[str] = "arXiv:1805.02867"
    examples: ClassVar[tuple[Problem, ...]] = ({"format": "bf16", "columns": 32000},)
    small: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp16", "columns": 48},
        {"format": "bf16", "columns": 2048},
        {"format": "fp32", "columns": 2032},
        {"format": "fp32", "columns": 4112},
    )
    body: ClassVar[str] = (
        f'<domain: "optkit", opset_import: ["" : %d]> {op} (x, labels) => (y) {{ '
        'f = Cast <to = 1> (x) l = SoftmaxCrossEntropyLoss <reduction = "none"> (f, labels) y = CastLike (l, x) }'
    )
