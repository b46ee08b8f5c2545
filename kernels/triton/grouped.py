"""Products of groups of rows, each with a matrix of its own: the experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.kernels.base import (
    BYTES,
    DOMAIN,
    Argument,
    Problem,
    Program,
    format_of,
    pointer,
    power_of_two,
)
from optkit.kernels.triton.drawing import draw
from optkit.kernels.triton.tiles import Tile, Tiled
from optkit.rewrite import Rule
from optkit.targets.gpu import Capability

# Low, as each expert has few rows, but high enough for wgmma; high for where they have many.
_TILES = (
    Tile(m=64, n=128, k=64, warps=4, stages=3), Tile(m=64, n=64, k=64, warps=4, stages=4), Tile(m=128, n=128, k=64, warps=8, stages=3),
)  # fmt: skip
_STEP, _MOST = 16, 512


class _Grouped(Tiled):
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16")

    def problem(self, node: ir.Node) -> Problem | str:
        x, w, order, ends = node.inputs
        fmt = format_of(x)
        if fmt is None or fmt not in self.formats or format_of(w) != fmt:
            return f"no format of {self.name}"
        if any(v is None or v.dtype != ir.DataType.INT32 for v in (order, ends)):
            return "places are not int32"
        if w is None or w.shape is None or len(w.shape) != 3 or not w.shape.is_static():
            return "the matrices have no fixed shape"
        experts, depth, columns = w.shape.numpy()
        if depth % _STEP or columns % _STEP:
            return f"{depth} x {columns} are no multiples of {_STEP}"
        if experts > _MOST:
            return f"{experts} matrices are more than {_MOST}"
        return {"format": fmt, "columns": columns, "depth": depth, "experts": experts}

    def tiles(self, problem: Problem, capability: Capability) -> Sequence[Tile]:
        return _TILES

    def tiled(self, problem: Problem, tile: Tile) -> Program:
        fmt, columns, depth, experts = (
            str(problem["format"]),
            *(int(problem[k]) for k in ("columns", "depth", "experts")),
        )
        kinds = (("x", fmt), ("w", fmt), ("order", "i32"), ("ends", "i32"))
        return Program(
            function="optkit.kernels.triton.device.grouped:grouped",
            arguments=(
                *(Argument(name=a, type=pointer(f), binds=f"input:{i}", aligned=True) for i, (a, f) in enumerate(kinds)),
                Argument(name="y", type=pointer(fmt), binds="output:0", aligned=True),
                Argument(name="rows", type="i32", binds="rows"),
            ),
            constants={
                "COLUMNS": columns, "DEPTH": depth, "EXPERTS": experts, "KEPT": power_of_two(experts), "M": tile.m, "N": tile.n, "K": tile.k,
            },
            # Every expert may leave a tile that is not full.
            grid=(f"(cdiv(rows, {tile.m}) + min(rows, {experts})) * {-(-columns // tile.n)}", "1", "1"),
            warps=tile.warps, stages=tile.stages, products=fmt,
        )  # fmt: skip

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"rows": "axis(2, 0)"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [(shapes[2][0], int(problem["columns"]))]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        columns, depth, experts = (int(problem[k]) for k in ("columns", "depth", "experts"))
        # Each row goes to two experts.
        return [(-(-rows // 2), depth), (experts, depth, columns), (rows,), (experts,)]

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        m = _TILES[0].m
        return (1, m - 1, m, 2 * m + 1)

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        x, w, order, ends = self.shapes(problem, rows)
        random = np.random.default_rng(seed)
        # Some experts get nothing.
        places = np.sort(np.append(random.integers(0, rows + 1, ends[0] - 1), rows))
        return [
            *draw([x, w], str(problem["format"]), seed),
            random.integers(0, x[0], order).astype(np.int32),
            places.astype(np.int32),
        ]

    def allowed(self, problem: Problem) -> float:
        # Sums are in float32 and rounded once.
        return {"fp16": 0.55, "bf16": 0.55}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        x, w, order, ends = (a for a in inputs if a is not None)
        rows = x.astype(np.float64)[order]
        parts = np.split(rows, ends[:-1])
        return [
            np.concatenate([part @ matrix for part, matrix in zip(parts, w.astype(np.float64), strict=True)])
        ]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        (tokens, depth), (experts, _, columns), (rows,), _ = shapes
        moved = tokens * depth + min(experts, rows) * depth * columns + rows * columns
        return 2.0 * rows * depth * columns, float(moved * BYTES[str(problem["format"])])

    def rules(self) -> Sequence[Rule]:
        """None: ONNX has no product of groups. Graphs call the operator by name."""
        return ()


class GroupedLinear(_Grouped):
    """``y = x[order] @ w[expert]`` where the rows of each expert stand together: those of ``e`` end at ``ends[e]``.

    Gale et al., "MegaBlocks", 2022, arXiv:2211.15841, section 4: no expert has a capacity, none is padded beyond a tile. Rows
    are fetched in the order of the experts, so that tokens are never copied. ``order`` ``[rows]``, ``ends`` ``[experts]``, the last
    of which is the number of rows.
    """

    name, op = "grouped-linear", "GroupedLinear"
    size: ClassVar[int] = 1
    source: ClassVar[str] = "arXiv:2211.15841"
    examples: ClassVar[tuple[Problem, ...]] = (
        {"format": "bf16", "columns": 4096, "depth": 2048, "experts": 64},
    )
    small: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp16", "columns": 80, "depth": 48, "experts": 5},
        {"format": "bf16", "columns": 144, "depth": 80, "experts": 1},
    )
    body: ClassVar[str] = (
        f'<domain: "{DOMAIN}", opset_import: ["" : %d]> {op} (x, w, order, ends) => (y) {{ '
        "first = Constant <value_ints = [0]> () last = Constant <value_ints = [-1]> () origin = Constant <value_int = 0> () "
        "one = Constant <value_int = 1> () z = Constant <value_float = 0.0> () zero = CastLike (z, x) "
        "rows = Gather <axis = 0> (x, order) all = MatMul (rows, w) n = Shape (order) count = Squeeze (n) "
        "i = Range (origin, count, one) e = Cast <to = 7> (ends) end = Unsqueeze (e, last) under = Less (i, end) "
        "u = Cast <to = 7> (under) edge = CumSum <exclusive = 1> (u, origin) new = Equal (edge, origin) mine = And (under, new) "
        "m = Unsqueeze (mine, last) part = Where (m, all, zero) y = ReduceSum <keepdims = 0> (part, first) }"
    )
