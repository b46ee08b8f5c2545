"""Scaled dot-product attention in float16 and bfloat16, without the matrix of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import Dim, shape_of
from optkit.graph import rank, users
from optkit.kernels.base import BYTES, DOMAIN, Argument, Kernel, Problem, Program, format_of
from optkit.kernels.triton.drawing import DTYPES, draw
from optkit.kernels.triton.scores import (
    DEPTHS,
    depth_of,
    factor,
    group,
    heads_of,
    mask_axes,
    pattern,
    scaled_queries,
    softmax_axis,
)
from optkit.masks import sight
from optkit.rewrite import Match, Rule
from optkit.targets.gpu import GFX942, Capability


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """Queries of a program and keys of a step."""

    queries: int
    keys: int
    warps: int
    stages: int


_SMALL = _Tile(queries=128, keys=64, warps=4, stages=2)
_WIDE = _Tile(queries=128, keys=64, warps=8, stages=2)
_HALF = _Tile(queries=64, keys=64, warps=4, stages=2)
_QUARTER = _Tile(queries=64, keys=32, warps=4, stages=2)
_OWN = _Tile(queries=64, keys=32, warps=4, stages=1)
_OWN_WIDE = _Tile(queries=64, keys=32, warps=8, stages=1)
# What fits the registers without a stack: for heads of up to 64 elements and for deeper ones; the same where the mask has a
# value of its own for every score; and both again where places are compared.
_TILES = {
    (8, 0): (_SMALL, _WIDE, _OWN, _OWN_WIDE, _SMALL, _WIDE, _OWN, _OWN_WIDE),
    (8, 6): (_SMALL, _HALF, _OWN, _OWN_WIDE, _HALF, _QUARTER, _OWN, _OWN_WIDE),
    (8, 7): (_SMALL, _HALF, _OWN, _OWN_WIDE, _HALF, _QUARTER, _OWN, _OWN_WIDE),
    (8, 9): (_SMALL, _HALF, _OWN, _OWN_WIDE, _HALF, _QUARTER, _OWN, _OWN_WIDE),
    (9, 0): (_Tile(queries=128, keys=128, warps=8, stages=2), _WIDE, _OWN, _OWN, _WIDE, _WIDE, _OWN, _OWN),
    (10, 0): (_SMALL, _WIDE, _OWN, _OWN, _WIDE, _WIDE, _OWN, _OWN_WIDE),
    (12, 0): (_WIDE, _QUARTER, _OWN, _OWN_WIDE, _WIDE, _QUARTER, _OWN, _OWN_WIDE),
    (12, 1): (_WIDE, _QUARTER, _OWN, _OWN_WIDE, _WIDE, _QUARTER, _OWN, _OWN_WIDE),
    GFX942: (_WIDE, _HALF, _OWN_WIDE, _OWN_WIDE, _WIDE, _HALF, _OWN_WIDE, _OWN_WIDE),
}
# With few queries, as in decoding, keys are all that is read.
_FEW = _Tile(queries=16, keys=64, warps=4, stages=2)
# Of a mask with a value for every score, which is most of what heads of few elements read.
_WAIVED = {"128-bit loads": "rows of the mask are as long as there are keys, so that they start anywhere"}
# Sizes that ``shapes`` draws with.
_BATCH, _HEADS = 2, 2


class _Attention(Kernel):
    masked: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16")

    def problem(self, node: ir.Node) -> Problem | str:
        q, k = node.inputs[:2]
        fmt, depth = format_of(q), depth_of(q)
        if fmt is None or fmt not in self.formats:
            return f"no format of {self.name}"
        if depth is None:
            return f"heads have no fixed size of {', '.join(map(str, DEPTHS))} elements"
        heads, few = shape_of(q), shape_of(k)
        assert heads is not None
        if few is None or len(few) != 4:
            return "how many heads share keys is not known"
        share = 1
        if heads[1] != few[1]:
            if not isinstance(heads[1], int) or not isinstance(few[1], int) or heads[1] % few[1]:
                return "how many heads share keys is not known"
            share = heads[1] // few[1]
        found: dict[str, int | str | bool] = {
            "format": fmt,
            "depth": depth,
            "scale": repr(_scale(node)),
            "share": share,
        }
        if isinstance(heads[2], int) and heads[2] <= _FEW.queries:
            found["few"] = True
        if self.causal:
            found |= {"window": _integer(node, "window"), "last": bool(_integer(node, "last"))}
        if self.masked:
            axes = mask_axes(node.inputs[3])
            if axes is None:
                return "which axes the mask has is not known"
            found |= {"mask": axes, "mask_format": str(format_of(node.inputs[3]))}
        return found

    def program(self, problem: Problem, capability: Capability) -> Program:
        return self._tiled(problem, self._tile(problem, capability))

    def finalists(self, problem: Problem, capability: Capability) -> Sequence[Program]:
        first = self._tile(problem, capability)
        found = [first, replace(first, stages=first.stages + 1)]
        if first.warps == 4:
            found.append(replace(first, warps=8))
        elif first.queries == 128:
            # With fewer warps for as many queries it would go over to the stack.
            found.append(replace(first, queries=64, warps=4))
        return [self._tiled(problem, tile) for tile in found]

    def _tiled(self, problem: Problem, t: _Tile) -> Program:
        fmt, depth = str(problem["format"]), int(problem["depth"])
        axes = str(problem.get("mask", ""))
        binds = [("q", "input:0"), ("k", "input:1"), ("v", "input:2")]
        pointers = [Argument(name=n, type=f"*{fmt}", binds=b, aligned=True) for n, b in binds]
        if self.masked:
            # Rows of the mask are as long as there are keys, whatever their number.
            pointers.append(Argument(name="mask", type=f"*{problem['mask_format']}", binds="input:3"))
        pointers.append(Argument(name="y", type=f"*{fmt}", binds="output:0", aligned=True))
        sizes = [Argument(name=n, type="i32", binds=n) for n in ("queries", "keys", "heads")]
        return Program(
            function="optkit.kernels.triton.device.attention:attention",
            arguments=(*pointers, *sizes),
            constants={
                **({} if self.masked else {"mask": None}),
                "SCALE": float(str(problem["scale"])), "DEPTH": depth, "M": t.queries, "N": t.keys, "MASK": self.masked,
                "MASK_BATCH": "b" in axes, "MASK_HEADS": "h" in axes, "MASK_QUERIES": "q" in axes,
                "SHARE": int(problem["share"]), "CAUSAL": self.causal, "WINDOW": int(problem.get("window", 0)),
                "LAST": bool(problem.get("last", False)),
            },
            grid=(f"cdiv(queries, {t.queries})", "batch * heads", "1"),
            warps=t.warps, stages=t.stages, products=fmt, low=t.queries < 64, waived=_WAIVED if "q" in axes else {},
        )  # fmt: skip

    def _tile(self, problem: Problem, capability: Capability) -> _Tile:
        if problem.get("few"):
            return _FEW
        kind = ("q" in str(problem.get("mask", ""))) + 2 * self.causal
        return _TILES[capability][2 * kind + (int(problem["depth"]) > 64)]

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"batch": "axis(0, 0)", "heads": "axis(0, 1)", "queries": "axis(0, 2)", "keys": "axis(1, 2)"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[0]]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        depth, keys, share = int(problem["depth"]), rows + 3, int(problem["share"])
        queries = min(rows, _FEW.queries) if problem.get("few") else rows
        few = (_BATCH, max(1, _HEADS // share), keys, depth)
        found: list[tuple[int, ...]] = [(_BATCH, share * few[1], queries, depth), few, few]
        if self.masked:
            axes = str(problem["mask"])
            full = {"b": _BATCH, "h": found[0][1], "q": queries}
            found.append((*(full[a] if a in axes else 1 for a in "bhq"), keys))
        return found

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        m = self._tile(problem, capability).queries
        # With few queries, it is keys that go over a block.
        return (1, m - 1, m, _FEW.keys + 1) if problem.get("few") else (1, m - 1, m, m + 1)

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        fmt, shapes = str(problem["format"]), self.shapes(problem, rows)
        found = draw(shapes[:3], fmt, seed)
        if self.masked:
            random = np.random.default_rng(seed + 1)
            hidden = random.random(shapes[3]) < 0.3
            hidden[..., :: 2 if self.causal else shapes[3][3]] = False  # each query sees a key
            mask = np.where(hidden, -np.inf, random.standard_normal(shapes[3]))
            found.append(mask.astype(np.float32).astype(DTYPES[str(problem["mask_format"])]))
        return found

    def allowed(self, problem: Problem) -> float:
        # Shares are rounded before they multiply the values, by half a step each.
        return {"fp16": 1.5, "bf16": 1.5}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        q, k, v, *mask = (a.astype(np.float64) for a in inputs if a is not None)
        k, v = (np.repeat(x, int(problem["share"]), 1) for x in (k, v))
        scores = q @ np.swapaxes(k, 2, 3) * float(str(problem["scale"])) + (mask[0] if mask else 0.0)
        if self.causal:
            ahead = k.shape[2] - q.shape[2] if problem["last"] else 0
            back = np.arange(q.shape[2])[:, None] + ahead - np.arange(k.shape[2])
            window = int(problem["window"]) or k.shape[2]
            scores = np.where((back >= 0) & (back < window), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        return [shares / shares.sum(-1, keepdims=True) @ v]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        batch, heads, queries, depth = shapes[0]
        keys = shapes[1][2]
        moved = 2 * math.prod(shapes[0]) + sum(math.prod(s) for s in shapes[1:])
        pairs = float(queries * keys)
        if self.causal:
            place = np.arange(queries) + (keys - queries if problem["last"] else 0)
            pairs = float(np.clip(place + 1, 0, min(int(problem["window"]) or keys, keys)).sum())
        return 4.0 * batch * heads * pairs * depth, float(moved * BYTES[str(problem["format"])])

    def attributes(self, problem: Problem) -> dict[str, Any]:
        more = {"window": int(problem["window"]), "last": int(problem["last"])} if self.causal else {}
        return {"scale": float(str(problem["scale"])), **more}

    def rules(self) -> Sequence[Rule]:
        return [
            Rule(
                pattern(scaled, self.masked or self.causal, cast=cast),
                self._rewrite,
                self._check,
                name=self.name,
            )
            for scaled in ("", "Mul", "Div")
            for cast in ("", "scores", "masked")[: 2 + (self.masked or self.causal)]
        ]

    def _check(
        self,
        root: ir.Node,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        scale: ir.Value | None = None,
        mask: ir.Value | None = None,
        **_: Any,
    ) -> Match:
        match = Match()
        if format_of(q) not in self.formats or any(x.dtype != q.dtype for x in (k, v)):
            return match.fail("not known to be float16 or bfloat16", q)
        heads = heads_of(root, q, k)
        if heads is None or rank(v) != 4 or heads[3] not in DEPTHS or depth_of(v) != heads[3]:
            return match.fail(f"not batches of heads of {', '.join(map(str, DEPTHS))} elements", q)
        turned = k.producer()
        if turned is None or turned.op_type != "Transpose" or turned.domain != "" or rank(k) != 4:
            return match.fail("the keys are not transposed", k)
        if isinstance(why := group(root, heads, k, v), str):
            return match.fail(why, v)
        if factor(root, k, scale) is None:
            return match.fail("the scale is no constant", scale)
        if softmax_axis(root, k) not in (-1, 3):
            return match.fail("the Softmax is not over the last axis", root)
        if mask is not None and self.causal:
            return self._see(match, root, heads, v, mask)
        if mask is not None and (format_of(mask) not in (format_of(q), "fp32") or mask_axes(mask) is None):
            return match.fail("which axes the mask has is not known", mask)
        return match

    def _see(
        self, match: Match, root: ir.Node, rows: tuple[Dim | None, ...], v: ir.Value, mask: ir.Value
    ) -> Match:
        """Whether the mask is what the kernel makes itself."""
        places, shape = shape_of(v), shape_of(mask)
        assert places is not None
        if shape is None or shape[-2:] != (rows[2], places[2]):
            return match.fail("the mask is not known to have a value for each query and key", mask)
        found = sight(mask, v)
        if isinstance(found, str):
            return match.fail(found)
        if (found.keys is not None) != self.masked:
            return match.fail(
                "hides keys from all queries too" if found.keys is not None else "hides no key from all", mask
            )
        # Queries that see no key give what no mask of ours gives; the graph has to put something in their place.
        if found.keys is not None and any(n.op_type != "Where" for n in users(root.outputs[0])):
            return match.fail("queries that see no key are not guarded", root)
        return match

    def _rewrite(
        self,
        op: Any,
        root: ir.Node,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        scale: ir.Value | None = None,
        mask: ir.Value | None = None,
        **_: Any,
    ) -> Any:
        turned = k.producer()
        assert turned is not None
        perm = list(turned.attributes.get_ints("perm", (3, 2, 1, 0)))
        perm[2:] = perm[:1:-1]
        keys = op.Transpose(turned.inputs[0], perm=perm) if perm != [0, 1, 2, 3] else turned.inputs[0]
        queries, before = scaled_queries(q)
        shape, groups = heads_of(root, q, k), shape_of(v)
        assert shape is not None
        assert groups is not None
        if rank(q) != 4:
            queries = op.Reshape(queries, np.array([0, shape[1], -1, shape[3]], np.int64))
            queries.type, queries.shape = q.type, ir.Shape(shape)
        attributes: dict[str, float | int] = {"scale": before * (factor(root, k, scale) or 1.0)}
        inputs = [keys, v]
        if self.causal:
            assert mask is not None
            found = sight(mask, v)
            assert not isinstance(found, str)
            attributes |= {"window": found.window, "last": int(found.last)}
            if found.keys is not None:
                inputs.append(_hiding(op, found.keys, q))
        elif mask is not None:
            missing = np.arange(4 - (rank(mask) or 0), dtype=np.int64)
            inputs.append(op.Unsqueeze(mask, missing) if missing.size else mask)
        # One query a head: those of the heads that share keys are queries of one head, which reads the keys once.
        joined = shape[2] == 1 and shape[1] != groups[1] and not set("hq") & set(mask_axes(mask) or "")
        rows = queries
        if joined and not self.causal:
            rows = op.Reshape(queries, np.array([0, groups[1], -1, 0], np.int64))
        (y,) = op.node(self.op, [rows, *inputs], attributes, domain=DOMAIN)
        y.type, y.shape = q.type, rows.shape
        return op.Reshape(y, np.array([0, shape[1], -1, 0], np.int64)) if rows is not queries else y


def _hiding(op: Any, seen: ir.Value, q: ir.Value) -> ir.Value:
    """What is added to scores where not every key is seen: 0 or minus infinity, in the format of the queries."""
    assert q.dtype is not None
    kind = q.dtype.numpy()
    hidden: ir.Value = op.Where(seen, np.zeros((), kind), np.array(-np.inf, kind))
    return hidden


def _scale(node: ir.Node) -> float:
    return node.attributes.get_float("scale", 1.0)


def _integer(node: ir.Node, name: str) -> int:
    return node.attributes.get_int(name, 0)


# Heads that share keys are seen as queries of one head, and as their own again.
_HEAD = (
    '<domain: "optkit", opset_import: ["" : %%d]> %s <scale%s> (q, k, v%s) => (y) { '
    "zero = Constant <value_ints = [0]> () rest = Constant <value_ints = [-1, 0]> () "
    "many = Shape <start = 1, end = 2> (q) few = Shape <start = 1, end = 2> (k) "
    "joined = Concat <axis = 0> (zero, few, rest) apart = Concat <axis = 0> (zero, many, rest) "
)
_SCORES = (
    "r = Reshape (q, joined) t = Transpose <perm = [0, 1, 3, 2]> (k) p = MatMul (r, t) g = Cast <to = 1> (p) "
    "u = Reshape (g, apart) f = Constant <value_float: float = @scale> () s = Mul (u, f) "
)
_MASK = "m = Cast <to = 1> (mask) a = Add (s, m) "
_CAUSAL = (
    "origin = Constant <value_int = 0> () one = Constant <value_int = 1> () second = Constant <value_ints = [1]> () "
    "high = Constant <value_float = 0.0> () low = Constant <value = float {-inf}> () "
    "sq = Shape <start = 2, end = 3> (q) sk = Shape <start = 2, end = 3> (k) nq = Squeeze (sq) nk = Squeeze (sk) "
    "window = Constant <value_int: int = @window> () last = Constant <value_int: int = @last> () "
    "i = Range (origin, nq, one) j = Range (origin, nk, one) more = Sub (nk, nq) ahead = Mul (more, last) place = Add (i, ahead) "
    "column = Unsqueeze (place, second) back = Sub (column, j) behind = GreaterOrEqual (back, origin) near = Less (back, window) "
    "free = Equal (window, origin) close = Or (near, free) seen = And (behind, close) hidden = Where (seen, high, low) "
    "c = Add (%s, hidden) "
)
_VALUES = "w = Softmax <axis = -1> (%s) h = CastLike (w, v) z = Reshape (h, joined) x = MatMul (z, v) y = Reshape (x, apart) }"
_SOURCE = "arXiv:2205.14135, arXiv:2307.08691"
_EXAMPLES: tuple[dict[str, int | str | bool], ...] = (
    {"format": "fp16", "depth": 64, "scale": "0.125", "share": 1},
    {"format": "bf16", "depth": 128, "scale": "0.125", "share": 1},
)
_SMALL_ONES: tuple[dict[str, int | str | bool], ...] = (
    {"format": "fp16", "depth": 32, "scale": "0.2", "share": 2},
    {"format": "bf16", "depth": 128, "scale": "0.2", "share": 1},
)


class Attention(_Attention):
    """``y = softmax(q @ k^T * scale) @ v`` of ``[batch, heads, sequence, depth]``, without the scores in memory.

    Dao et al., "FlashAttention", 2022, arXiv:2205.14135, algorithm 1, in the order of "FlashAttention-2", 2023,
    arXiv:2307.08691: queries stay, keys and values come by; Milakov and Gimelshein 2018, arXiv:1805.02867, for the softmax.
    Heads may share keys and values: Ainslie et al., "GQA", 2023, arXiv:2305.13245.
    """

    name, op = "attention", "Attention"
    size: ClassVar[int] = 4
    source: ClassVar[str] = _SOURCE
    body: ClassVar[str] = _HEAD % (op, "", "") + _SCORES + _VALUES % "s"
    examples: ClassVar[tuple[Problem, ...]] = _EXAMPLES[1:]
    small: ClassVar[tuple[Problem, ...]] = _SMALL_ONES


class MaskedAttention(_Attention):
    """``y = softmax(q @ k^T * scale + mask) @ v``; the mask is the same along the axes where it has one element.

    As ``attention``.
    """

    name, op, masked = "masked-attention", "MaskedAttention", True
    size: ClassVar[int] = 5
    source: ClassVar[str] = _SOURCE
    body: ClassVar[str] = _HEAD % (op, "", ", mask") + _SCORES + _MASK + _VALUES % "a"
    examples: ClassVar[tuple[Problem, ...]] = (
        {**_EXAMPLES[0], "mask": "b", "mask_format": "fp16"},
        {**_EXAMPLES[1], "mask": "b", "mask_format": "bf16", "few": True},
    )
    small: ClassVar[tuple[Problem, ...]] = (
        {**_SMALL_ONES[0], "mask": "b", "mask_format": "fp16"},
        {**_SMALL_ONES[1], "mask": "q", "mask_format": "bf16"},
        {"format": "fp16", "depth": 16, "scale": "1.0", "share": 2, "mask": "bhq", "mask_format": "fp32"},
        {
            "format": "fp16",
            "depth": 64,
            "scale": "0.2",
            "share": 2,
            "mask": "b",
            "mask_format": "fp16",
            "few": True,
        },
    )


class CausalAttention(_Attention):
    """``attention`` where no query sees keys behind its own place, nor more than ``window`` of them (0: all before).

    The first query stands at the first key, or with ``last`` the last query at the last key, as behind a cache. Blocks of
    keys that nobody of a block of queries sees are not read: FlashAttention-2, arXiv:2307.08691, section 3.1.1; the window
    is that of Beltagy et al., "Longformer", 2020, arXiv:2004.05150, as Mistral uses it, arXiv:2310.06825, section 2.
    """

    name, op, causal = "causal-attention", "CausalAttention", True
    size: ClassVar[int] = 6
    source: ClassVar[str] = f"{_SOURCE}, arXiv:2310.06825"
    body: ClassVar[str] = _HEAD % (op, ", window, last", "") + _SCORES + _CAUSAL % "s" + _VALUES % "c"
    examples: ClassVar[tuple[Problem, ...]] = ({**_EXAMPLES[1], "share": 4, "window": 1024, "last": True},)
    small: ClassVar[tuple[Problem, ...]] = (
        {**_SMALL_ONES[0], "window": 0, "last": False},
        {**_SMALL_ONES[0], "share": 1, "window": 37, "last": True},
        {**_SMALL_ONES[1], "share": 2, "window": 65, "last": False},
    )


class CausalMaskedAttention(_Attention):
    """``causal-attention`` with a mask that is added to the scores, the same along the axes where it has one element.

    As ``causal-attention``.
    """

    name, op, masked, causal = "causal-masked-attention", "CausalMaskedAttention", True, True
    size: ClassVar[int] = 7
    source: ClassVar[str] = f"{_SOURCE}, arXiv:2310.06825"
    body: ClassVar[str] = (
        _HEAD % (op, ", window, last", ", mask") + _SCORES + _MASK + _CAUSAL % "a" + _VALUES % "c"
    )
    examples: ClassVar[tuple[Problem, ...]] = (
        {**_EXAMPLES[1], "share": 4, "mask": "b", "mask_format": "bf16", "window": 0, "last": False},
    )
    small: ClassVar[tuple[Problem, ...]] = (
        {**_SMALL_ONES[0], "mask": "b", "mask_format": "fp16", "window": 0, "last": True},
        {**_SMALL_ONES[1], "mask": "b", "mask_format": "fp32", "window": 19, "last": False},
    )
