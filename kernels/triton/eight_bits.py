"""Linear layers on activations and weights of 8 bits, integers or floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, scalar
from optkit.kernels.base import BYTES, DOMAIN, Argument, Problem, Program, format_of, pointer
from optkit.kernels.triton.drawing import DTYPES
from optkit.kernels.triton.quantize import grid_miss, step_miss
from optkit.kernels.triton.tiles import Tile, Tiled
from optkit.rewrite import Match, Rule
from optkit.targets.gpu import GFX942, Capability

# Of large, of middling and of few rows: a depth of 128 bytes fills a line of the cache.
_LARGE = Tile(m=128, n=128, k=128, warps=8, stages=3)
_DEEP = Tile(m=128, n=128, k=128, warps=8, stages=4)
_LITTLE = Tile(m=64, n=64, k=128, warps=4, stages=4)
_ROOMY = (_LARGE, Tile(m=128, n=64, k=128, warps=4, stages=4), _LITTLE)
_TIGHT = (
    Tile(m=128, n=128, k=64, warps=8, stages=3), Tile(m=128, n=64, k=128, warps=4, stages=3), _LITTLE,
)  # fmt: skip
_HOPPER_LITTLE = Tile(m=64, n=128, k=128, warps=4, stages=4)
_TILES = {
    (8, 0): _ROOMY, (8, 7): _ROOMY, (8, 6): _TIGHT, (8, 9): _TIGHT, (12, 0): _TIGHT, (12, 1): _TIGHT,
    (9, 0): (_LARGE, _DEEP, _HOPPER_LITTLE), (10, 0): (_LARGE, _DEEP, Tile(m=128, n=64, k=128, warps=4, stages=4)),
    GFX942: (
        Tile(m=128, n=128, k=128, warps=8, stages=2), Tile(m=128, n=64, k=128, warps=4, stages=2),
        Tile(m=64, n=64, k=128, warps=4, stages=2),
    ),
}  # fmt: skip
# The wide tile of Triton's tutorial 03 for 8 bits; floats, whose sums are added up twice, would go over to the stack.
_INTEGER_TILES = {
    **_TILES, (9, 0): (_LARGE, Tile(m=128, n=256, k=128, warps=8, stages=3), _HOPPER_LITTLE),
}  # fmt: skip
_GROUP, _STEP = 8, 16


class _Product(Tiled):
    outs: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")

    @property
    def fmt(self) -> str:
        return self.formats[0]

    def problem(self, node: ir.Node) -> Problem | str:
        w, bias = node.inputs[1], node.inputs[-1]
        out = format_of(bias)
        if out not in self.outs or any(format_of(v) != self.fmt for v in (node.inputs[0], w)):
            return f"no formats of {self.name}"
        if w is None or w.shape is None or not w.shape.is_static():
            return "the matrix has no fixed shape"
        columns, depth = w.shape.numpy()
        if depth % _STEP or columns % _STEP:
            return f"{columns} x {depth} are no multiples of {_STEP}"
        return {"format": self.fmt, "columns": columns, "depth": depth, "output": out}

    def tiles(self, problem: Problem, capability: Capability) -> Sequence[Tile]:
        return (_INTEGER_TILES if self.fmt == "int8" else _TILES)[capability]

    def tiled(self, problem: Problem, tile: Tile) -> Program:
        columns, depth, out = int(problem["columns"]), int(problem["depth"]), str(problem["output"])
        integers = self.fmt == "int8"
        kinds = [
            ("x", self.fmt),
            ("w", self.fmt),
            ("scale", "fp32"),
            *[("shift", "i32")] * integers,
            ("bias", out),
        ]
        return Program(
            function="optkit.kernels.triton.device.eight_bits:linear",
            arguments=(
                *(Argument(name=a, type=pointer(f), binds=f"input:{i}", aligned=True) for i, (a, f) in enumerate(kinds)),
                Argument(name="y", type=pointer(out), binds="output:0", aligned=True),
                Argument(name="rows", type="i32", binds="rows"),
            ),
            constants={
                **({} if integers else {"shift": None}),
                "COLUMNS": columns, "DEPTH": depth, "M": tile.m, "N": tile.n, "K": tile.k, "GROUP": _GROUP,
            },
            grid=(f"cdiv(rows, {tile.m}) * {-(-columns // tile.n)}", "1", "1"),
            warps=tile.warps, stages=tile.stages, products=self.fmt,
        )  # fmt: skip

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"rows": f"elements(0) // {problem['depth']}"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [(*shapes[0][:-1], int(problem["columns"]))]

    def output_format(self, problem: Problem, output: int = 0) -> str:
        return str(problem["output"])

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        columns, depth = int(problem["columns"]), int(problem["depth"])
        return [(rows, depth), (columns, depth), *[(columns,)] * (3 if self.fmt == "int8" else 2)]

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        random = np.random.default_rng(seed)
        x, w, scale, *shift, bias = self.shapes(problem, rows)
        # Products of full range, scaled to about 1.
        size = 73.0**2 * int(problem["depth"]) ** 0.5
        return [
            *(random.integers(-127, 128, shape).astype(DTYPES[self.fmt]) for shape in (x, w)),
            (random.uniform(0.5, 2, scale) / size).astype(np.float32),
            *(random.integers(-int(size), int(size), shape, np.int32) for shape in shift),
            random.standard_normal(bias).astype(np.float32).astype(DTYPES[str(problem["output"])]),
        ]

    def allowed(self, problem: Problem) -> float:
        # The sum is exact below 2^24: of integers, and of e4m3's whole numbers too; a product and a sum are rounded, and the
        # result once more.
        return {"fp16": 0.55, "bf16": 0.55, "fp32": 2.5}[str(problem["output"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        x, w, scale, *shift, bias = (a.astype(np.float64) for a in inputs if a is not None)
        return [(x @ w.T + sum(shift)) * scale + bias]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        rows, depth = shapes[0]
        columns, out = shapes[1][0], BYTES[str(problem["output"])]
        moved = rows * depth + depth * columns + (rows + 1) * columns * out + 4 * columns
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
        o: ir.Value | None = None,
        bias: ir.Value | None = None,
    ) -> Match:
        match, y = Match(), root.outputs[0]
        given = _given(x)
        if given is None:
            return match.fail("no activations in 8 bits", x)
        q, s, z = given
        if format_of(q) != self.fmt or format_of(w) != self.fmt:
            return match.fail(f"not known to be {self.fmt}", q)
        if why := step_miss(s, self.fmt) if z is None else grid_miss(s, z, self.fmt):
            return match.fail(why, q)
        if o is not None and ((zeros := constant(o)) is None or zeros.any()):
            return match.fail("weights with a zero point", w)
        array, scales = constant(w), constant(v)
        if array is None or array.ndim != 2 or scales is None or scales.size not in (1, array.shape[1]):
            return match.fail("not a constant matrix with a scale for each output", w)
        node = next(u.node for u in w.uses())
        if scales.size > 1 and attribute(node, "axis", 1) not in (1, -1):
            return match.fail("scales along the inputs", w)
        depth, columns = array.shape
        if depth % _STEP or columns % _STEP:
            return match.fail(f"{depth} x {columns} are no multiples of {_STEP}", w)
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
        o: ir.Value | None = None,
        bias: ir.Value | None = None,
    ) -> Any:
        given = _given(x)
        assert given is not None
        q, s, z = given
        array, scales, zero = constant(w), constant(v), np.zeros(1) if z is None else constant(z)
        assert array is not None and scales is not None and zero is not None
        assert root.outputs[0].dtype is not None
        scale = np.broadcast_to(scales.reshape(-1) * np.float32(scalar(s)), array.shape[1]).astype(np.float32)
        added = np.zeros(array.shape[1], root.outputs[0].dtype.numpy()) if bias is None else bias
        more = []
        if self.fmt == "int8":
            # What the zero point adds to each sum is the same for all rows.
            more.append((-int(zero.item()) * array.astype(np.int64).sum(0)).astype(np.int32))
        operands = [q, np.ascontiguousarray(array.T), scale, *more, added]
        (y,) = op.node(self.op, operands, domain=DOMAIN)
        y.type = root.outputs[0].type
        return y


def behind(value: ir.Value, columns: int) -> bool:
    """Whether a constant for each column is added to ``value``."""
    return any(
        constant(v) is not None and list(v.shape or ()) == [columns]
        for use in value.uses()
        if use.node.op_type == "Add"
        for v in use.node.inputs
        if v is not None
    )


def _given(x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value | None] | None:
    """Integers, scale and, if there is one, zero point that ``x`` stands for; other products, such as those for keys and values, may read it too."""
    node = x.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    q, s, z = (*node.inputs, None)[:3]
    return None if q is None or s is None else (q, s, z)


def _pattern(biased: bool, cast: bool) -> Callable[..., Any]:
    def build(op: Any, x: Any, w: Any, v: Any, o: Any, bias: Any) -> Any:
        m = op.DequantizeLinear(w, v, o)
        y = op.MatMul(x, op.Cast(m)) if cast else op.MatMul(x, m)
        return op.Add(y, bias) if biased else y

    if biased:
        return build
    return lambda op, x, w, v, o: build(op, x, w, v, o, None)


_EXAMPLE: dict[str, int | str | bool] = {"columns": 4096, "depth": 4096, "output": "bf16"}
_SMALL: tuple[dict[str, int | str | bool], ...] = (
    {"columns": 80, "depth": 48, "output": "fp32"},
    {"columns": 272, "depth": 144, "output": "fp16"},
)
_SCALED = "s = Mul (f, scale) b = Cast <to = 1> (bias) a = Add (s, b) y = CastLike (a, bias) }"


class LinearInt8(_Product):
    """``y = (x @ w^T + shift) * scale + bias`` of int8 rows and int8 weights ``[outputs, inputs]``, a scale for each output.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
    arXiv:1712.05877, section 2.3, with weights around 0: sums of products in 32 bits are exact, and scaled once, in float32.
    ``scale`` is that of the activations times that of the weights, and ``shift`` what the zero point ``z`` of the activations
    takes from each sum, ``-z * sum(w)``: int32, known before.
    """

    name, op = "linear-int8", "LinearInt8"
    size: ClassVar[int] = 6
    formats: ClassVar[tuple[str, ...]] = ("int8",)
    source: ClassVar[str] = "arXiv:1712.05877"
    examples: ClassVar[tuple[Problem, ...]] = ({"format": "int8", **_EXAMPLE},)
    small: ClassVar[tuple[Problem, ...]] = tuple({"format": "int8", **e} for e in _SMALL)
    body: ClassVar[str] = (
        f'<domain: "optkit", opset_import: ["" : %d]> {op} (x, w, scale, shift, bias) => (y) {{ '
        # ONNX Runtime multiplies signed integers four times as slowly on a processor, and mixed ones wrongly on old ones.
        f"o = Constant <value = int32 {{128}}> () z = Constant <value = uint8 {{128}}> () xi = Cast <to = 6> (x) xo = Add (xi, o) "
        f"xu = Cast <to = 2> (xo) t = Transpose <perm = [1, 0]> (w) wi = Cast <to = 6> (t) wo = Add (wi, o) wu = Cast <to = 2> (wo) "
        f"p = MatMulInteger (xu, wu, z, z) m = Add (p, shift) f = Cast <to = 1> (m) {_SCALED}"
    )


class LinearFp8(_Product):
    """``y = (x @ w^T) * scale + bias`` of rows and weights ``[outputs, inputs]`` in e4m3, a scale for each output; from sm_89 on.

    Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433. Sums of at most 128 products leave the matrix
    unit for float32, as in DeepSeek-V3, arXiv:2412.19437, section 3.3.2. ``scale`` as in ``linear-int8``.
    """

    name, op = "linear-fp8", "LinearFp8"
    size: ClassVar[int] = 6
    formats: ClassVar[tuple[str, ...]] = ("fp8",)
    source: ClassVar[str] = "arXiv:2209.05433, arXiv:2412.19437"
    examples: ClassVar[tuple[Problem, ...]] = ({"format": "fp8", **_EXAMPLE},)
    small: ClassVar[tuple[Problem, ...]] = tuple({"format": "fp8", **e} for e in _SMALL)
    body: ClassVar[str] = (
        f'<domain: "optkit", opset_import: ["" : %d]> {op} (x, w, scale, bias) => (y) {{ '
        f"xf = Cast <to = 1> (x) wf = Cast <to = 1> (w) t = Transpose <perm = [1, 0]> (wf) f = MatMul (xf, t) {_SCALED}"
    )
