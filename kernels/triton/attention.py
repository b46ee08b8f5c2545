"""Scaled dot-product attention in float16 and bfloat16, without the matrix of scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, rank, scalar
from optkit.kernels.base import BYTES, DOMAIN, Argument, Kernel, Problem, Program, format_of
from optkit.kernels.triton.drawing import DTYPES, draw
from optkit.rewrite import Match, Rule


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
# What fits the registers without a stack: for heads of up to 64 elements and for deeper ones; then the same where the mask
# has a value of its own for every score.
_TILES = {
    (8, 0): (_SMALL, _WIDE, _OWN, _OWN_WIDE),
    (8, 6): (_SMALL, _HALF, _OWN, _OWN_WIDE),
    (8, 7): (_SMALL, _HALF, _OWN, _OWN_WIDE),
    (8, 9): (_SMALL, _HALF, _OWN, _OWN_WIDE),
    (9, 0): (_Tile(queries=128, keys=128, warps=8, stages=2), _WIDE, _OWN, _OWN),
    (10, 0): (_SMALL, _WIDE, _OWN, _OWN),
    (12, 0): (_WIDE, _QUARTER, _OWN, _OWN_WIDE),
    (12, 1): (_WIDE, _QUARTER, _OWN, _OWN_WIDE),
}
_DEPTHS = (16, 32, 64, 128)
# Sizes that ``shapes`` draws with.
_BATCH, _HEADS = 2, 3


class _Attention(Kernel):
    masked: ClassVar[bool]
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16")

    def problem(self, node: ir.Node) -> Problem | str:
        q = node.inputs[0]
        fmt, depth = format_of(q), _depth(q)
        if fmt is None or fmt not in self.formats:
            return f"no format of {self.name}"
        if depth is None:
            return f"heads have no fixed size of {', '.join(map(str, _DEPTHS))} elements"
        found: dict[str, int | str | bool] = {"format": fmt, "depth": depth, "scale": repr(_scale(node))}
        if self.masked:
            axes = _axes(node.inputs[3])
            if axes is None:
                return "which axes the mask has is not known"
            found |= {"mask": axes, "mask_format": str(format_of(node.inputs[3]))}
        return found

    def program(self, problem: Problem, capability: tuple[int, int]) -> Program:
        fmt, depth = str(problem["format"]), int(problem["depth"])
        t = self._tile(problem, capability)
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
            },
            grid=(f"cdiv(queries, {t.queries})", "batch * heads", "1"),
            warps=t.warps, stages=t.stages, products=fmt,
        )  # fmt: skip

    def _tile(self, problem: Problem, capability: tuple[int, int]) -> _Tile:
        return _TILES[capability][2 * ("q" in str(problem.get("mask", ""))) + (int(problem["depth"]) > 64)]

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"batch": "axis(0, 0)", "heads": "axis(0, 1)", "queries": "axis(0, 2)", "keys": "axis(1, 2)"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[0]]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        depth, keys = int(problem["depth"]), rows + 3
        found: list[tuple[int, ...]] = [(_BATCH, _HEADS, n, depth) for n in (rows, keys, keys)]
        if self.masked:
            axes = str(problem["mask"])
            full = {"b": _BATCH, "h": _HEADS, "q": rows}
            found.append((*(full[a] if a in axes else 1 for a in "bhq"), keys))
        return found

    def edges(self, problem: Problem, capability: tuple[int, int]) -> tuple[int, ...]:
        m = self._tile(problem, capability).queries
        return (1, m - 1, m, m + 1)

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        fmt, shapes = str(problem["format"]), self.shapes(problem, rows)
        found = draw(shapes[:3], fmt, seed)
        if self.masked:
            random = np.random.default_rng(seed + 1)
            mask = np.where(random.random(shapes[3]) < 0.3, -np.inf, random.standard_normal(shapes[3]))
            mask[..., -1] = 0.0  # each query sees a key, the last
            found.append(mask.astype(np.float32).astype(DTYPES[str(problem["mask_format"])]))
        return found

    def allowed(self, problem: Problem) -> float:
        # Shares are rounded before they multiply the values, by half a step each; the interpreter cuts bfloat16.
        return {"fp16": 1.5, "bf16": 3.0}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        q, k, v, *mask = (a.astype(np.float64) for a in inputs if a is not None)
        scores = q @ np.swapaxes(k, 2, 3) * float(str(problem["scale"])) + (mask[0] if mask else 0.0)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        return [shares / shares.sum(-1, keepdims=True) @ v]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        batch, heads, queries, depth = shapes[0]
        keys = shapes[1][2]
        moved = 2 * batch * heads * (queries + keys) * depth + sum(math.prod(s) for s in shapes[3:])
        return 4.0 * batch * heads * queries * keys * depth, float(moved * BYTES[str(problem["format"])])

    def attributes(self, problem: Problem) -> dict[str, Any]:
        return {"scale": float(str(problem["scale"]))}

    def rules(self) -> Sequence[Rule]:
        return [
            Rule(_pattern(scaled, self.masked, cast=cast), self._rewrite, self._check, name=self.name)
            for scaled in ("", "Mul", "Div")
            for cast in ("", "scores", "masked")[: 2 + self.masked]
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
        if any(rank(x) != 4 for x in (q, v)) or _depth(q) is None or _depth(v) != _depth(q):
            return match.fail(f"not batches of heads of {', '.join(map(str, _DEPTHS))} elements", q)
        turned = k.producer()
        if turned is None or turned.op_type != "Transpose" or turned.domain != "" or rank(k) != 4:
            return match.fail("the keys are not transposed", k)
        if q.shape is None or v.shape is None or list(q.shape)[:2] != list(v.shape)[:2]:
            return match.fail("keys and queries are not known to have the same heads", v)
        if scale is not None and scalar(scale) is None:
            return match.fail("the scale is no constant", scale)
        softmax = next((n for n in _above(root) if n.op_type == "Softmax"), None)
        if softmax is None or attribute(softmax, "axis", -1) not in (-1, 3):
            return match.fail("the Softmax is not over the last axis", root)
        if mask is not None and (format_of(mask) not in (format_of(q), "fp32") or _axes(mask) is None):
            return match.fail("which axes the mask has is not known", mask)
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
        perm = list(attribute(turned, "perm", (3, 2, 1, 0)))  # type: ignore[call-overload]
        perm[2:] = perm[:1:-1]
        keys = op.Transpose(turned.inputs[0], perm=perm) if perm != [0, 1, 2, 3] else turned.inputs[0]
        factor = 1.0 if scale is None else float(scalar(scale) or 1.0)
        divided = any(n.op_type == "Div" for n in _above(root)) if scale is not None else False
        inputs = [q, keys, v] if mask is None else [q, keys, v, mask]
        (y,) = op.node(self.op, inputs, {"scale": 1 / factor if divided else factor}, domain=DOMAIN)
        y.type, y.shape = q.type, q.shape
        return y


def _above(root: ir.Node) -> list[ir.Node]:
    """The nodes from the product with the values up to that with the keys."""
    found, value = [root], root.inputs[0]
    while value is not None and (node := value.producer()) is not None and node.op_type != "MatMul":
        found.append(node)
        chain = [v for v in node.inputs if v is not None and v.producer() is not None]
        value = next((v for v in chain if _leads(v)), None)
    return found


def _leads(value: ir.Value | None, most: int = 5) -> bool:
    """Whether a product lies close above; what is added to it does not."""
    node = value.producer() if value is not None else None
    if node is None or not most:
        return False
    if node.op_type == "MatMul":
        return True
    return node.op_type in ("Add", "Mul", "Div", "Cast", "Softmax") and any(
        _leads(v, most - 1) for v in node.inputs
    )


def _depth(value: ir.Value | None) -> int | None:
    """Elements of a head, where they are one of those that there are tiles for."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    depth = value.shape[3]
    return depth if isinstance(depth, int) and depth in _DEPTHS else None


def _axes(value: ir.Value | None) -> str | None:
    """Which of batch, heads and queries a mask has, the others being 1: letters of ``bhq``."""
    if value is None or value.shape is None or len(value.shape) != 4 or value.shape[3] == 1:
        return None
    return "".join(letter for letter, d in zip("bhq", value.shape, strict=False) if d != 1)


def _scale(node: ir.Node) -> float:
    return float(attribute(node, "scale", 1.0))  # type: ignore[arg-type]


def _pattern(scaled: str, masked: bool, *, cast: str) -> Callable[..., Any]:
    """Attention as graphs spell it; ``cast``: what is widened for the Softmax, the scores or the scores with their mask."""

    def build(op: Any, q: Any, k: Any, v: Any, scale: Any, mask: Any) -> Any:
        scores = op.MatMul(q, k)
        if scaled:
            scores = getattr(op, scaled)(scores, scale)
        if cast == ("scores" if masked else "masked"):
            scores = op.Cast(scores)
        if masked:
            scores = op.Add(scores, mask)
        if cast == ("masked" if masked else "scores"):
            scores = op.Cast(scores)
        shares = op.Softmax(scores)
        return op.MatMul(op.Cast(shares) if cast else shares, v)

    if scaled and masked:
        return build
    if scaled:
        return lambda op, q, k, v, scale: build(op, q, k, v, scale, None)
    if masked:
        return lambda op, q, k, v, mask: build(op, q, k, v, None, mask)
    return lambda op, q, k, v: build(op, q, k, v, None, None)


_HEAD = '<domain: "optkit", opset_import: ["" : %%d]> %s <scale> (q, k, v%s) => (y) { '
_SCORES = (
    "t = Transpose <perm = [0, 1, 3, 2]> (k) p = MatMul (q, t) g = Cast <to = 1> (p) "
    "f = Constant <value_float: float = @scale> () s = Mul (g, f) "
)
_VALUES = "w = Softmax <axis = -1> (%s) h = CastLike (w, v) y = MatMul (h, v) }"
_EXAMPLES: tuple[dict[str, int | str | bool], ...] = (
    {"format": "fp16", "depth": 64},
    {"format": "bf16", "depth": 128},
)
_SMALL_ONES: tuple[dict[str, int | str | bool], ...] = (
    {"format": "fp16", "depth": 32},
    {"format": "bf16", "depth": 128},
)


class Attention(_Attention):
    """``y = softmax(q @ k^T * scale) @ v`` of ``[batch, heads, sequence, depth]``, without the scores in memory.

    Dao et al., "FlashAttention", 2022, arXiv:2205.14135, algorithm 1, in the order of "FlashAttention-2", 2023,
    arXiv:2307.08691: queries stay, keys and values come by; Milakov and Gimelshein 2018, arXiv:1805.02867, for the softmax.
    """

    name, op, masked = "attention", "Attention", False
    size: ClassVar[int] = 4
    source: ClassVar[str] = "arXiv:2205.14135, arXiv:2307.08691"
    body: ClassVar[str] = _HEAD % (op, "") + _SCORES + _VALUES % "s"
    examples: ClassVar[tuple[Problem, ...]] = tuple({**e, "scale": "0.125"} for e in _EXAMPLES)
    small: ClassVar[tuple[Problem, ...]] = tuple({**e, "scale": "0.2"} for e in _SMALL_ONES)


class MaskedAttention(_Attention):
    """``y = softmax(q @ k^T * scale + mask) @ v``; the mask is the same along the axes where it has one element.

    As ``attention``.
    """

    name, op, masked = "masked-attention", "MaskedAttention", True
    size: ClassVar[int] = 5
    source: ClassVar[str] = "arXiv:2205.14135, arXiv:2307.08691"
    body: ClassVar[str] = (
        _HEAD % (op, ", mask") + _SCORES + "m = Cast <to = 1> (mask) a = Add (s, m) " + _VALUES % "a"
    )
    examples: ClassVar[tuple[Problem, ...]] = tuple(
        {**e, "scale": "0.125", "mask": "b", "mask_format": e["format"]} for e in _EXAMPLES
    )
    small: ClassVar[tuple[Problem, ...]] = (
        {**_SMALL_ONES[0], "scale": "0.2", "mask": "b", "mask_format": "fp16"},
        {**_SMALL_ONES[1], "scale": "0.2", "mask": "q", "mask_format": "bf16"},
        {"format": "fp16", "depth": 16, "scale": "1.0", "mask": "bhq", "mask_format": "fp32"},
    )
