"""The largest scores of a row with their places, or with the boxes and classes that stand there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute, rank, scalar
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
from optkit.rewrite import Match, Rule, substitute
from optkit.targets.gpu import Capability

# Scores of a step, and warps; a row is walked once for every bit of a score, which it stays in the cache for.
_BLOCK, _WARPS = 1024, 8
_MOST, _LONGEST = 1024, 1 << 17
# Sizes that ``shapes`` draws with.
_BATCH, _CLASSES = 2, 3


class _Top(Kernel):
    decode: ClassVar[bool]
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")

    def problem(self, node: ir.Node) -> Problem | str:
        fmt, shape = format_of(node.inputs[0]), shape_of(node.inputs[0])
        if fmt is None or fmt not in self.formats:
            return f"no format of {self.name}"
        if shape is None or len(shape) < 1 + self.decode:
            return "the scores have no known axes"
        k = node.attributes.get_int("k", 0)
        return _misfit(shape[-1 - self.decode :], k) or {"format": fmt, "k": k}

    def program(self, problem: Problem, capability: Capability) -> Program:
        fmt, k = str(problem["format"]), int(problem["k"])
        kinds = [("x", fmt, "input:0"), ("values", fmt, "output:0"), ("places", "i64", "output:1")]
        if self.decode:
            kinds += [("boxes", fmt, "input:1"), ("found", fmt, "output:2")]
        sizes = ("columns", "classes")
        return Program(
            function="optkit.kernels.triton.device.top:top",
            arguments=(
                *(Argument(name=n, type=pointer(kind), binds=b, aligned=True) for n, kind, b in kinds),
                *(Argument(name=n, type="i32", binds=n) for n in sizes),
            ),
            constants={
                **({} if self.decode else {"boxes": None, "found": None}),
                "K": k, "KEPT": power_of_two(k), "BLOCK": _BLOCK, "DECODE": self.decode,
            },
            grid=("rows", "1", "1"),
            warps=_WARPS, waived={"128-bit loads": "rows may have any length, so that they start anywhere"},
        )  # fmt: skip

    def expressions(self, problem: Problem) -> dict[str, str]:
        if self.decode:
            return {"rows": "axis(0, 0)", "columns": "axis(0, 1) * axis(0, 2)", "classes": "axis(0, 2)"}
        return {"rows": "elements(0) // axis(0, -1)", "columns": "axis(0, -1)", "classes": "1"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        found = (*shapes[0][: -1 - self.decode], int(problem["k"]))
        return [found, found, *([(*found, 4)] if self.decode else [])]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        # ``rows`` more than are asked for.
        count = int(problem["k"]) + rows
        if self.decode:
            return [(_BATCH, -(-count // _CLASSES), _CLASSES), (_BATCH, -(-count // _CLASSES), 4)]
        return [(_BATCH, count)]

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        rest = _BLOCK - int(problem["k"])
        return tuple(sorted({1, rest - 1, rest, rest + 1}))

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        fmt, (scores, *boxes) = str(problem["format"]), self.shapes(problem, rows)
        random = np.random.default_rng(seed)
        # Steps of an eighth: many are equal.
        x = np.round(random.standard_normal(scores) * 8) / 8
        return [x.astype(DTYPES[fmt]), *draw(boxes, fmt, seed + 1)]

    def allowed(self, problem: Problem) -> float:
        return 0.0

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        x, *boxes = (a.astype(np.float64) for a in inputs if a is not None)
        classes = x.shape[-1] if self.decode else 1
        flat = x.reshape(*x.shape[: -1 - self.decode], -1)
        places = np.argsort(-flat, -1, kind="stable")[..., : int(problem["k"])]
        values = np.take_along_axis(flat, places, -1)
        if not self.decode:
            return [values, places]
        return [values, places % classes, np.take_along_axis(boxes[0], places[..., None] // classes, 1)]

    def output_format(self, problem: Problem, output: int = 0) -> str:
        return "int64" if output == 1 else str(problem["format"])

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        size, out = BYTES[str(problem["format"])], math.prod(self.outputs(problem, shapes)[0])
        return 96.0 * math.prod(shapes[0]), float(
            math.prod(shapes[0]) * size + out * (size * (1 + 8 * self.decode) + 8)
        )

    def attributes(self, problem: Problem) -> dict[str, Any]:
        return {"k": int(problem["k"])}

    def rules(self) -> Sequence[Rule]:
        return () if self.decode else [Rule(_pattern, self._rewrite, self._check, name=self.name)]

    def _check(self, root: ir.Node, x: ir.Value, k: ir.Value) -> Match:
        match, shape, number = Match(), shape_of(x), scalar(k)
        if format_of(x) not in self.formats or shape is None:
            return match.fail("not known to be float32, float16 or bfloat16", x)
        if attribute(root, "axis", -1) not in (-1, (rank(x) or 0) - 1) or not attribute(root, "largest", 1):
            return match.fail("not the largest of the last axis", root)
        if number is None:
            return match.fail("how many is no constant", k)
        if (why := _misfit(shape[-1:], int(number))) is not None:
            return match.fail(why, x)
        return match

    def _rewrite(self, op: Any, root: ir.Node, x: ir.Value, k: ir.Value) -> Any:
        values, places = op.node(self.op, [x], {"k": int(scalar(k) or 0)}, domain=DOMAIN, outputs=2)
        for new, old in zip((values, places), root.outputs, strict=True):
            new.type, new.shape = old.type, old.shape
        substitute(root.outputs[1], places)
        return values


def _misfit(sizes: Sequence[int | str | None], k: int) -> str | None:
    """Why the largest ``k`` of an axis, or of two as one, are not found; None where they are."""
    fixed = [d for d in sizes if isinstance(d, int)]
    if len(fixed) < len(sizes):
        return "the number of scores is not fixed"
    if not 0 < k <= min(_MOST, math.prod(fixed)):
        return f"{k} of {math.prod(fixed)} scores: from 1 to {_MOST} are found"
    return f"{math.prod(fixed)} scores are more than {_LONGEST}" if math.prod(fixed) > _LONGEST else None


def _pattern(op: Any, x: Any, k: Any) -> Any:
    return op.TopK(x, k)


class Top(_Top):
    """The ``k`` largest of the last axis, largest first and of equal ones the first, with their places: ONNX's TopK.

    The ``k``-th largest is found a bit at a time from the highest on, as radix selection does (Alabi et al., "Fast k-selection
    algorithms for graphics processing units", 2012, doi:10.1145/2133803.2345676, section 4); then few are ranked by counting.
    """

    name, op, decode = "top-k", "TopK", False
    size: ClassVar[int] = 1
    source: ClassVar[str] = "doi:10.1145/2133803.2345676, ONNX TopK"
    body: ClassVar[str] = (
        f'<domain: "optkit", opset_import: ["" : %d]> {op} <k> (x) => (values, places) {{ '
        "n = Constant <value_int: int = @k> () one = Constant <value_ints = [1]> () m = Reshape (n, one) values, places = TopK (x, m) }"
    )
    examples: ClassVar[tuple[Problem, ...]] = ({"format": "fp32", "k": 300},)
    small: ClassVar[tuple[Problem, ...]] = ({"format": "bf16", "k": 5},)


class TopDetections(_Top):
    """The ``k`` best pairs of a box and a class: scores ``[batch, boxes, classes]``, boxes ``[batch, boxes, 4]``; no suppression.

    Carion et al., "DETR", 2020, arXiv:2005.12872, and what follows it: each object is said once, so that its best scores are
    the answer. Scores, classes and boxes leave, best first. As ``top-k``.
    """

    name, op, decode = "top-detections", "TopDetections", True
    size: ClassVar[int] = 1
    source: ClassVar[str] = "arXiv:2005.12872, doi:10.1145/2133803.2345676"
    body: ClassVar[str] = (
        f'<domain: "optkit", opset_import: ["" : %d]> {op} <k> (x, boxes) => (values, labels, found) {{ '
        "n = Constant <value_int: int = @k> () one = Constant <value_ints = [1]> () last = Constant <value_ints = [-1]> () "
        "m = Reshape (n, one) flat = Flatten <axis = 1> (x) values, places = TopK (flat, m) "
        "c = Shape <start = 2, end = 3> (x) labels = Mod (places, c) box = Div (places, c) index = Unsqueeze (box, last) "
        "found = GatherND <batch_dims = 1> (boxes, index) }"
    )
    examples: ClassVar[tuple[Problem, ...]] = ({"format": "fp16", "k": 300},)
    small: ClassVar[tuple[Problem, ...]] = ({"format": "fp16", "k": 64},)
