"""Decoding over long caches: attention over parts of the keys, and the sum of what was found of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute
from optkit.kernels.base import BYTES, DOMAIN, TYPES, Argument, Kernel, Problem, Program, format_of, pointer
from optkit.kernels.triton.drawing import draw
from optkit.kernels.triton.paged import PagedAttention, PagedAttentionQuantized
from optkit.kernels.triton.scores import DEPTHS
from optkit.rewrite import Match, Rule
from optkit.targets.gpu import Capability

# Keys of a part, and blocks of a GPU that need no more of them.
_KEYS, _ENOUGH = 512, 64
# What stands for the logarithm of no weight.
_NOTHING = -1e30
# Parts that are added at a time, and warps.
_TOGETHER, _WARPS = 32, 4


class _InParts(Kernel):
    """What ``before`` computes, of each part of the keys by itself."""

    before: ClassVar[str]

    def problem(self, node: ir.Node) -> Problem | str:
        found, pages = super().problem(node), attribute(node, "pages", 0)  # type: ignore[safe-super]
        if isinstance(found, str):
            return found
        return {**found, "pages": pages} if isinstance(pages, int) and pages > 0 else "no pages in a part"

    def program(self, problem: Problem, capability: Capability) -> Program:
        whole = super().program(problem, capability)  # type: ignore[safe-super]
        kept = {k: v for k, v in whole.constants.items() if k not in ("parts", "weights")}
        made = [
            Argument(name=n, type="*fp32", binds=f"output:{i}", aligned=True)
            for i, n in enumerate(("parts", "weights"))
        ]
        arguments = (*(a for a in whole.arguments if a.name != "y"), *made)
        constants = {**kept, "y": None, "KEYS": int(problem["pages"]) * int(problem["page"])}
        return replace(whole, arguments=arguments, constants=constants, grid=("batch", "groups", "splits"))

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {**super().expressions(problem), "splits": f"cdiv(axis(3, 1), {problem['pages']})"}  # type: ignore[safe-super]

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        batch, heads, depth = shapes[0]
        pages = int(problem["pages"])
        splits = (shapes[3][1] + (pages - 1)) // pages
        return [(batch, heads, splits, depth), (batch, heads, splits)]

    def output_format(self, problem: Problem, output: int = 0) -> str:
        return "fp32"

    def attributes(self, problem: Problem) -> dict[str, Any]:
        return {**super().attributes(problem), "pages": int(problem["pages"])}

    def precision(self, problem: Problem) -> str:
        return str(problem["format"])

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        q, keys, values, table, lengths, *scales = (a for a in inputs if a is not None)
        share, window, pages = (int(problem[k]) for k in ("share", "window", "pages"))
        parts, weights = (np.zeros(shape) for shape in self.outputs(problem, [q.shape, (), (), table.shape]))
        weights[:] = _NOTHING
        for sample, length in enumerate(lengths):
            found = []
            for cache, scale in zip((keys, values), scales or (None, None), strict=True):
                # [heads, keys, depth]
                whole = np.moveaxis(cache[table[sample]].astype(np.float64), 1, 0)
                whole = whole.reshape(cache.shape[1], -1, cache.shape[3])
                whole = whole if scale is None else whole * scale.astype(np.float64)[:, None, None]
                found.append(np.repeat(whole, share, 0))
            scores = np.einsum("hd,hkd->hk", q[sample].astype(np.float64), found[0]) * float(
                str(problem["scale"])
            )
            for part in range(parts.shape[2]):
                first, width = max(0, length - window) if window else 0, pages * int(problem["page"])
                seen = slice(max(first, part * width), min(length, (part + 1) * width))
                if seen.start >= seen.stop:
                    continue
                highest = scores[:, seen].max(-1, keepdims=True)
                shares = np.exp(scores[:, seen] - highest)
                total = shares.sum(-1, keepdims=True)
                parts[sample, :, part] = np.einsum("hk,hkd->hd", shares / total, found[1][:, seen])
                weights[sample, :, part] = (highest + np.log(total))[:, 0]
        return [parts, weights]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        operations, moved = super().work(problem, shapes)  # type: ignore[safe-super]
        (batch, heads, splits, depth), _ = self.outputs(problem, shapes)
        return operations, moved + 4.0 * batch * heads * splits * (depth + 1)

    def rules(self) -> Sequence[Rule]:
        more = ("key_scale", "value_scale") if self.stored else ()  # type: ignore[attr-defined]
        pattern = _quantized(self.before) if more else _plain(self.before)
        return [Rule(pattern, self._split, self._long, name=self.name)]

    def _long(self, root: ir.Node, q: ir.Value, keys: ir.Value, table: ir.Value, **_: ir.Value) -> Match:
        match, heads, pages, rows = Match(), shape_of(q), shape_of(keys), shape_of(table)
        if heads is None or pages is None or rows is None:
            return match.fail("sizes are not known", root)
        batch, groups, page, most = heads[0], pages[1], pages[2], rows[1]
        if not all(isinstance(n, int) for n in (batch, groups, page, most)):
            return match.fail("the numbers of samples and of pages are not fixed", root)
        if int(batch or 1) * int(groups or 1) >= _ENOUGH or int(most or 1) * int(page or 1) < 2 * _KEYS:
            return match.fail("enough samples, or few keys: one block for each sample and group", root)
        return match

    def _split(self, op: Any, root: ir.Node, q: ir.Value, keys: ir.Value, **_: ir.Value) -> Any:
        page, kind = (shape_of(keys) or (0, 0, 0))[2], q.dtype
        assert isinstance(page, int)
        assert kind is not None
        attributes = {k: attribute(root, k) for k in ("scale", "window")} | {"pages": max(1, _KEYS // page)}
        parts, weights = op.node(self.op, list(root.inputs), attributes, domain=DOMAIN, outputs=2)
        sizes: Any = [shape_of(value) for value in root.inputs[:4]]
        shapes = self.outputs(attributes, sizes)  # type: ignore[arg-type]
        for value, shape in zip((parts, weights), shapes, strict=True):
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        (y,) = op.node("MergeParts", [parts, weights], {"to": int(kind)}, domain=DOMAIN)
        y.type, y.shape = q.type, q.shape
        return y


def _plain(op_type: str) -> Any:
    return lambda op, q, keys, values, table, lengths: op.of(DOMAIN, op_type)(q, keys, values, table, lengths)


def _quantized(op_type: str) -> Any:
    return lambda op, q, keys, values, table, lengths, key_scale, value_scale: op.of(DOMAIN, op_type)(
        q, keys, values, table, lengths, key_scale, value_scale
    )


_BODY = (
    f'<domain: "{DOMAIN}", opset_import: ["" : %%d]> %s <scale, window, pages> (q, keys, values, table, lengths%s) => '
    "(parts, weights) { groups = Shape <start = 1, end = 2> (keys) page = Shape <start = 2, end = 3> (keys) "
    "depth = Shape <start = 3, end = 4> (keys) batch = Shape <start = 0, end = 1> (table) most = Shape <start = 1, end = 2> (table) "
    "heads = Shape <start = 1, end = 2> (q) one = Constant <value_ints = [1]> () first = Constant <value_ints = [0]> () "
    "rest = Constant <value_ints = [-1]> () axes = Constant <value_ints = [1, 2, 3]> () origin = Constant <value_int = 0> () "
    "step = Constant <value_int = 1> () nothing = Constant <value_float = 0.0> () tiny = Constant <value_float = 1e-30> () "
    "lowest = Constant <value_float = -1e30> () count = Constant <value_int: int = @pages> () pages = Unsqueeze (count, first) "
    # Rows of the table are filled up to whole parts, by pages that lie behind all keys.
    "minus = Neg (most) short = Mod (minus, pages) filled = Add (most, short) size = Squeeze (filled) "
    "place = Range (origin, size, step) again = Mod (place, most) turned = Transpose <perm = [1, 0]> (table) "
    "longer = Gather <axis = 0> (turned, again) full = Transpose <perm = [1, 0]> (longer) width = Mul (pages, page) "
    "form = Concat <axis = 0> (batch, groups, rest, width, depth) asked = Concat <axis = 0> (batch, groups, one, rest, depth) "
    "wk = CastLike (keys, q) wv = CastLike (values, q) gk = Gather <axis = 0> (wk, full) gv = Gather <axis = 0> (wv, full) "
    "tk = Transpose <perm = [0, 2, 1, 3, 4]> (gk) tv = Transpose <perm = [0, 2, 1, 3, 4]> (gv) k = Reshape (tk, form) "
    "v = Reshape (tv, form) rows = Reshape (q, asked) t = Transpose <perm = [0, 1, 2, 4, 3]> (k) p = MatMul (rows, t) "
    "g = Cast <to = 1> (p) f = Constant <value_float: float = @scale> () s = Mul (g, f) %s"
    "window = Constant <value_int: int = @window> () wide = Shape <start = 1, end = 2> (full) all = Mul (wide, page) "
    "whole = Squeeze (all) j = Range (origin, whole, step) n = Cast <to = 7> (lengths) length = Unsqueeze (n, one) "
    "there = Less (j, length) back = Sub (length, j) near = LessOrEqual (back, window) free = Equal (window, origin) "
    "close = Or (near, free) both = And (there, close) grid = Concat <axis = 0> (batch, one, rest, one, width) "
    "seen = Reshape (both, grid) a = Where (seen, %s, lowest) high = ReduceMax (a, rest) d = Sub (a, high) e = Exp (d) "
    "shares = Where (seen, e, nothing) total = ReduceSum (shares, rest) safe = Max (total, tiny) h = CastLike (shares, q) "
    "x = MatMul (h, v) xf = Cast <to = 1> (x) y = Div (xf, safe) %s log = Log (safe) sum = Add (high, log) w = Max (sum, lowest) "
    "ty = Transpose <perm = [0, 1, 3, 2, 4]> (%s) tw = Transpose <perm = [0, 1, 3, 2, 4]> (w) "
    "fy = Concat <axis = 0> (batch, heads, rest, depth) fw = Concat <axis = 0> (batch, heads, rest) "
    "parts = Reshape (ty, fy) weights = Reshape (tw, fw) }"
)
_SOURCE = "arXiv:2309.06180, arXiv:2311.01282"


def _with_pages(problems: Sequence[Problem], pages: int) -> tuple[Problem, ...]:
    return tuple({**p, "pages": pages} for p in problems)


class PagedAttentionParts(_InParts, PagedAttention):
    """``paged-attention`` of each ``pages`` pages by themselves: ``[batch, heads, parts, depth]``, and the logarithms of their weights.

    Hong et al., "FlashDecoding++", 2023, arXiv:2311.01282, section 2.3 ("Flash-Decoding"): parts of the keys are blocks of their
    own, so that few long samples fill a GPU; ``merge-parts`` adds them. Parts without keys weigh nothing.
    """

    name, op, before = "paged-attention-parts", "PagedAttentionParts", "PagedAttention"
    size: ClassVar[int] = 2
    source: ClassVar[str] = _SOURCE
    body: ClassVar[str] = _BODY % (op, "", "", "s", "", "y")
    examples: ClassVar[tuple[Problem, ...]] = _with_pages(PagedAttention.examples, 32)
    small: ClassVar[tuple[Problem, ...]] = _with_pages(PagedAttention.small, 2)


class PagedAttentionPartsQuantized(_InParts, PagedAttentionQuantized):
    """``paged-attention-parts`` of keys and values stored in 8 bits, as ``paged-attention-quantized`` has them."""

    name, op, before = (
        "paged-attention-parts-quantized",
        "PagedAttentionPartsQuantized",
        "PagedAttentionQuantized",
    )
    size: ClassVar[int] = 2
    source: ClassVar[str] = f"{_SOURCE}, arXiv:2401.18079"
    body: ClassVar[str] = _BODY % (
        op, ", key_scale, value_scale", "ks = Unsqueeze (key_scale, axes) m = Mul (s, ks) ", "m",
        "vs = Unsqueeze (value_scale, axes) ys = Mul (y, vs) ", "ys",
    )  # fmt: skip
    examples: ClassVar[tuple[Problem, ...]] = _with_pages(PagedAttentionQuantized.examples[:1], 32)
    small: ClassVar[tuple[Problem, ...]] = _with_pages(PagedAttentionQuantized.small, 2)


class _Merge(Kernel):
    formats: ClassVar[tuple[str, ...]] = ("fp32",)

    def problem(self, node: ir.Node) -> Problem | str:
        parts, weights = (shape_of(v) for v in node.inputs)
        out = next((name for name, kind in TYPES.items() if int(kind) == attribute(node, "to")), None)
        if any(format_of(v) != "fp32" for v in node.inputs) or out not in ("fp16", "bf16", "fp32"):
            return f"no formats of {self.name}"
        if (
            parts is None
            or weights is None
            or len(parts) != 4
            or parts[:3] != weights
            or parts[3] not in DEPTHS
        ):
            return (
                f"not [batch, heads, parts, depth] with weights, depth one of {', '.join(map(str, DEPTHS))}"
            )
        return {"format": "fp32", "output": out, "depth": int(parts[3])}

    def program(self, problem: Problem, capability: Capability) -> Program:
        kinds = (
            ("parts", "fp32", "input:0"),
            ("weights", "fp32", "input:1"),
            ("y", str(problem["output"]), "output:0"),
        )
        return Program(
            function="optkit.kernels.triton.device.paged:merge",
            arguments=(
                *(Argument(name=n, type=pointer(kind), binds=b, aligned=True) for n, kind, b in kinds),
                Argument(name="splits", type="i32", binds="splits"),
            ),
            constants={"DEPTH": int(problem["depth"]), "N": _TOGETHER},
            grid=("rows", "1", "1"),
            warps=_WARPS,
        )

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"rows": "axis(1, 0) * axis(1, 1)", "splits": "axis(1, 2)"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        batch, heads, _, depth = shapes[0]
        return [(batch, heads, depth)]

    def output_format(self, problem: Problem, output: int = 0) -> str:
        return str(problem["output"])

    def attributes(self, problem: Problem) -> dict[str, Any]:
        return {"to": int(TYPES[str(problem["output"])])}

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        return [(2, 3, rows, int(problem["depth"])), (2, 3, rows)]

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        return (1, _TOGETHER - 1, _TOGETHER, _TOGETHER + 1)

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        parts, weights = draw(self.shapes(problem, rows), "fp32", seed)
        assert weights is not None
        if rows > 1:
            weights[:, :, -1] = _NOTHING
        return [parts, weights]

    def allowed(self, problem: Problem) -> float:
        # Sums of tens of numbers in float32, and the result rounded once.
        return {"fp16": 0.51, "bf16": 0.51, "fp32": 8.0}[str(problem["output"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        parts, weights = (a.astype(np.float64) for a in inputs if a is not None)
        shares = np.exp(weights - weights.max(-1, keepdims=True))
        return [np.einsum("bhs,bhsd->bhd", shares / shares.sum(-1, keepdims=True), parts)]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        batch, heads, splits, depth = shapes[0]
        rows = batch * heads
        return 4.0 * rows * splits * depth, float(
            4 * rows * splits * (depth + 1) + rows * depth * BYTES[str(problem["output"])]
        )

    def rules(self) -> Sequence[Rule]:
        """None: it is called with the parts."""
        return ()


class MergeParts(_Merge):
    """``y = sum(parts * softmax(weights))`` over the parts: what ``paged-attention-parts`` found of each becomes one.

    As ``paged-attention-parts``. In float32, rounded once.
    """

    name, op = "merge-parts", "MergeParts"
    size: ClassVar[int] = 1
    source: ClassVar[str] = "arXiv:2311.01282"
    body: ClassVar[str] = (
        f'<domain: "{DOMAIN}", opset_import: ["" : %d]> {op} <to> (parts, weights) => (y) {{ '
        "axis = Constant <value_ints = [2]> () last = Constant <value_ints = [-1]> () s = Softmax <axis = -1> (weights) "
        "f = Unsqueeze (s, last) p = Mul (parts, f) t = ReduceSum <keepdims = 0> (p, axis) y = Cast <to: int = @to> (t) }"
    )
    examples: ClassVar[tuple[Problem, ...]] = ({"format": "fp32", "output": "bf16", "depth": 128},)
    small: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp32", "output": "fp32", "depth": 32},
        {"format": "fp32", "output": "fp16", "depth": 64},
    )
