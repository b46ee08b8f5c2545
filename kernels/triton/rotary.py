"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute, scalar
from optkit.kernels.base import (
    BYTES,
    DOMAIN,
    Argument,
    Kernel,
    Problem,
    Program,
    columns_of,
    format_of,
)
from optkit.kernels.triton.drawing import draw
from optkit.rewrite import Match, Rule
from optkit.targets.gpu import GFX942, Capability

# Elements of a block, and its warps, by architecture: enough bytes in flight for the memory of each.
_BLOCKS = {
    (8, 0): (4096, 4), (8, 6): (2048, 4), (8, 7): (2048, 4), (8, 9): (2048, 4),
    (9, 0): (4096, 4), (10, 0): (4096, 4), (12, 0): (2048, 4), (12, 1): (2048, 4), GFX942: (4096, 4),
}  # fmt: skip
_DEPTHS = (16, 32, 64, 128, 256)
# Sizes that ``shapes`` draws with.
_BATCH, _HEADS = 2, 3


class _Turned(Kernel):
    pairs: ClassVar[bool]
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")
    examples: ClassVar[tuple[Problem, ...]] = (
        {"format": "bf16", "depth": 128, "batch": True, "inner": False},
    )
    small: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp16", "depth": 32, "batch": False, "inner": False},
        {"format": "bf16", "depth": 64, "batch": True, "inner": False},
        {"format": "fp32", "depth": 16, "batch": False, "inner": True},
        {"format": "fp16", "depth": 32, "batch": True, "inner": True},
    )

    def problem(self, node: ir.Node) -> Problem | str:
        x, cos = node.inputs[:2]
        fmt, depth = format_of(x), _depth(x)
        if fmt is None or fmt not in self.formats:
            return f"no format of {self.name}"
        if depth is None:
            return f"heads have no fixed size of {', '.join(map(str, _DEPTHS))} elements"
        layout = _layout(x, cos)
        if layout is None:
            return "angles are not known to be one for each position and element"
        assert cos is not None and cos.shape is not None
        return {"format": fmt, "depth": depth, "batch": cos.shape[0] != 1, "inner": layout == "inner"}

    def program(self, problem: Problem, capability: Capability) -> Program:
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
            constants={
                "DEPTH": depth,
                "ROWS": rows,
                "BATCH": bool(problem["batch"]),
                "INNER": bool(problem["inner"]),
                "PAIRS": self.pairs,
            },
            grid=(f"cdiv(rows, {rows})", "1", "1"),
            warps=warps,
        )

    def expressions(self, problem: Problem) -> dict[str, str]:
        sequence, heads = (1, 2) if problem["inner"] else (2, 1)
        return {
            "rows": f"elements(0) // {problem['depth']}",
            "sequence": f"axis(0, {sequence})",
            "heads": f"axis(0, {heads})",
        }

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[0]]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        depth = int(problem["depth"])
        batch = _BATCH if problem["batch"] else 1
        if problem["inner"]:
            return [(_BATCH, rows, _HEADS, depth), *[(batch, rows, 1, depth)] * 2]
        return [(_BATCH, _HEADS, rows, depth), *[(batch, 1, rows, depth)] * 2]

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        rows = int(self.program(problem, capability).constants["ROWS"] or 1)
        return (1, rows - 1, rows, rows + 1)

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        return draw(self.shapes(problem, rows), str(problem["format"]), seed)

    def allowed(self, problem: Problem) -> float:
        # Halves are rounded once; float32 also has the rounding of two products.
        return {"fp16": 0.51, "bf16": 0.51, "fp32": 2.0}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        x, cos, sin = (a.astype(np.float64) for a in inputs if a is not None)
        if self.pairs:
            turned = np.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        else:
            low, high = np.split(x, 2, -1)
            turned = np.concatenate([-high, low], -1)
        return [x * cos + turned * sin]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        n, angles = int(np.prod(shapes[0])), int(np.prod(shapes[1]))
        return 3.0 * n, float((2 * n + 2 * angles) * BYTES[str(problem["format"])])

    def rules(self) -> Sequence[Rule]:
        pattern = _neighbours if self.pairs else _halves
        return [Rule(pattern, self._rewrite, self._check, name=self.name)]

    def _check(
        self,
        root: ir.Node,
        x: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        high: ir.Value,
        low: ir.Value,
        **axes: ir.Value,
    ) -> Match:
        match = Match()
        if format_of(x) not in self.formats or cos.dtype != x.dtype or sin.dtype != x.dtype:
            return match.fail("not known to be float32, float16 or bfloat16", x)
        if _depth(x) is None:
            return match.fail(f"not batches of heads of {', '.join(map(str, _DEPTHS))} elements", x)
        if why := self._apart(root, x, low, high, **axes):
            return match.fail(why, low)
        if shape_of(cos) is None or shape_of(cos) != shape_of(sin):
            return match.fail("which axes the angles have is not known", cos)
        if _layout(x, cos) is None:
            return match.fail("angles are not known to be one for each position and element", cos)
        return match

    def _apart(
        self, root: ir.Node, x: ir.Value, low: ir.Value, high: ir.Value, **axes: ir.Value
    ) -> str | None:
        """Why ``low`` and ``high`` are not what is turned against each other in ``x``; None where they are."""
        if self.pairs:
            if any(scalar(axes[k]) not in (-1, 4) for k in ("to", "also")):
                return "not put side by side"
            if shape_of(root.outputs[0]) != shape_of(x):
                return "not put back into the shape of the heads"
            return (
                None if _every_other(x, low) == 0 and _every_other(x, high) == 1 else "not its own neighbours"
            )
        halves = low.producer()
        if (
            halves is None
            or halves.op_type != "Split"
            or halves.inputs[0] is not x
            or high.producer() is not halves
        ):
            return "not turned against its own halves"
        if list(halves.outputs) != [low, high] or attribute(halves, "axis", 0) not in (-1, 3):
            return "not the two halves of the last axis"
        if low.shape is None or high.shape is None or low.shape[-1] != high.shape[-1]:
            return "not two equal halves"
        return None

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


def _layout(x: ir.Value | None, cos: ir.Value | None) -> str | None:
    """``outer`` where the heads lie before the positions, ``inner`` where behind; None where angles are not one for each position."""
    places, angles = shape_of(x), shape_of(cos)
    if places is None or angles is None or len(places) != 4 or len(angles) != 4:
        return None
    if angles[0] not in (1, places[0]) or angles[3] != places[3]:
        return None
    if angles[1] == 1 and angles[2] == places[2]:
        return "outer"
    return "inner" if angles[2] == 1 and angles[1] == places[1] else None


def _every_other(x: ir.Value, part: ir.Value) -> int | None:
    """Where ``part`` starts, if it is every other element of the last axis of ``x``."""
    node = part.producer()
    if node is None or node.op_type != "Slice" or node.inputs[0] is not x or len(node.inputs) != 5:
        return None
    start, end, axis, step = (scalar(v) for v in node.inputs[1:])
    last = columns_of(x)
    if start is None or end is None or last is None or end < last or axis not in (-1, 3) or step != 2:
        return None
    return int(start)


def _halves(op: Any, x: Any, cos: Any, sin: Any, high: Any, low: Any) -> Any:
    return op.Add(op.Mul(x, cos), op.Mul(op.Concat(op.Neg(high), low), sin))


def _neighbours(
    op: Any, x: Any, cos: Any, sin: Any, high: Any, low: Any, to: Any, also: Any, form: Any
) -> Any:
    beside = op.Concat(op.Unsqueeze(op.Neg(high), to), op.Unsqueeze(low, also), axis=-1)
    return op.Add(op.Mul(x, cos), op.Mul(op.Reshape(beside, form), sin))


_BODY = '<domain: "optkit", opset_import: ["" : %%d]> %s (x, cos, sin) => (y) { %s a = Mul (x, cos) b = Mul (c, sin) y = Add (a, b) }'


class Rotary(_Turned):
    """``y = x * cos + concat(-x_high, x_low) * sin`` of ``[batch, heads, sequence, depth]``; angles ``[batch or 1, 1, sequence, depth]``.

    Su et al., "RoFormer", 2021, arXiv:2104.09864, eq. 34, with the halves of GPT-NeoX. All in float32. The heads may as well lie
    behind the positions, with angles ``[batch or 1, sequence, 1, depth]``.
    """

    name, op, pairs = "rotary", "Rotary", False
    size: ClassVar[int] = 5
    source: ClassVar[str] = "arXiv:2104.09864"
    body: ClassVar[str] = _BODY % (
        op, "l, h = Split <axis = -1, num_outputs = 2> (x) n = Neg (h) c = Concat <axis = -1> (n, l)"
    )  # fmt: skip


class RotaryPairs(_Turned):
    """``rotary`` of neighbours: ``y = x * cos + stack(-x_odd, x_even) * sin``, as GPT-J and Cohere have them.

    Su et al., "RoFormer", 2021, arXiv:2104.09864, eq. 34. As ``rotary``.
    """

    name, op, pairs = "rotary-pairs", "RotaryPairs", True
    size: ClassVar[int] = 7
    source: ClassVar[str] = "arXiv:2104.09864"
    body: ClassVar[str] = _BODY % (
        op,
        "zero = Constant <value_ints = [0]> () one = Constant <value_ints = [1]> () two = Constant <value_ints = [2]> () "
        "last = Constant <value_ints = [-1]> () shape = Shape (x) end = Shape <start = -1> (x) "
        "l = Slice (x, zero, end, last, two) h = Slice (x, one, end, last, two) n = Neg (h) un = Unsqueeze (n, last) "
        "ul = Unsqueeze (l, last) p = Concat <axis = -1> (un, ul) c = Reshape (p, shape)",
    )
