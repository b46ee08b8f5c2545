"""Linear layers on floats of 8 bits with a scale for each block of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute, constant
from optkit.kernels.base import BYTES, DOMAIN, Argument, Problem, Program, format_of, pointer
from optkit.kernels.triton.drawing import DTYPES
from optkit.kernels.triton.eight_bits import behind
from optkit.kernels.triton.tiles import Tile, Tiled
from optkit.rewrite import Match, Rule
from optkit.targets.gpu import Capability

# Of many, of middling and of few rows.
_TIGHT = (
    Tile(m=128, n=64, warps=8, stages=3), Tile(m=64, n=128, warps=8, stages=3), Tile(m=64, n=64, warps=4, stages=3),
)  # fmt: skip
_TILES = {
    (8, 9): _TIGHT, (12, 0): _TIGHT, (12, 1): _TIGHT,
    (9, 0): (
        Tile(m=128, n=128, warps=8, stages=3), Tile(m=128, n=64, warps=4, stages=4), Tile(m=64, n=128, warps=4, stages=4),
    ),
    (10, 0): (
        Tile(m=128, n=128, warps=8, stages=3), Tile(m=128, n=128, warps=8, stages=4), Tile(m=128, n=64, warps=4, stages=4),
    ),
}  # fmt: skip
_GROUP, _STEP, _BLOCK = 8, 16, 128


class _Product(Tiled):
    formats: ClassVar[tuple[str, ...]] = ("fp8",)
    outs: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")

    def problem(self, node: ir.Node) -> Problem | str:
        x, w, x_scale, _, bias = node.inputs
        out = format_of(bias)
        if out not in self.outs or any(format_of(v) != "fp8" for v in (x, w)) or format_of(x_scale) != "fp32":
            return f"no formats of {self.name}"
        if w is None or w.shape is None or not w.shape.is_static():
            return "the matrix has no fixed shape"
        columns, depth = w.shape.numpy()
        if depth % _BLOCK or columns % _STEP:
            return f"{columns} x {depth} are no multiples of {_STEP} and {_BLOCK}"
        return {"format": "fp8", "columns": columns, "depth": depth, "output": out}

    def tiles(self, problem: Problem, capability: Capability) -> Sequence[Tile]:
        return _TILES[capability]

    def tiled(self, problem: Problem, tile: Tile) -> Program:
        columns, depth, out = int(problem["columns"]), int(problem["depth"]), str(problem["output"])
        kinds = (("x", "fp8"), ("w", "fp8"), ("x_scale", "fp32"), ("w_scale", "fp32"), ("bias", out))
        return Program(
            function="optkit.kernels.triton.device.eight_bits:linear_blocks",
            arguments=(
                *(Argument(name=a, type=pointer(f), binds=f"input:{i}", aligned=True) for i, (a, f) in enumerate(kinds)),
                Argument(name="y", type=pointer(out), binds="output:0", aligned=True),
                Argument(name="rows", type="i32", binds="rows"),
            ),
            constants={"COLUMNS": columns, "DEPTH": depth, "M": tile.m, "N": tile.n, "K": _BLOCK, "GROUP": _GROUP},
            grid=(f"cdiv(rows, {tile.m}) * {-(-columns // tile.n)}", "1", "1"),
            warps=tile.warps, stages=tile.stages, products="fp8",
        )  # fmt: skip

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"rows": f"elements(0) // {problem['depth']}"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [(*shapes[0][:-1], int(problem["columns"]))]

    def output_format(self, problem: Problem, output: int = 0) -> str:
        return str(problem["output"])

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        columns, depth = int(problem["columns"]), int(problem["depth"])
        blocks = depth // _BLOCK
        return [(rows, depth), (columns, depth), (rows, blocks), (blocks, columns), (columns,)]

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        random = np.random.default_rng(seed)
        x, w, x_scale, w_scale, bias = self.shapes(problem, rows)
        # Products of about 1.
        unit = int(problem["depth"]) ** -0.25
        return [
            *(random.standard_normal(shape).astype(DTYPES["fp8"]) for shape in (x, w)),
            *((random.uniform(0.5, 2, shape) * unit).astype(np.float32) for shape in (x_scale, w_scale)),
            random.standard_normal(bias).astype(DTYPES[str(problem["output"])]),
        ]

    def allowed(self, problem: Problem) -> float:
        # Sums in float32, and the result rounded once.
        return {"fp16": 0.55, "bf16": 0.55, "fp32": 4.0}[str(problem["output"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        x, w, x_scale, w_scale, bias = (a.astype(np.float64) for a in inputs if a is not None)
        return [(x * np.repeat(x_scale, _BLOCK, -1)) @ (w * np.repeat(w_scale.T, _BLOCK, -1)).T + bias]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        (rows, depth), (columns, _), _, (blocks, _), _ = shapes
        out = BYTES[str(problem["output"])]
        moved = (rows + columns) * (depth + 4 * blocks) + (rows + 1) * columns * out
        return 2.0 * rows * depth * columns, float(moved)

    def rules(self) -> Sequence[Rule]:
        return [
            Rule(_pattern(biased, cast), self._rewrite, self._check, name=self.name)
            for biased in (True, False)
            for cast in (True, False)
        ]

    def _check(
        self,
        root: ir.Node,
        x: ir.Value,
        w: ir.Value,
        v: ir.Value,
        bias: ir.Value | None = None,
    ) -> Match:
        match, y, given = Match(), root.outputs[0], _given(x)
        if given is None:
            return match.fail("no activations in 8 bits", x)
        pair, q, s = given
        if format_of(q) != "fp8" or format_of(w) != "fp8":
            return match.fail("not known to be e4m3", q)
        if format_of(s) != "fp32" or format_of(v) != "fp32":
            return match.fail("scales are not float32", s)
        array, scales, shape = constant(w), constant(v), shape_of(q)
        if array is None or array.ndim != 2 or scales is None or shape is None:
            return match.fail("not rows and a constant matrix", w)
        last = (-1, len(shape) - 1)
        own = next(u.node for u in w.uses() if u.node.op_type == "DequantizeLinear")
        for value, node, axes in ((q, pair, last), (w, own, (0, -2))):
            if attribute(node, "block_size", 0) != _BLOCK or attribute(node, "axis", 1) not in axes:
                return match.fail(f"no blocks of {_BLOCK} along the inputs", value)
        depth, columns = array.shape
        if depth % _BLOCK or columns % _STEP:
            return match.fail(f"{depth} x {columns} are no multiples of {_BLOCK} and {_STEP}", w)
        if format_of(y) not in self.outs:
            return match.fail("the output is not known to be a float", y)
        if bias is None and behind(y, columns):
            return match.fail("a bias is added behind it, which the kernel does too", y)
        if bias is not None and (bias.dtype != y.dtype or list(bias.shape or ()) != [columns]):
            return match.fail(f"not a vector of {columns}", bias)
        return match

    def _rewrite(
        self,
        op: Any,
        root: ir.Node,
        x: ir.Value,
        w: ir.Value,
        v: ir.Value,
        bias: ir.Value | None = None,
    ) -> Any:
        array, scales, y, given = constant(w), constant(v), root.outputs[0], _given(x)
        assert given is not None
        _, q, s = given
        assert array is not None
        assert scales is not None
        assert y.dtype is not None
        added = np.zeros(array.shape[1], y.dtype.numpy()) if bias is None else bias
        (new,) = op.node(self.op, [q, np.ascontiguousarray(array.T), s, scales, added], domain=DOMAIN)
        new.type = y.type
        return new


def _given(x: ir.Value) -> tuple[ir.Node, ir.Value, ir.Value] | None:
    """What dequantizes ``x``, its numbers and scales; other products may read it too."""
    node = x.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) != 2 or None in node.inputs:
        return None
    q, s = node.inputs
    return node, q, s  # type: ignore[return-value]


def _pattern(biased: bool, cast: bool) -> Callable[..., Any]:
    def build(op: Any, x: Any, w: Any, v: Any, bias: Any) -> Any:
        m = op.DequantizeLinear(w, v)
        y = op.MatMul(x, op.Cast(m)) if cast else op.MatMul(x, m)
        return op.Add(y, bias) if biased else y

    return build if biased else lambda op, x, w, v: build(op, x, w, v, None)


class LinearFp8Blocks(_Product):
    """``y = x @ w^T + bias`` in e4m3 with a scale for each 128 numbers of a row, of ``x`` and of ``w``; from sm_89 on.

    DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, arXiv:2412.19437, section 3.3.1 and 3.3.2: the sum of each block leaves the
    matrix unit, and is scaled and added in float32. Weights ``[outputs, inputs]`` have scales ``[inputs / 128, outputs]``, those
    of 128 outputs may be the same.
    """

    name, op = "linear-fp8-blocks", "LinearFp8Blocks"
    size: ClassVar[int] = 7
    source: ClassVar[str] = "arXiv:2412.19437"
    examples: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp8", "columns": 4096, "depth": 4096, "output": "bf16"},
    )
    small: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp8", "columns": 80, "depth": 256, "output": "fp32"},
        {"format": "fp8", "columns": 144, "depth": 128, "output": "bf16"},
    )
    body: ClassVar[str] = (
        f'<domain: "optkit", opset_import: ["" : %d]> {op} (x, w, x_scale, w_scale, bias) => (y) {{ '
        f"xf = DequantizeLinear <axis = -1, block_size = {_BLOCK}> (x, x_scale) wt = Transpose <perm = [1, 0]> (w) "
        f"wf = DequantizeLinear <axis = 0, block_size = {_BLOCK}> (wt, w_scale) p = MatMul (xf, wf) b = Cast <to = 1> (bias) "
        "a = Add (p, b) y = CastLike (a, bias) }"
    )
