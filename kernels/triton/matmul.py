"""Products with a constant matrix in float16 and bfloat16, with bias and activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, rank
from optkit.kernels.base import BYTES, DOMAIN, Argument, Problem, Program, format_of
from optkit.kernels.triton.drawing import draw
from optkit.kernels.triton.gated import activated
from optkit.kernels.triton.tiles import Tile, Tiled
from optkit.rewrite import Match, Rule
from optkit.targets.gpu import GFX942, Capability

# Of large, of middling and of few rows, after the configurations of Triton's tutorials 03 and 09. What fits shared memory and
# registers without a stack; on 9.0 and 10.0 wide enough for wgmma and tcgen05.
_LARGE, _SMALL = Tile(m=128, n=128, k=64, warps=8, stages=3), Tile(m=64, n=64, k=64, warps=4, stages=3)
_ROOMY = (_LARGE, Tile(m=128, n=256, k=64, warps=8, stages=3), _SMALL)
_TIGHT = (_LARGE, Tile(m=128, n=128, k=32, warps=4, stages=4), _SMALL)
_TILES = {
    (8, 0): _ROOMY, (8, 7): _ROOMY, (8, 6): _TIGHT, (8, 9): _TIGHT, (12, 0): _TIGHT, (12, 1): _TIGHT,
    (9, 0): (
        Tile(m=128, n=256, k=64, warps=8, stages=3, units=132), Tile(m=128, n=128, k=64, warps=8, stages=4, units=132),
        Tile(m=64, n=128, k=64, warps=4, stages=4, units=264),
    ),
    (10, 0): (
        Tile(m=128, n=256, k=64, warps=8, stages=3, units=148), Tile(m=128, n=128, k=64, warps=8, stages=4, units=148),
        Tile(m=128, n=64, k=64, warps=4, stages=4, units=296),
    ),
    GFX942: (
        Tile(m=128, n=128, k=64, warps=8, stages=2), Tile(m=128, n=64, k=64, warps=4, stages=2),
        Tile(m=64, n=64, k=64, warps=4, stages=2),
    ),
}  # fmt: skip
# The error function needs registers of its own: wide tiles would go over to the stack.
_GELU = (_LARGE, Tile(m=128, n=64, k=64, warps=8, stages=3), _SMALL)
_GELU_TILES = {
    **_TILES, **dict.fromkeys([(8, 0), (8, 7), (8, 6), (8, 9), (12, 0), (12, 1)], _GELU), (9, 0): _TILES[9, 0][1:],
}  # fmt: skip
_GROUP, _STEP = 8, 16


class _Product(Tiled):
    bias: ClassVar[bool]
    kind: ClassVar[str] = "none"
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16")
    examples: ClassVar[tuple[Problem, ...]] = ({"format": "bf16", "columns": 4096, "depth": 4096},)
    small: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp16", "columns": 80, "depth": 48},
        {"format": "bf16", "columns": 272, "depth": 144},
    )

    def problem(self, node: ir.Node) -> Problem | str:
        x, w = node.inputs[:2]
        fmt = format_of(x)
        if fmt is None or fmt not in self.formats:
            return f"no format of {self.name}"
        if w is None or w.shape is None or not w.shape.is_static() or len(w.shape) != 2:
            return "the matrix has no fixed shape"
        depth, columns = w.shape.numpy()
        if depth % _STEP or columns % _STEP:
            return f"{depth} x {columns} are no multiples of {_STEP}"
        return {"format": fmt, "columns": columns, "depth": depth}

    def tiles(self, problem: Problem, capability: Capability) -> Sequence[Tile]:
        return (_GELU_TILES if self.kind == "gelu" else _TILES)[capability]

    def tiled(self, problem: Problem, tile: Tile) -> Program:
        fmt, columns, depth = str(problem["format"]), int(problem["columns"]), int(problem["depth"])
        t = tile
        binds = [("x", "input:0"), ("w", "input:1")]
        binds += [("bias", "input:2")] if self.bias else []
        binds += [("y", "output:0")]
        tiles = f"cdiv(rows, {t.m}) * {-(-columns // t.n)}"
        return Program(
            function=f"optkit.kernels.triton.device.matmul:matmul{'_descriptors' if t.units else ''}",
            arguments=(
                *(Argument(name=n, type=f"*{fmt}", binds=b, aligned=True) for n, b in binds),
                Argument(name="rows", type="i32", binds="rows"),
            ),
            constants={
                **({} if self.bias else {"bias": None}),
                "COLUMNS": columns, "DEPTH": depth, "M": t.m, "N": t.n, "K": t.k, "GROUP": _GROUP,
                "BIAS": self.bias, "KIND": self.kind,
            },
            grid=(f"min({t.units}, {tiles})" if t.units else tiles, "1", "1"),
            warps=t.warps, stages=t.stages, products=fmt,
        )  # fmt: skip

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"rows": f"elements(0) // {problem['depth']}"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [(*shapes[0][:-1], int(problem["columns"]))]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        columns, depth = int(problem["columns"]), int(problem["depth"])
        return [(rows, depth), (depth, columns), *([(columns,)] if self.bias else [])]

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        return draw(self.shapes(problem, rows), str(problem["format"]), seed)

    def allowed(self, problem: Problem) -> float:
        # Sums are in float32 and rounded once.
        return {"fp16": 0.55, "bf16": 0.55}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        x, w, *bias = (a.astype(np.float64) for a in inputs if a is not None)
        return [activated(self.kind, x @ w + (bias[0] if bias else 0.0))]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        rows, depth = shapes[0]
        columns = shapes[1][1]
        moved = rows * depth + depth * columns + rows * columns + self.bias * columns
        return 2.0 * rows * depth * columns, float(moved * BYTES[str(problem["format"])])

    def rules(self) -> Sequence[Rule]:
        return [Rule(_PATTERNS[self.bias, self.kind], self._rewrite, self._check, name=self.name)]

    def _check(self, root: ir.Node, x: ir.Value, w: ir.Value, bias: ir.Value | None = None) -> Match:
        match = Match()
        if format_of(x) not in self.formats or w.dtype != x.dtype:
            return match.fail("not known to be float16 or bfloat16", x)
        if rank(w) != 2 or constant(w) is None:
            return match.fail("not a constant matrix", w)
        assert w.shape is not None
        depth, columns = w.shape.numpy()
        if depth % _STEP or columns % _STEP:
            return match.fail(f"{depth} x {columns} are no multiples of {_STEP}", w)
        if (rank(x) or 0) < 2:
            return match.fail("not known to have rows", x)
        if bias is not None and (bias.dtype != x.dtype or list(bias.shape or ()) != [columns]):
            return match.fail(f"not a vector of {columns}", bias)
        if root.op_type == "Gelu" and attribute(root, "approximate", "none") != "none":
            return match.fail("Gelu by tanh", root)
        return match

    def _rewrite(self, op: Any, root: ir.Node, x: ir.Value, w: ir.Value, bias: ir.Value | None = None) -> Any:
        (y,) = op.node(self.op, [x, w] if bias is None else [x, w, bias], domain=DOMAIN)
        y.type = x.type
        return y


def _plain(op: Any, x: Any, w: Any) -> Any:
    return op.MatMul(x, w)


def _biased(op: Any, x: Any, w: Any, bias: Any) -> Any:
    return op.Add(op.MatMul(x, w), bias)


def _relu(op: Any, x: Any, w: Any, bias: Any) -> Any:
    return op.Relu(_biased(op, x, w, bias))


def _gelu(op: Any, x: Any, w: Any, bias: Any) -> Any:
    return op.Gelu(_biased(op, x, w, bias))


_PATTERNS: dict[tuple[bool, str], Callable[..., Any]] = {
    (False, "none"): _plain,
    (True, "none"): _biased,
    (True, "relu"): _relu,
    (True, "gelu"): _gelu,
}
_HEAD = '<domain: "optkit", opset_import: ["" : %%d]> %s (x, w%s) => (y) { %s }'
_SUM = "p = MatMul (x, w) "


class MatMul(_Product):
    """``y = x @ w`` with a constant matrix.

    Tiles that programs walk in groups (Triton's tutorial 03), on sm_90 and sm_100 by programs that stay, with TMA
    descriptors (tutorial 09). Sums in float32.
    """

    name, op, bias = "matmul", "MatMul", False
    size: ClassVar[int] = 1
    source: ClassVar[str] = "Triton tutorials 03, 09"
    body: ClassVar[str] = _HEAD % (op, "", "y = MatMul (x, w)")


class Linear(_Product):
    """``y = x @ w + bias`` with a constant matrix; the bias is added to sums in float32.

    As ``matmul``.
    """

    name, op, bias = "linear", "Linear", True
    size: ClassVar[int] = 2
    source: ClassVar[str] = "Triton tutorials 03, 09"
    body: ClassVar[str] = _HEAD % (op, ", bias", _SUM + "y = Add (p, bias)")


class LinearRelu(_Product):
    """``y = relu(x @ w + bias)`` with a constant matrix; nothing is rounded on the way.

    As ``matmul``.
    """

    name, op, bias, kind = "linear-relu", "LinearRelu", True, "relu"
    size: ClassVar[int] = 3
    source: ClassVar[str] = "Triton tutorials 03, 09"
    body: ClassVar[str] = _HEAD % (op, ", bias", _SUM + "s = Add (p, bias) y = Relu (s)")


class LinearGelu(_Product):
    """``y = gelu(x @ w + bias)``, the exact Gelu, with a constant matrix; nothing is rounded on the way.

    As ``matmul``.
    """

    name, op, bias, kind = "linear-gelu", "LinearGelu", True, "gelu"
    size: ClassVar[int] = 3
    source: ClassVar[str] = "Triton tutorials 03, 09"
    body: ClassVar[str] = _HEAD % (op, ", bias", _SUM + "s = Add (p, bias) y = Gelu (s)")
