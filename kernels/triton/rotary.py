"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute
from optkit.kernels.base import BYTES, DOMAIN, Argument, Kernel, Problem, Program, format_of
from optkit.kernels.triton.drawing import draw
from optkit.rewrite import Match, Rule

# Elements of a block, and its warps, by architecture: enough bytes in flight for the memory of each.
_BLOCKS = {
    (8, 0): (4096, 4), (8, 6): (2048, 4), (8, 7): (2048, 4), (8, 9): (2048, 4),
    (9, 0): (4096, 4), (10, 0): (4096, 4), (12, 0): (2048, 4), (12, 1): (2048, 4),
}  # fmt: skip
_DEPTHS = (16, 32, 64, 128, 256)
# Sizes that ``shapes`` draws with.
_BATCH, _HEADS = 2, 3


class _Turned(Kernel):
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")
    examples: ClassVar[tuple[Problem, ...]] = ({"format": "bf16", "depth": 128, "batch": True},)
    small: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp16", "depth": 32, "batch": False},
        {"format": "bf16", "depth": 64, "batch": True},
        {"format": "fp32", "depth": 16, "batch": False},
    )

    def problem(self, node: ir.Node) -> Problem | str:
        x, cos = node.inputs[:2]
        fmt, depth = format_of(x), _depth(x)
        if fmt is None or fmt not in self.formats:
            return f"no format of {self.name}"
        if depth is None:
            return f"heads have no fixed size of {', '.join(map(str, _DEPTHS))} elements"
        assert cos is not None and cos.shape is not None
        return {"format": fmt, "depth": depth, "batch": cos.shape[0] != 1}

    def program(self, problem: Problem, capability: tuple[int, int]) -> Program:
        fmt, depth = str(problem["format"]), int(problem["depth"])
        elements, warps = _BLOCKS[capability]
        rows = elements // depth
        binds = (("x", "input:0"), ("cos", "input:1"), ("sin", "input:2"), ("y", "output:0"))
        return Program(
            function="optkit.kernels.triton.device.rotary:rotary",
            arguments=(
                *(Argument(name=n, type=f"*{fmt}", binds=b, aligned=True) for n, b in binds),
                *(Argument(name=n, type="i32", binds=n) for n in ("rows", "sequence", "heads")),
            ),
            constants={"DEPTH": depth, "ROWS": rows, "BATCH": bool(problem["batch"])},
            grid=(f"cdiv(rows, {rows})", "1", "1"),
            warps=warps,
        )

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"rows": f"elements(0) // {problem['depth']}", "sequence": "axis(0, 2)", "heads": "axis(0, 1)"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[0]]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        depth = int(problem["depth"])
        angles = (_BATCH if problem["batch"] else 1, 1, rows, depth)
        return [(_BATCH, _HEADS, rows, depth), angles, angles]

    def edges(self, problem: Problem, capability: tuple[int, int]) -> tuple[int, ...]:
        rows = int(self.program(problem, capability).constants["ROWS"] or 1)
        return (1, rows - 1, rows, rows + 1)

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        return draw(self.shapes(problem, rows), str(problem["format"]), seed)

    def allowed(self, problem: Problem) -> float:
        # Halves are rounded once; float32 also has the rounding of two products.
        return {"fp16": 0.51, "bf16": 0.51, "fp32": 2.0}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        x, cos, sin = (a.astype(np.float64) for a in inputs if a is not None)
        low, high = np.split(x, 2, -1)
        return [x * cos + np.concatenate([-high, low], -1) * sin]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        n, angles = int(np.prod(shapes[0])), int(np.prod(shapes[1]))
        return 3.0 * n, float((2 * n + 2 * angles) * BYTES[str(problem["format"])])

    def rules(self) -> Sequence[Rule]:
        return [Rule(_pattern, self._rewrite, self._check, name=self.name)]

    def _check(
        self, root: ir.Node, x: ir.Value, cos: ir.Value, sin: ir.Value, high: ir.Value, low: ir.Value
    ) -> Match:
        match = Match()
        if format_of(x) not in self.formats or cos.dtype != x.dtype or sin.dtype != x.dtype:
            return match.fail("not known to be float32, float16 or bfloat16", x)
        depth, halves = _depth(x), low.producer()
        if depth is None:
            return match.fail(f"not batches of heads of {', '.join(map(str, _DEPTHS))} elements", x)
        if (
            halves is None
            or halves.op_type != "Split"
            or halves.inputs[0] is not x
            or high.producer() is not halves
        ):
            return match.fail("not turned against its own halves", low)
        if list(halves.outputs) != [low, high] or attribute(halves, "axis", 0) not in (-1, 3):
            return match.fail("not the two halves of the last axis", halves)
        if low.shape is None or high.shape is None or low.shape[-1] != high.shape[-1]:
            return match.fail("not two equal halves", halves)
        places, angles = shape_of(x), shape_of(cos)
        if places is None or angles is None or angles != shape_of(sin) or len(angles) != 4:
            return match.fail("which axes the angles have is not known", cos)
        if angles[1] != 1 or angles[2:] != places[2:]:
            return match.fail("angles are not known to be one for each position and element", cos)
        if angles[0] not in (1, places[0]):
            return match.fail("angles of another number of samples", cos)
        return match

    def _rewrite(self, op: Any, root: ir.Node, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> Any:
        (y,) = op.node(self.op, [x, cos, sin], domain=DOMAIN)
        y.type, y.shape = x.type, x.shape
        return y


def _depth(value: ir.Value | None) -> int | None:
    """Elements of a head, where they are one of those that there are blocks for."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    depth = value.shape[3]
    return depth if isinstance(depth, int) and depth in _DEPTHS else None


def _pattern(op: Any, x: Any, cos: Any, sin: Any, high: Any, low: Any) -> Any:
    return op.Add(op.Mul(x, cos), op.Mul(op.Concat(op.Neg(high), low), sin))


class Rotary(_Turned):
    """``y = x * cos + concat(-x_high, x_low) * sin`` of ``[batch, heads, sequence, depth]``; angles ``[batch or 1, 1, sequence, depth]``.

    Su et al., "RoFormer", 2021, arXiv:2104.09864, eq. 34, with the halves of GPT-NeoX. All in float32.
    """

    name, op = "rotary", "Rotary"
    size: ClassVar[int] = 5
    source: ClassVar[str] = "arXiv:2104.09864"
    body: ClassVar[str] = (
        f'<domain: "optkit", opset_import: ["" : %d]> {op} (x, cos, sin) => (y) {{ '
        "l, h = Split <axis = -1, num_outputs = 2> (x) n = Neg (h) c = Concat <axis = -1> (n, l) "
        "a = Mul (x, cos) b = Mul (c, sin) y = Add (a, b) }"
    )
