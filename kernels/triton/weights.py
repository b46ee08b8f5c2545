"""Linear layers with weights in 4 bits and activations in float16 or bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute, constant, rank
from optkit.kernels.base import BYTES, DOMAIN, Argument, Problem, Program, format_of, pointer
from optkit.kernels.triton.drawing import DTYPES, draw
from optkit.kernels.triton.eight_bits import behind
from optkit.kernels.triton.tiles import Tile, Tiled
from optkit.rewrite import Match, Rule
from optkit.targets.gpu import GFX942, Capability

# Weights are what takes time where there are few rows, so that tiles are low at first; wgmma wants 64 rows. With many rows the
# weights of a low tile are read again and again.
_LOW = (
    Tile(m=16, n=128, warps=4, stages=3), Tile(m=64, n=128, warps=4, stages=3), Tile(m=128, n=128, warps=8, stages=2),
)  # fmt: skip
_TILES = {
    (8, 0): _LOW, (8, 6): _LOW, (8, 7): _LOW, (8, 9): _LOW, (12, 0): _LOW, (12, 1): _LOW,
    (9, 0): (
        Tile(m=64, n=128, warps=4, stages=3), Tile(m=64, n=64, warps=4, stages=4), Tile(m=128, n=128, warps=8, stages=3),
    ),
    (10, 0): (
        Tile(m=128, n=64, warps=8, stages=3), Tile(m=128, n=128, warps=8, stages=3), Tile(m=128, n=64, warps=4, stages=4),
    ),
    GFX942: (
        Tile(m=16, n=128, warps=4, stages=2), Tile(m=64, n=128, warps=4, stages=2), Tile(m=32, n=128, warps=4, stages=2),
    ),
}  # fmt: skip
_GROUP, _STEP, _BLOCKS = 8, 32, (32, 64, 128)
# Rows that are few. Then memory is kept busy by how many programs there are and what each has in flight: with many multiprocessors
# by few columns of a program, with few by more of them.
_FEW = 16
_MANY_UNITS = (
    Tile(m=_FEW, n=16, k=256, warps=4, stages=4), Tile(m=_FEW, n=16, k=512, warps=4, stages=3),
    Tile(m=_FEW, n=32, k=128, warps=4, stages=5),
)  # fmt: skip
_FEW_UNITS = (
    Tile(m=_FEW, n=16, k=256, warps=4, stages=4), Tile(m=_FEW, n=32, k=256, warps=4, stages=3),
    Tile(m=_FEW, n=64, k=128, warps=4, stages=4),
)  # fmt: skip
_FEW_TILES = {
    (8, 0): _MANY_UNITS, (9, 0): _MANY_UNITS, (10, 0): _MANY_UNITS, (12, 0): _MANY_UNITS,
    (8, 6): _FEW_UNITS, (8, 7): _FEW_UNITS, (8, 9): _FEW_UNITS, (12, 1): _FEW_UNITS,
    GFX942: (
        Tile(m=_FEW, n=16, k=256, warps=4, stages=4), Tile(m=_FEW, n=16, k=512, warps=4, stages=2),
        Tile(m=_FEW, n=32, k=128, warps=4, stages=2),
    ),
}  # fmt: skip


class _Product(Tiled):
    few: ClassVar[bool] = False
    # Whether each block has a zero point; without, it is the middle.
    zeros: ClassVar[bool] = False
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
        block = node.attributes["blocks"].as_ints()[1]
        return {"format": fmt, "columns": 2 * pairs, "depth": depth, "block": block}

    def tiles(self, problem: Problem, capability: Capability) -> Sequence[Tile]:
        return _TILES[capability]

    def tiled(self, problem: Problem, tile: Tile) -> Program:
        fmt, columns, depth = str(problem["format"]), int(problem["columns"]), int(problem["depth"])
        kinds = (
            ("x", fmt, "input:0"),
            ("w", "i8", "input:1"),
            ("scale", fmt, "input:2"),
            ("bias", fmt, "input:3"),
            *([("zero", "i8", "input:4")] if self.zeros else []),
            ("y", fmt, "output:0"),
        )
        return Program(
            function="optkit.kernels.triton.device.weights:linear",
            arguments=(
                *(Argument(name=a, type=f"*{kind}", binds=b, aligned=True) for a, kind, b in kinds),
                Argument(name="rows", type="i32", binds="rows"),
            ),
            constants={
                **({} if self.zeros else {"zero": None}),
                "COLUMNS": columns, "DEPTH": depth, "BLOCK": int(problem["block"]), "M": tile.m, "N": tile.n, "GROUP": _GROUP,
            },
            grid=(f"cdiv(rows, {tile.m}) * {-(-columns // tile.n)}", "1", "1"),
            warps=tile.warps, stages=tile.stages, products=fmt,
        )  # fmt: skip

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"rows": f"elements(0) // {problem['depth']}"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [(*shapes[0][:-1], int(problem["columns"]))]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        columns, depth, block = (int(problem[k]) for k in ("columns", "depth", "block"))
        blocks = (depth // block, columns)
        return [(rows, depth), (depth, columns // 2), blocks, (columns,), *([blocks] if self.zeros else [])]

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        fmt, random = str(problem["format"]), np.random.default_rng(seed)
        x, w, scale, bias, *zero = self.shapes(problem, rows)
        # Products of about 1.
        unit = 1 / (4.6 * int(problem["depth"]) ** 0.5)
        return [
            *draw([x], fmt, seed),
            random.integers(0, 256, w).astype(np.uint8),
            (random.uniform(0.5, 2, scale) * unit).astype(np.float32).astype(DTYPES[fmt]),
            *draw([bias], fmt, seed + 1),
            *(random.integers(0, 16, shape).astype(np.uint8) for shape in zero),
        ]

    def allowed(self, problem: Problem) -> float:
        # Sums are in float32 and rounded once.
        return {"fp16": 0.55, "bf16": 0.55}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        x, w, scale, bias, *zero = (a for a in inputs if a is not None)
        weights = self._unpacked(w, scale, zero[0] if zero else None, int(problem["block"]))
        return [x.astype(np.float64) @ weights + bias.astype(np.float64)]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        rows, depth = shapes[0]
        columns, size = int(problem["columns"]), BYTES[str(problem["format"])]
        blocks = depth // int(problem["block"])
        moved = (rows * (depth + columns) + columns + blocks * columns) * size + depth * columns / 2
        moved += blocks * columns if self.zeros else 0
        return 2.0 * rows * depth * columns, float(moved)

    def attributes(self, problem: Problem) -> dict[str, Any]:
        return self._forms(int(problem["block"]), int(problem["columns"]))

    def _forms(self, block: int, columns: int) -> dict[str, Any]:
        """Shapes that the body sees the weights in."""
        return {"blocks": [-1, block, columns], "matrix": [-1, columns]}

    def _packed(self, q: np.ndarray, *blocks: np.ndarray) -> list[np.ndarray]:
        """Numbers from 0 to 15 two a byte, and what each block has, in the order in which the program reads them."""
        return [q[:, ::2] | (q[:, 1::2] << 4), *blocks]

    def _unpacked(self, w: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, block: int) -> np.ndarray:
        """``[depth, columns]`` in float64."""
        return _halves(w, _spread(zero, block, 0)) * _spread(scale, block, 0)

    def rules(self) -> Sequence[Rule]:
        return [
            Rule(_pattern(biased, cast, middle), self._rewrite, self._check, name=self.name)
            for biased in (True, False)
            for cast in (True, False)
            for middle in ((True, False) if self.zeros else (False,))
        ]

    def _check(
        self,
        root: ir.Node,
        x: ir.Value,
        w: ir.Value,
        v: ir.Value,
        z: ir.Value | None = None,
        bias: ir.Value | None = None,
    ) -> Match:
        match = Match()
        if format_of(x) not in self.formats or (rank(x) or 0) < 2:
            return match.fail("not known to be rows in float16 or bfloat16", x)
        if self.few and not 0 < rows_of(x) <= _FEW:
            return match.fail(f"not known to be at most {_FEW} rows", x)
        array, scales = constant(w), constant(v)
        if w.dtype not in _LEAST or array is None or array.ndim != 2 or scales is None:
            return match.fail("not a constant matrix in 4 bits", w)
        if self.zeros == (w.dtype == ir.DataType.INT4 and z is None):
            return match.fail(f"{'no' if self.zeros else 'other'} zero points than the middle", w)
        if z is not None and constant(z) is None:
            return match.fail("zero points that are computed", z)
        node = next(u.node for u in w.uses())
        block = node.attributes.get_int("block_size", 0)
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
        self,
        op: Any,
        root: ir.Node,
        x: ir.Value,
        w: ir.Value,
        v: ir.Value,
        z: ir.Value | None = None,
        bias: ir.Value | None = None,
    ) -> Any:
        array, scales = constant(w), constant(v)
        assert array is not None and scales is not None and x.dtype is not None and w.dtype is not None
        kind, columns, least = x.dtype.numpy(), array.shape[1], _LEAST[w.dtype]
        zeros = np.zeros(scales.shape, np.int8) if z is None else constant(z)
        assert zeros is not None
        given = [array, scales, zeros] if self.zeros else [array, scales]
        packed, factors, *middles = self._packed(*(a if a is scales else _from_zero(a, least) for a in given))
        added = np.zeros(columns, kind) if bias is None else bias
        inputs = [x, np.ascontiguousarray(packed), np.ascontiguousarray(factors.astype(kind)), added]
        inputs += map(np.ascontiguousarray, middles)
        (y,) = op.node(self.op, inputs, self._forms(len(array) // len(scales), columns), domain=DOMAIN)
        y.type = x.type
        return y


class _Decode(_Product):
    few: ClassVar[bool] = True
    examples: ClassVar[tuple[Problem, ...]] = _Product.examples[1:]

    def problem(self, node: ir.Node) -> Problem | str:
        x, w = node.inputs[:2]
        fmt = format_of(x)
        if fmt is None or fmt not in self.formats:
            return f"no format of {self.name}"
        if w is None or w.shape is None or not w.shape.is_static():
            return "the matrix has no fixed shape"
        assert x is not None
        if not 0 < rows_of(x) <= _FEW:
            return f"not at most {_FEW} rows"
        columns, pairs = w.shape.numpy()
        block = node.attributes["blocks"].as_ints()[2]
        return {"format": fmt, "columns": columns, "depth": 2 * pairs, "block": block}

    def tiles(self, problem: Problem, capability: Capability) -> Sequence[Tile]:
        return _FEW_TILES[capability]

    def tiled(self, problem: Problem, tile: Tile) -> Program:
        fmt, columns, depth = str(problem["format"]), int(problem["columns"]), int(problem["depth"])
        kinds = (
            ("x", fmt), ("w", "int8"), ("scale", fmt), ("bias", fmt), *([("zero", "int8")] if self.zeros else []),
        )  # fmt: skip
        return Program(
            function="optkit.kernels.triton.device.weights:decode",
            arguments=(
                *(Argument(name=a, type=pointer(f), binds=f"input:{i}", aligned=True) for i, (a, f) in enumerate(kinds)),
                Argument(name="y", type=pointer(fmt), binds="output:0", aligned=True),
                Argument(name="rows", type="i32", binds="rows"),
            ),
            constants={
                **({} if self.zeros else {"zero": None}),
                "COLUMNS": columns, "DEPTH": depth, "BLOCK": int(problem["block"]), "M": tile.m, "N": tile.n, "K": tile.k,
            },
            grid=(f"{-(-columns // tile.n)}", "1", "1"),
            warps=tile.warps, stages=tile.stages, products=fmt, low=True,
        )  # fmt: skip

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        columns, depth, block = (int(problem[k]) for k in ("columns", "depth", "block"))
        blocks = (columns, depth // block)
        zero = [blocks] if self.zeros else []
        return [(min(rows, _FEW), depth), (columns, depth // 2), blocks, (columns,), *zero]

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        return (1, 2, _FEW - 1, _FEW)

    def allowed(self, problem: Problem) -> float:
        # Each weight is rounded, by half a step; the sum of 64 or more of them once more.
        return {"fp16": 1.0, "bf16": 1.0}[str(problem["format"])]

    def _forms(self, block: int, columns: int) -> dict[str, Any]:
        return {"blocks": [0, -1, block], "matrix": [0, -1]}

    def _packed(self, q: np.ndarray, *blocks: np.ndarray) -> list[np.ndarray]:
        return [q.T[:, ::2] | (q.T[:, 1::2] << 4), *(b.T for b in blocks)]

    def _unpacked(self, w: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, block: int) -> np.ndarray:
        return (_halves(w, _spread(zero, block, 1)) * _spread(scale, block, 1)).T


def _from_zero(q: np.ndarray, least: int) -> np.ndarray:
    """Numbers of 4 bits, from ``least`` on, as those from 0 to 15."""
    return (q.astype(np.int8) - least).astype(np.uint8)


def _spread(given: np.ndarray | None, block: int, axis: int) -> np.ndarray | float:
    """What each block has for each number; without, that is 8."""
    return 8.0 if given is None else np.repeat(given.astype(np.float64), block, axis)


def _halves(w: np.ndarray, zero: np.ndarray | float) -> np.ndarray:
    """The two numbers of each byte, neighbours along the last axis, around ``zero``."""
    return np.stack([w & 15, w >> 4], -1).reshape(len(w), -1).astype(np.float64) - zero


def rows_of(x: ir.Value) -> int:
    """Elements of all axes but the last, where they are fixed; else 0."""
    shape = shape_of(x)
    sizes = [d for d in shape[:-1] if isinstance(d, int)] if shape is not None else []
    return math.prod(sizes) if shape is not None and len(sizes) == len(shape) - 1 else 0


def _pattern(biased: bool, cast: bool, middle: bool) -> Callable[..., Any]:
    def build(op: Any, x: Any, w: Any, v: Any, z: Any = None, bias: Any = None) -> Any:
        m = op.DequantizeLinear(w, v, z) if middle else op.DequantizeLinear(w, v)
        y = op.MatMul(x, op.Cast(m) if cast else m)
        return op.Add(y, bias) if biased else y

    if biased and middle:
        return build
    if biased:
        return lambda op, x, w, v, bias: build(op, x, w, v, bias=bias)
    return (
        (lambda op, x, w, v, z: build(op, x, w, v, z)) if middle else lambda op, x, w, v: build(op, x, w, v)
    )


# The least number of each type.
_LEAST = {ir.DataType.INT4: -8, ir.DataType.UINT4: 0}
# The operator and what else it takes, the middle of each block, the axis that scales are spread along, and how the weights become
# ``[inputs, outputs]``.
_BODY = (
    '<domain: "optkit", opset_import: ["" : %%d]> %s <blocks, matrix> (x, w, scale, bias%s) => (y) { '
    "fifteen = Constant <value = uint8 {15}> () four = Constant <value = uint8 {4}> () "
    "last = Constant <value = int64[1] {-1}> () one = Constant <value = int64[1] {1}> () "
    'lo = BitwiseAnd (w, fifteen) hi = BitShift <direction = "RIGHT"> (w, four) '
    "a = Unsqueeze (lo, last) b = Unsqueeze (hi, last) c = Concat <axis = -1> (a, b) "
    "f = Cast <to = 1> (c) bs = Constant <value_ints: ints = @blocks> () r = Reshape (f, bs) %s q = Sub (r, middle) "
    "sf = Cast <to = 1> (scale) su = Unsqueeze (sf, %s) m = Mul (q, su) ms = Constant <value_ints: ints = @matrix> () "
    "g = Reshape (m, ms) h = CastLike (g, x) %s p = MatMul (x, %s) y = Add (p, bias) }"
)
_EIGHT = "middle = Constant <value = float {8.0}> ()"
_ZERO = "zf = Cast <to = 1> (zero) middle = Unsqueeze (zf, %s)"
_DOWN = ("one", "", "h")
_ALONG = ("last", "o = Transpose <perm = [1, 0]> (h)", "o")


class LinearInt4(_Product):
    """``y = x @ (q * scale) + bias`` of weights ``q`` in 4 bits, a scale for each block of inputs and each output.

    Frantar et al., "MARLIN", 2024, arXiv:2408.11743, section 3, for why: with few rows the weights are what is read, and 4
    bits of them are a quarter. Weights become floats in registers; the sum of each block is scaled in float32.
    """

    name, op = "linear-int4", "LinearInt4"
    size: ClassVar[int] = 6
    source: ClassVar[str] = "arXiv:2408.11743"
    examples: ClassVar[tuple[Problem, ...]] = _Product.examples[:1]
    body: ClassVar[str] = _BODY % (op, "", _EIGHT, *_DOWN)


class LinearInt4Decode(_Decode):
    """``linear-int4`` of at most 16 rows: the weights of an output lie together, ``[outputs, inputs / 2]``.

    Frantar et al., "MARLIN", 2024, arXiv:2408.11743, section 3: reading the weights once is all that takes time. They are scaled
    and rounded to the format of the activations on their way to the matrix unit, as there.
    """

    name, op = "linear-int4-decode", "LinearInt4Decode"
    size: ClassVar[int] = 7
    source: ClassVar[str] = "arXiv:2408.11743"
    body: ClassVar[str] = _BODY % (op, "", _EIGHT, *_ALONG)


class LinearUint4(_Product):
    """``y = x @ ((q - zero) * scale) + bias``: ``linear-int4`` of weights that have a zero point for each block too.

    Lin et al., "AWQ", 2024, arXiv:2306.00978, whose weights are such; the difference, from -15 to 15, is exact in both formats.
    """

    name, op = "linear-uint4", "LinearUint4"
    size: ClassVar[int] = 6
    zeros: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv:2408.11743, arXiv:2306.00978"
    examples: ClassVar[tuple[Problem, ...]] = _Product.examples[:1]
    body: ClassVar[str] = _BODY % (op, ", zero", _ZERO % "one", *_DOWN)


class LinearUint4Decode(_Decode):
    """``linear-uint4`` of at most 16 rows, in the order of ``linear-int4-decode``."""

    name, op = "linear-uint4-decode", "LinearUint4Decode"
    size: ClassVar[int] = 7
    zeros: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv:2408.11743, arXiv:2306.00978"
    body: ClassVar[str] = _BODY % (op, ", zero", _ZERO % "last", *_ALONG)
