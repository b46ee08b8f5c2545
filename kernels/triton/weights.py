"""Linear layers with weights in 4 bits and activations in float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, rank
from optkit.kernels.base import BYTES, DOMAIN, Argument, Kernel, Problem, Program, format_of
from optkit.kernels.triton.drawing import DTYPES, draw
from optkit.kernels.triton.integers import behind
from optkit.rewrite import Match, Rule

# Rows and columns of a tile, warps and stages, by architecture. Weights are what takes time where there are few rows, so
# that tiles are low; wgmma wants 64 rows.
_LOW = (16, 128, 4, 3)
_TILES = {
    (8, 0): _LOW, (8, 6): _LOW, (8, 7): _LOW, (8, 9): _LOW, (12, 0): _LOW, (12, 1): _LOW, (9, 0): (64, 128, 4, 3), (10, 0): (128, 64, 8, 3),
}  # fmt: skip
_GROUP, _STEP, _BLOCKS = 8, 32, (32, 64, 128)


class _Product(Kernel):
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16")
    examples: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp16", "columns": 1536, "depth": 384, "block": 32},
        {"format": "bf16", "columns": 4096, "depth": 4096, "block": 128},
    )
    small: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp16", "columns": 96, "depth": 64, "block": 32},
        {"format": "bf16", "columns": 160, "depth": 128, "block": 64},
    )

    def problem(self, node: ir.Node) -> Problem | str:
        fmt, w = format_of(node.inputs[0]), node.inputs[1]
        if fmt is None or fmt not in self.formats:
            return f"no format of {self.name}"
        if w is None or w.shape is None or not w.shape.is_static():
            return "the matrix has no fixed shape"
        depth, pairs = w.shape.numpy()
        block = list(attribute(node, "blocks"))[1]  # type: ignore[call-overload]
        return {"format": fmt, "columns": 2 * pairs, "depth": depth, "block": block}

    def program(self, problem: Problem, capability: tuple[int, int]) -> Program:
        fmt, columns, depth = str(problem["format"]), int(problem["columns"]), int(problem["depth"])
        m, n, warps, stages = _TILES[capability]
        kinds = (
            ("x", fmt, "input:0"),
            ("w", "i8", "input:1"),
            ("scale", fmt, "input:2"),
            ("bias", fmt, "input:3"),
            ("y", fmt, "output:0"),
        )
        return Program(
            function="optkit.kernels.triton.device.weights:linear",
            arguments=(
                *(Argument(name=a, type=f"*{kind}", binds=b, aligned=True) for a, kind, b in kinds),
                Argument(name="rows", type="i32", binds="rows"),
            ),
            constants={"COLUMNS": columns, "DEPTH": depth, "BLOCK": int(problem["block"]), "M": m, "N": n, "GROUP": _GROUP},
            grid=(f"cdiv(rows, {m}) * {-(-columns // n)}", "1", "1"),
            warps=warps, stages=stages, products=fmt,
        )  # fmt: skip

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"rows": f"elements(0) // {problem['depth']}"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [(*shapes[0][:-1], int(problem["columns"]))]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        columns, depth, block = (int(problem[k]) for k in ("columns", "depth", "block"))
        return [(rows, depth), (depth, columns // 2), (depth // block, columns), (columns,)]

    def edges(self, problem: Problem, capability: tuple[int, int]) -> tuple[int, ...]:
        m = _TILES[capability][0]
        return (1, m - 1, m, m + 1)

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        fmt, random = str(problem["format"]), np.random.default_rng(seed)
        x, w, scale, bias = self.shapes(problem, rows)
        # Products of about 1.
        unit = 1 / (4.6 * int(problem["depth"]) ** 0.5)
        return [
            *draw([x], fmt, seed),
            random.integers(0, 256, w).astype(np.uint8),
            (random.uniform(0.5, 2, scale) * unit).astype(np.float32).astype(DTYPES[fmt]),
            *draw([bias], fmt, seed + 1),
        ]

    def allowed(self, problem: Problem) -> float:
        # Sums are in float32 and rounded once; the interpreter cuts bfloat16.
        return {"fp16": 0.55, "bf16": 1.05}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        x, w, scale, bias = (a for a in inputs if a is not None)
        both = w.astype(np.uint8)
        q = np.stack([both & 15, both >> 4], -1).reshape(len(both), -1).astype(np.float64) - 8
        weights = q * np.repeat(scale.astype(np.float64), int(problem["block"]), 0)
        return [x.astype(np.float64) @ weights + bias.astype(np.float64)]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        rows, depth = shapes[0]
        columns, size = int(problem["columns"]), BYTES[str(problem["format"])]
        moved = (rows * (depth + columns) + columns + shapes[2][0] * columns) * size + depth * columns / 2
        return 2.0 * rows * depth * columns, float(moved)

    def attributes(self, problem: Problem) -> dict[str, Any]:
        columns = int(problem["columns"])
        return {"blocks": [-1, int(problem["block"]), columns], "matrix": [-1, columns]}

    def rules(self) -> Sequence[Rule]:
        return [
            Rule(_pattern(biased, cast), self._rewrite, self._check, name=self.name)
            for biased in (True, False)
            for cast in (True, False)
        ]

    def _check(
        self, root: ir.Node, x: ir.Value, w: ir.Value, v: ir.Value, bias: ir.Value | None = None
    ) -> Match:
        match = Match()
        if format_of(x) not in self.formats or (rank(x) or 0) < 2:
            return match.fail("not known to be rows in float16 or bfloat16", x)
        array, scales = constant(w), constant(v)
        if w.dtype != ir.DataType.INT4 or array is None or array.ndim != 2 or scales is None:
            return match.fail("not a constant matrix in 4 bits", w)
        node = next(u.node for u in w.uses())
        block = int(attribute(node, "block_size", 0))  # type: ignore[call-overload]
        if attribute(node, "axis", 1) != 0 or block not in _BLOCKS or len(array) % block:
            return match.fail(f"no blocks of {', '.join(map(str, _BLOCKS))} along the inputs", w)
        if array.shape[1] % _STEP:
            return match.fail(f"{array.shape[1]} columns are no multiple of {_STEP}", w)
        if bias is None and behind(root.outputs[0], array.shape[1]):
            return match.fail("a bias is added behind it, which the kernel does too", root)
        if bias is not None and (bias.dtype != x.dtype or list(bias.shape or ()) != [array.shape[1]]):
            return match.fail(f"not a vector of {array.shape[1]}", bias)
        return match

    def _rewrite(
        self, op: Any, root: ir.Node, x: ir.Value, w: ir.Value, v: ir.Value, bias: ir.Value | None = None
    ) -> Any:
        array, scales = constant(w), constant(v)
        assert array is not None and scales is not None and x.dtype is not None
        halves = (array.astype(np.int8) + 8).astype(np.uint8)
        packed = halves[:, ::2] | (halves[:, 1::2] << 4)
        kind, columns = x.dtype.numpy(), array.shape[1]
        added = np.zeros(columns, kind) if bias is None else bias
        shapes = {"blocks": [-1, len(array) // len(scales), columns], "matrix": [-1, columns]}
        (y,) = op.node(self.op, [x, packed, scales.astype(kind), added], shapes, domain=DOMAIN)
        y.type = x.type
        return y


def _pattern(biased: bool, cast: bool) -> Callable[..., Any]:
    def build(op: Any, x: Any, w: Any, v: Any, bias: Any) -> Any:
        m = op.DequantizeLinear(w, v)
        y = op.MatMul(x, op.Cast(m) if cast else m)
        return op.Add(y, bias) if biased else y

    return build if biased else lambda op, x, w, v: build(op, x, w, v, None)


class LinearInt4(_Product):
    """``y = x @ (q * scale) + bias`` of weights ``q`` in 4 bits, a scale for each block of inputs and each output.

    Frantar et al., "MARLIN", 2024, arXiv:2408.11743, section 3, for why: with few rows the weights are what is read, and 4
    bits of them are a quarter. Weights become floats in registers; the sum of each block is scaled in float32.
    """

    name, op = "linear-int4", "LinearInt4"
    size: ClassVar[int] = 6
    source: ClassVar[str] = "arXiv:2408.11743"
    body: ClassVar[str] = (
        f'<domain: "optkit", opset_import: ["" : %d]> {op} <blocks, matrix> (x, w, scale, bias) => (y) {{ '
        "fifteen = Constant <value = uint8 {15}> () four = Constant <value = uint8 {4}> () eight = Constant <value = float {8.0}> () "
        "last = Constant <value = int64[1] {-1}> () one = Constant <value = int64[1] {1}> () "
        'lo = BitwiseAnd (w, fifteen) hi = BitShift <direction = "RIGHT"> (w, four) '
        "a = Unsqueeze (lo, last) b = Unsqueeze (hi, last) c = Concat <axis = -1> (a, b) "
        "f = Cast <to = 1> (c) q = Sub (f, eight) bs = Constant <value_ints: ints = @blocks> () r = Reshape (q, bs) "
        "sf = Cast <to = 1> (scale) su = Unsqueeze (sf, one) m = Mul (r, su) ms = Constant <value_ints: ints = @matrix> () "
        "g = Reshape (m, ms) h = CastLike (g, x) p = MatMul (x, h) y = Add (p, bias) }"
    )
