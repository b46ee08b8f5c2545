"""Decoding with keys and values in pages: attention of one query over them, and what writes new ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.kernels.base import (
    BYTES,
    DOMAIN,
    Argument,
    Kernel,
    Problem,
    Program,
    format_of,
    pointer,
    power_of_two,
)
from optkit.kernels.triton.drawing import DTYPES, draw
from optkit.kernels.triton.scores import DEPTHS
from optkit.rewrite import Rule
from optkit.targets.gpu import Capability

# Keys of a step, warps and stages; heads that share keys are the rows of a product, at least 16 of them.
_KEYS, _WARPS, _STAGES = 64, 4, 2
_SHARES, _LEAST = 32, 16
# Elements that a block writes, and its warps.
_BLOCK, _WRITERS = 2048, 4
_STORED = ("int8", "fp8")
# Sizes that ``shapes`` draws with.
_BATCH, _GROUPS = 2, 2


class _Paged(Kernel):
    """What both have: the form of the pages, and numbers that they may be stored in."""

    stored: ClassVar[bool] = False
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16")

    def _pages(self, node: ir.Node, x: ir.Value | None, at: int) -> dict[str, int | str | bool] | str:
        """Of a call whose heads are ``x`` and whose pages are the input ``at``."""
        fmt, cache = format_of(x), node.inputs[at]
        shape, heads, kept = shape_of(cache), shape_of(x), format_of(cache)
        if fmt is None or fmt not in self.formats or kept not in (_STORED if self.stored else (fmt,)):
            return f"no formats of {self.name}"
        if shape is None or heads is None or len(shape) != 4 or len(heads) != 3:
            return "not heads of [tokens, heads, depth] and pages of [pages, heads, page, depth]"
        groups, page, depth = shape[1:]
        if not isinstance(groups, int) or not isinstance(page, int) or not isinstance(heads[1], int):
            return "the numbers of heads and the size of a page are not fixed"
        if not isinstance(depth, int) or depth not in DEPTHS or depth != heads[2]:
            return f"heads have no fixed size of {', '.join(map(str, DEPTHS))} elements"
        if heads[1] % groups or heads[1] // groups > _SHARES:
            return f"{heads[1]} heads do not share {groups} of keys, {_SHARES} at most each"
        found: dict[str, int | str | bool] = {"format": fmt, "depth": depth, "page": page}
        return found | ({"stored": str(kept)} if self.stored else {})

    def rules(self) -> Sequence[Rule]:
        """None: ONNX has no pages. Graphs call the operator by name."""
        return ()

    def _cache(self, problem: Problem, pages: int) -> tuple[int, ...]:
        return pages, _GROUPS, int(problem["page"]), int(problem["depth"])

    def _kept(self, problem: Problem) -> str:
        return str(problem.get("stored", problem["format"]))

    def _scales(self, seed: int) -> list[np.ndarray | None]:
        random = np.random.default_rng(seed)
        return [random.uniform(0.02, 0.03, _GROUPS).astype(np.float32) for _ in range(2 * self.stored)]


class _Decode(_Paged):
    def problem(self, node: ir.Node) -> Problem | str:
        found = self._pages(node, node.inputs[0], 1)
        if isinstance(found, str):
            return found
        heads, pages = shape_of(node.inputs[0]), shape_of(node.inputs[1])
        assert heads is not None
        assert pages is not None
        share = int(heads[1] or 1) // int(pages[1] or 1)
        window = node.attributes.get_int("window", 0)
        scale = node.attributes.get_float("scale", 1.0)
        return {**found, "share": share, "window": window, "scale": repr(scale)}

    def program(self, problem: Problem, capability: Capability) -> Program:
        fmt, kept, share = str(problem["format"]), self._kept(problem), int(problem["share"])
        kinds = [
            ("q", fmt, "input:0"), ("keys", kept, "input:1"), ("values", kept, "input:2"), ("table", "i32", "input:3"),
            ("lengths", "i32", "input:4"),
        ]  # fmt: skip
        if self.stored:
            kinds += [("key_scale", "fp32", "input:5"), ("value_scale", "fp32", "input:6")]
        kinds.append(("y", fmt, "output:0"))
        return Program(
            function="optkit.kernels.triton.device.paged:attention",
            arguments=(
                *(Argument(name=n, type=pointer(kind), binds=b, aligned=True) for n, kind, b in kinds),
                *(Argument(name=n, type="i32", binds=n) for n in ("most", "groups")),
            ),
            constants={
                **({} if self.stored else {"key_scale": None, "value_scale": None}),
                "parts": None, "weights": None, "KEYS": 0,
                "SCALE": float(str(problem["scale"])), "DEPTH": int(problem["depth"]), "PAGE": int(problem["page"]),
                "SHARE": share, "M": max(_LEAST, power_of_two(share)), "N": _KEYS, "WINDOW": int(problem["window"]),
                "SCALED": self.stored,
            },
            grid=("batch", "groups", "1"),
            warps=_WARPS, stages=_STAGES, products=fmt, low=True,
        )  # fmt: skip

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"batch": "axis(0, 0)", "groups": "axis(1, 1)", "most": "axis(3, 1)"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[0]]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        share, depth = int(problem["share"]), int(problem["depth"])
        most = -(-rows // int(problem["page"])) + 1
        cache = self._cache(problem, _BATCH * most + 3)
        scales: list[tuple[int, ...]] = [(_GROUPS,)] * (2 * self.stored)
        return [(_BATCH, share * _GROUPS, depth), cache, cache, (_BATCH, most), (_BATCH,), *scales]

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        return (1, _KEYS - 1, _KEYS, _KEYS + 1)

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        q, keys, values, table, _, *_ = self.shapes(problem, rows)
        random, kept = np.random.default_rng(seed), self._kept(problem)
        caches = draw([keys, values], "fp32", seed + 1)
        # What is stored in 8 bits is scaled back to about 1.
        wide = 40.0 if self.stored else 1.0
        stored = [None if c is None else (c * wide).clip(-127, 127).astype(DTYPES[kept]) for c in caches]
        pages = random.permutation(keys[0])[: math.prod(table)].reshape(table)
        lengths = np.array([rows, max(1, rows // 2)], np.int32)
        return [
            *draw([q], str(problem["format"]), seed),
            *stored,
            pages.astype(np.int32),
            lengths,
            *self._scales(seed),
        ]

    def allowed(self, problem: Problem) -> float:
        # Shares are rounded before they multiply the values, by half a step each.
        return {"fp16": 1.5, "bf16": 1.5}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        q, keys, values, table, lengths, *scales = (a for a in inputs if a is not None)
        share, window = int(problem["share"]), int(problem["window"])
        y = np.zeros(q.shape)
        for sample, length in enumerate(lengths):
            first = max(0, length - window) if window else 0
            found = []
            for cache, scale in zip((keys, values), scales or (None, None), strict=True):
                # [groups, keys, depth]
                whole = np.moveaxis(cache[table[sample]].astype(np.float64), 1, 0)
                whole = whole.reshape(cache.shape[1], -1, cache.shape[3])[:, first:length]
                whole = whole if scale is None else whole * scale.astype(np.float64)[:, None, None]
                found.append(np.repeat(whole, share, 0))
            scores = np.einsum("hd,hkd->hk", q[sample].astype(np.float64), found[0]) * float(
                str(problem["scale"])
            )
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            y[sample] = np.einsum("hk,hkd->hd", shares / shares.sum(-1, keepdims=True), found[1])
        return [y]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        (batch, heads, depth), (_, groups, page, _) = shapes[:2]
        keys = batch * shapes[3][1] * page
        moved = 2 * keys * groups * depth * BYTES[self._kept(problem)]
        return 4.0 * heads * keys * depth, float(
            moved + 2 * batch * heads * depth * BYTES[str(problem["format"])]
        )

    def attributes(self, problem: Problem) -> dict[str, Any]:
        return {"scale": float(str(problem["scale"])), "window": int(problem["window"])}


class _Write(_Paged):
    def problem(self, node: ir.Node) -> Problem | str:
        return self._pages(node, node.inputs[0], 5)

    def program(self, problem: Problem, capability: Capability) -> Program:
        fmt, kept, depth = str(problem["format"]), self._kept(problem), int(problem["depth"])
        rows = _BLOCK // depth
        kinds = [
            *((n, fmt, f"input:{i}") for i, n in enumerate(("k", "v", "cos", "sin"))), ("slots", "i32", "input:4"),
            *((n, "fp32", f"input:{7 + i}") for i, n in enumerate(("key_scale", "value_scale")[: 2 * self.stored])),
            ("keys", kept, "output:0"), ("values", kept, "output:1"),
        ]  # fmt: skip
        return Program(
            function="optkit.kernels.triton.device.paged:write",
            arguments=(
                *(Argument(name=n, type=pointer(kind), binds=b, aligned=True) for n, kind, b in kinds),
                *(Argument(name=n, type="i32", binds=n) for n in ("rows", "groups")),
            ),
            constants={
                **({} if self.stored else {"key_scale": None, "value_scale": None}),
                "DEPTH": depth, "PAGE": int(problem["page"]), "ROWS": rows, "SCALED": self.stored,
            },
            grid=(f"cdiv(rows, {rows})", "1", "1"),
            warps=_WRITERS,
            aliases={0: 5, 1: 6},
        )  # fmt: skip

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"rows": f"elements(0) // {problem['depth']}", "groups": "axis(5, 1)"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[5], shapes[6]]

    def output_format(self, problem: Problem, output: int = 0) -> str:
        return self._kept(problem)

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        depth = int(problem["depth"])
        cache = self._cache(problem, -(-rows // int(problem["page"])) + 2)
        new, angles = (rows, _GROUPS, depth), (rows, depth)
        scales: list[tuple[int, ...]] = [(_GROUPS,)] * (2 * self.stored)
        return [new, new, angles, angles, (rows,), cache, cache, *scales]

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        tokens = _BLOCK // int(problem["depth"]) // _GROUPS
        return (1, tokens - 1, tokens, tokens + 1)

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        shapes, random = self.shapes(problem, rows), np.random.default_rng(seed)
        cache = shapes[5]
        kept = [
            None if c is None else (8 * c).astype(DTYPES[self._kept(problem)])
            for c in draw([cache, cache], "fp32", seed)
        ]
        slots = random.permutation(cache[0] * cache[2])[:rows].astype(np.int32)
        return [*draw(shapes[:4], str(problem["format"]), seed + 1), slots, *kept, *self._scales(seed)]

    def allowed(self, problem: Problem) -> float:
        # Rounded once, and by the same rule on both sides where it is 8 bits.
        return 0.0 if self.stored else {"fp16": 0.51, "bf16": 0.51}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        k, v, cos, sin, slots, keys, values, *scales = (a for a in inputs if a is not None)
        low, high = np.split(k.astype(np.float64), 2, -1)
        turned = (
            k * cos.astype(np.float64)[:, None]
            + np.concatenate([-high, low], -1) * sin.astype(np.float64)[:, None]
        )
        found = []
        for new, cache, scale in zip(
            (turned, v.astype(np.float64)), (keys, values), scales or (None, None), strict=True
        ):
            whole = cache.astype(np.float64)
            page = slots // cache.shape[2]
            if scale is not None:
                new = new / scale.astype(np.float64)[:, None]
                if self._kept(problem) == "int8":
                    new = np.clip(np.rint(new), -128, 127)
                else:
                    new = np.clip(new, -448, 448).astype(DTYPES["fp8"]).astype(np.float64)
            whole[page, :, slots % cache.shape[2]] = new
            found.append(whole)
        return found

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        n, size = math.prod(shapes[0]), BYTES[str(problem["format"])]
        moved = 2 * n * (size + BYTES[self._kept(problem)]) + 2 * math.prod(shapes[2]) * size
        return 3.0 * n, float(moved)


_OPEN = f'<domain: "{DOMAIN}", opset_import: ["" : %%d]> %s '
_DECODE = (
    _OPEN + "<scale, window> (q, keys, values, table, lengths%s) => (y) { "
    "groups = Shape <start = 1, end = 2> (keys) depth = Shape <start = 3, end = 4> (keys) zero = Constant <value_ints = [0]> () "
    "zeros = Constant <value_ints = [0, 0]> () rest = Constant <value_ints = [-1]> () axes = Constant <value_ints = [1, 2, 3]> () "
    "last = Constant <value_ints = [1, 2]> () origin = Constant <value_int = 0> () one = Constant <value_int = 1> () "
    "high = Constant <value_float = 0.0> () low = Constant <value = float {-inf}> () "
    "long = Concat <axis = 0> (zeros, rest, depth) shared = Concat <axis = 0> (zero, groups, rest, depth) "
    "wk = CastLike (keys, q) wv = CastLike (values, q) gk = Gather <axis = 0> (wk, table) gv = Gather <axis = 0> (wv, table) "
    "tk = Transpose <perm = [0, 2, 1, 3, 4]> (gk) tv = Transpose <perm = [0, 2, 1, 3, 4]> (gv) "
    "k = Reshape (tk, long) v = Reshape (tv, long) rows = Reshape (q, shared) t = Transpose <perm = [0, 1, 3, 2]> (k) "
    "p = MatMul (rows, t) g = Cast <to = 1> (p) f = Constant <value_float: float = @scale> () s = Mul (g, f) %s"
    "window = Constant <value_int: int = @window> () size = Shape <start = 2, end = 3> (k) count = Squeeze (size) "
    "j = Range (origin, count, one) n = Cast <to = 7> (lengths) length = Unsqueeze (n, axes) there = Less (j, length) "
    "back = Sub (length, j) near = LessOrEqual (back, window) free = Equal (window, origin) close = Or (near, free) "
    "seen = And (there, close) hidden = Where (seen, high, low) a = Add (%s, hidden) w = Softmax <axis = -1> (a) "
    "h = CastLike (w, q) x = MatMul (h, v) %s form = Shape (q) y = Reshape (%s, form) }"
)
_DECODE_PROBLEMS: tuple[dict[str, int | str | bool], ...] = (
    {"format": "fp16", "depth": 32, "page": 16, "share": 1, "window": 0, "scale": "0.2"},
    {"format": "bf16", "depth": 64, "page": 32, "share": 3, "window": 21, "scale": "0.2"},
)
_DECODE_EXAMPLE: dict[str, int | str | bool] = {
    "format": "bf16", "depth": 128, "page": 16, "share": 4, "window": 0, "scale": "0.088",
}  # fmt: skip


class PagedAttention(_Decode):
    """Attention of one query a sample, ``[batch, heads, depth]``, over keys and values in pages ``[pages, groups, page, depth]``.

    ``table`` ``[batch, most]`` tells the pages of a sample, ``lengths`` ``[batch]`` how many keys they hold; of these the last
    ``window`` are seen (0: all). Kwon et al., "PagedAttention", 2023, arXiv:2309.06180, section 4.1; heads that share keys are
    the rows of one product. One program walks all keys of a sample and group: where few long samples do not fill a GPU,
    ``paged-attention-parts`` does.
    """

    name, op = "paged-attention", "PagedAttention"
    size: ClassVar[int] = 1
    source: ClassVar[str] = "arXiv:2309.06180"
    body: ClassVar[str] = _DECODE % (op, "", "", "s", "", "x")
    examples: ClassVar[tuple[Problem, ...]] = (_DECODE_EXAMPLE,)
    small: ClassVar[tuple[Problem, ...]] = _DECODE_PROBLEMS


class PagedAttentionQuantized(_Decode):
    """``paged-attention`` of keys and values stored in 8 bits, integers or e4m3, with one scale a group for each.

    Hooper et al., "KVQuant", 2024, arXiv:2401.18079, for why; scales are constant, as vLLM's fp8 cache has them. What is stored
    is exact in float16 and bfloat16: only scores and sums are scaled.
    """

    name, op, stored = "paged-attention-quantized", "PagedAttentionQuantized", True
    size: ClassVar[int] = 1
    source: ClassVar[str] = "arXiv:2309.06180, arXiv:2401.18079"
    body: ClassVar[str] = _DECODE % (
        op, ", key_scale, value_scale", "ks = Unsqueeze (key_scale, last) m = Mul (s, ks) ", "m",
        "xf = Cast <to = 1> (x) vs = Unsqueeze (value_scale, last) xs = Mul (xf, vs) xc = CastLike (xs, q) ", "xc",
    )  # fmt: skip
    examples: ClassVar[tuple[Problem, ...]] = tuple({**_DECODE_EXAMPLE, "stored": s} for s in _STORED)
    small: ClassVar[tuple[Problem, ...]] = tuple(
        {**p, "stored": s} for p, s in zip(_DECODE_PROBLEMS, _STORED, strict=True)
    )


_WRITE = (
    _OPEN + "(k, v, cos, sin, slots, keys, values%s) => (new_keys, new_values) { "
    "one = Constant <value_ints = [1]> () last = Constant <value_ints = [-1]> () origin = Constant <value_int = 0> () "
    "step = Constant <value_int = 1> () lo, hi = Split <axis = -1, num_outputs = 2> (k) no = Neg (hi) "
    "half = Concat <axis = -1> (no, lo) c = Unsqueeze (cos, one) s = Unsqueeze (sin, one) a = Mul (k, c) b = Mul (half, s) "
    "turned = Add (a, b) page = Shape <start = 2, end = 3> (keys) groups = Shape <start = 1, end = 2> (keys) "
    "count = Squeeze (groups) g = Range (origin, count, step) n = Cast <to = 7> (slots) slot = Unsqueeze (n, one) "
    "number = Div (slot, page) place = Mod (slot, page) form = Shape <start = 0, end = 2> (k) "
    "e0 = Expand (number, form) e1 = Expand (g, form) e2 = Expand (place, form) u0 = Unsqueeze (e0, last) "
    "u1 = Unsqueeze (e1, last) u2 = Unsqueeze (e2, last) at = Concat <axis = -1> (u0, u1, u2) %s"
    "%s }"
)
_WRITE_PROBLEMS: tuple[dict[str, int | str | bool], ...] = (
    {"format": "fp16", "depth": 32, "page": 16},
    {"format": "bf16", "depth": 64, "page": 32},
)
_WRITE_EXAMPLE: dict[str, int | str | bool] = {"format": "bf16", "depth": 128, "page": 16}


class RotaryWrite(_Write):
    """Turns new keys ``[tokens, groups, depth]`` by their angles and writes them and new values to their slots, in place.

    ``rotary`` for each position's own angles ``[tokens, depth]``; slot ``i`` is place ``i % page`` of page ``i // page``, as in
    vLLM's slot mapping (arXiv:2309.06180, section 4.3). The outputs are the memory of the pages that come in.
    """

    name, op = "rotary-write", "RotaryWrite"
    size: ClassVar[int] = 1
    source: ClassVar[str] = "arXiv:2104.09864, arXiv:2309.06180"
    body: ClassVar[str] = _WRITE % (
        op, "", "", "new_keys = ScatterND (keys, at, turned) new_values = ScatterND (values, at, v)"
    )  # fmt: skip
    examples: ClassVar[tuple[Problem, ...]] = (_WRITE_EXAMPLE,)
    small: ClassVar[tuple[Problem, ...]] = _WRITE_PROBLEMS


class RotaryWriteQuantized(_Write):
    """``rotary-write`` into pages of 8 bits, integers or e4m3: divided by a scale of the group, ties to even, clamped.

    As ``rotary-write`` and ``paged-attention-quantized``.
    """

    name, op, stored = "rotary-write-quantized", "RotaryWriteQuantized", True
    size: ClassVar[int] = 1
    source: ClassVar[str] = "arXiv:2104.09864, arXiv:2401.18079"
    body: ClassVar[str] = _WRITE % (
        op, ", key_scale, value_scale",
        "tf = Cast <to = 1> (turned) vf = Cast <to = 1> (v) nothing = Sub (key_scale, key_scale) zk = CastLike (nothing, keys) "
        "qk = QuantizeLinear <axis = 1> (tf, key_scale, zk) qv = QuantizeLinear <axis = 1> (vf, value_scale, zk) ",
        # ONNX Runtime scatters no floats of 8 bits; numbers on the grid are exact in between.
        "wk = Cast <to = 1> (keys) wv = Cast <to = 1> (values) gk = Cast <to = 1> (qk) gv = Cast <to = 1> (qv) "
        "sk = ScatterND (wk, at, gk) sv = ScatterND (wv, at, gv) new_keys = CastLike (sk, keys) new_values = CastLike (sv, values)",
    )  # fmt: skip
    examples: ClassVar[tuple[Problem, ...]] = tuple({**_WRITE_EXAMPLE, "stored": s} for s in _STORED)
    small: ClassVar[tuple[Problem, ...]] = tuple(
        {**p, "stored": s} for p, s in zip(_WRITE_PROBLEMS, _STORED, strict=True)
    )
