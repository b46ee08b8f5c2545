"""Layer and RMS normalization of the last axis, alone or with the residual added before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, rank, scalar
from optkit.kernels.base import (
    BYTES,
    DOMAIN,
    Argument,
    Kernel,
    Problem,
    Program,
    columns_of,
    format_of,
    pointer,
    power_of_two,
)
from optkit.kernels.triton.drawing import draw
from optkit.kernels.triton.residual import absorb, addends
from optkit.rewrite import Match, Rule
from optkit.targets.gpu import GFX942, Capability

# Elements that one block has in registers, and its most warps, by architecture. A block is small where few threads fit
# a multiprocessor, so that several hide each other's latency.
BLOCKS = {
    (8, 0): (4096, 8), (8, 6): (2048, 8), (8, 7): (2048, 8), (8, 9): (2048, 8),
    (9, 0): (4096, 8), (10, 0): (4096, 8), (12, 0): (2048, 8), (12, 1): (2048, 8), GFX942: (4096, 8),
}  # fmt: skip
_WIDEST = 8192  # columns: beyond, a row does not fit the registers of eight warps
_STEP = 16


class _Norm(Kernel):
    centred: ClassVar[bool]
    residual: ClassVar[bool]
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")

    def _positions(self) -> tuple[int, int | None, int, int | None]:
        """Inputs that are x, the residual, the scale and the bias."""
        scale = 2 if self.residual else 1
        return 0, 1 if self.residual else None, scale, scale + 1 if self.centred else None

    def problem(self, node: ir.Node) -> Problem | str:
        x = node.inputs[0]
        fmt, columns = format_of(x), columns_of(x)
        if fmt is None or fmt not in self.formats:
            return f"{x.dtype if x is not None else 'nothing'} is no format of {self.name}"
        if columns is None:
            return "the last axis is not fixed"
        if (why := fits(columns)) is not None:
            return why
        total = len(node.outputs) > 1 and (bool(node.outputs[1].uses()) or node.outputs[1].is_graph_output())
        return {
            "format": fmt, "columns": columns, "total": self.residual and total,
            "epsilon": str(attribute(node, "epsilon", 1e-5)),
        }  # fmt: skip

    def program(self, problem: Problem, capability: Capability) -> Program:
        fmt, columns = str(problem["format"]), int(problem["columns"])
        elements, most = BLOCKS[capability]
        block = power_of_two(columns)
        rows = max(1, min(elements // block, 8))
        # Each thread reads 16 bytes at a time.
        warps = max(1, min(most, rows * block * BYTES[fmt] // (16 * 32)))
        bound, stored = self.bound(problem), str(problem.get("stored", fmt))
        order = ("x", "residual", "scale", "bias", "step", "zero", "y", "total", "q")
        kinds = {"step": "fp32", "zero": stored, "q": stored}
        arguments = [
            Argument(
                name=n,
                type=pointer(kinds.get(n, fmt)),
                binds=bound[n],
                aligned=n not in ("step", "zero"),
            )
            for n in order
            if n in bound
        ]
        return Program(
            function="optkit.kernels.triton.device.norm:norm",
            arguments=(*arguments, Argument(name="rows", type="i32", binds="rows")),
            constants={
                **{name: None for name in order if name not in bound},
                "EPSILON": float(problem["epsilon"]), "COLUMNS": columns, "BLOCK": block, "ROWS": rows,
                "CENTRED": self.centred, "RESIDUAL": self.residual, "BIAS": self.centred, "NORMAL": "y" in bound,
                "TOTAL": "total" in bound, "GRID": "q" in bound,
            },
            grid=(f"cdiv(rows, {rows})", "1", "1"),
            warps=warps,
        )  # fmt: skip

    def bound(self, problem: Problem) -> dict[str, str]:
        """What the arguments of the program are bound to, by their names there."""
        x, residual, scale, bias = self._positions()
        bound = {"x": f"input:{x}", "scale": f"input:{scale}", "y": "output:0"}
        if residual is not None:
            bound["residual"] = f"input:{residual}"
        if bias is not None:
            bound["bias"] = f"input:{bias}"
        if problem["total"]:
            bound["total"] = "output:1"
        return bound

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"rows": f"elements(0) // {problem['columns']}"}

    def outputs(
        self, problem: Problem, shapes: Sequence[tuple[int, ...]]
    ) -> Sequence[tuple[int, ...] | None]:
        return [shapes[0]] * (2 if problem["total"] else 1)

    def attributes(self, problem: Problem) -> dict[str, Any]:
        return {"epsilon": float(problem["epsilon"])}

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        columns = int(problem["columns"])
        whole, vector = (rows, columns), (columns,)
        return [whole] * (2 if self.residual else 1) + [vector] * (2 if self.centred else 1)

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        return draw(self.shapes(problem, rows), str(problem["format"]), seed)

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        block = int(self.program(problem, capability).constants["ROWS"] or 1)
        return tuple(sorted({1, max(1, block - 1), block, block + 1}))

    def allowed(self, problem: Problem) -> float:
        # Halves are rounded once, by half a step, and so is a sum that is normalized, on both sides. float32 also has the
        # rounding of the statistics and of four products.
        return {"fp16": 0.51, "bf16": 0.51, "fp32": 4.0}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        at = self._positions()
        x, residual, scale, bias = (None if i is None else inputs[i] for i in at)
        assert x is not None
        assert scale is not None
        value = x.astype(np.float64)
        if residual is not None:
            # The sum is one of the outputs, in their format; what is normalized is that.
            value = (value + residual.astype(np.float64)).astype(x.dtype).astype(np.float64)
        total = value
        if self.centred:
            value = value - value.mean(-1, keepdims=True)
        value = value / np.sqrt((value**2).mean(-1, keepdims=True) + float(problem["epsilon"]))
        value = value * scale.astype(np.float64)
        if bias is not None:
            value = value + bias.astype(np.float64)
        return [value, total] if problem["total"] else [value]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        rows, columns, each = (
            self.sizes(problem, shapes)["rows"],
            shapes[0][-1],
            BYTES[str(problem["format"])],
        )
        passes = 2 + self.residual + bool(problem["total"])
        return 8.0 * rows * columns, float(each * (passes * rows * columns + (1 + self.centred) * columns))

    def rules(self) -> Sequence[Rule]:
        pattern = _layer_pattern if self.centred else _rms_pattern
        return [Rule(pattern, self._rewrite, self._check, name=self.name)]

    def _check(self, root: ir.Node, x: ir.Value, scale: ir.Value, **bound: ir.Value) -> Match:
        match, columns = Match(), columns_of(x)
        if format_of(x) not in self.formats:
            return match.fail("not known to be float32, float16 or bfloat16", x)
        if columns is None:
            return match.fail("the last axis is not fixed", x)
        if why := fits(columns):
            return match.fail(why, x)
        for vector in (scale, bound.get("bias")):
            if vector is not None and (vector.dtype != x.dtype or list(vector.shape or ()) != [columns]):
                return match.fail(f"not a vector of {columns} in the format of the rows", vector)
        if self.centred:
            if attribute(root, "axis", -1) not in (-1, (rank(x) or 0) - 1):
                return match.fail("normalizes more than the last axis", root)
            if len(root.outputs) > 1 and any(v.uses() for v in root.outputs[1:]):
                return match.fail("mean or deviation are used too", root)
        elif why := _rms_miss(x, bound["axes"], bound["epsilon"]):
            return match.fail(why, root)
        vectors = [v for v in (scale, bound.get("bias")) if v is not None]
        if self.residual and (why := addends(x, root, vectors)) is not None:
            return match.fail(why, x)
        return match

    def _rewrite(self, op: Any, root: ir.Node, x: ir.Value, scale: ir.Value, **bound: ir.Value | None) -> Any:
        epsilon = attribute(root, "epsilon", 1e-5) if self.centred else scalar(bound["epsilon"])
        vectors = [scale]
        if self.centred:
            assert x.dtype is not None
            zeros = np.zeros(columns_of(x) or 0, x.dtype.numpy())
            vectors.append(op.constant(zeros, "bias") if bound["bias"] is None else bound["bias"])
        attributes = {"epsilon": epsilon}
        if self.residual:
            return absorb(op, self.op, x, vectors, attributes)
        (y,) = op.node(self.op, [x, *vectors], attributes, domain=DOMAIN)
        y.type, y.shape = x.type, x.shape
        return y


def fits(columns: int) -> str | None:
    """Why rows of so many columns are not computed from registers, or None."""
    if columns % _STEP:
        return f"rows of {columns} are not read 16 bytes at a time: no multiple of {_STEP}"
    return f"rows of {columns} do not fit the registers" if columns > _WIDEST else None


def _layer_pattern(op: Any, x: Any, scale: Any, bias: Any) -> Any:
    return op.LayerNormalization(x, scale, bias)


def _rms_pattern(op: Any, x: Any, axes: Any, epsilon: Any, scale: Any) -> Any:
    """What ``fuse-rms-norm`` writes."""
    return op.Mul(op.Div(x, op.Sqrt(op.Add(op.ReduceMean(op.Pow(x, 2), axes), epsilon))), scale)


def _rms_miss(x: ir.Value, axes: ir.Value, epsilon: ir.Value) -> str | None:
    axis, number = scalar(axes), scalar(epsilon)
    if axis is None or int(axis) not in (-1, (rank(x) or 0) - 1):
        return "not over the last axis alone"
    if any(not attribute(n, "keepdims", 1) for n, _ in axes.uses() if n.op_type == "ReduceMean"):
        return "drops the axis"
    return "epsilon is not a constant" if number is None or number < 0 else None


_LAYER = "LayerNormalization <axis: int = -1, epsilon: float = @epsilon>"
# What computes ``y`` out of ``%s``, in the format of the second.
RMS = """
  wide = Cast <to: int = 1> (%s)
  two = Constant <value: tensor = float {2}> ()
  last = Constant <value: tensor = int64[1] {-1}> ()
  e = Constant <value_float: float = @epsilon> ()
  square = Pow (wide, two)
  mean = ReduceMean (square, last)
  raised = Add (mean, e)
  deviation = Sqrt (raised)
  normal = Div (wide, deviation)
  factor = Cast <to: int = 1> (scale)
  scaled = Mul (normal, factor)
  y = CastLike (scaled, %s)
"""
_HEAD = '<domain: "optkit", opset_import: ["" : %%d]> %s <epsilon: float = 1e-5> (%s) => (%s) {'
_EXAMPLES: tuple[Problem, ...] = tuple(
    {"format": fmt, "columns": columns, "total": False, "epsilon": "1e-05"}
    for fmt, columns in (("fp16", 384), ("bf16", 4096), ("fp32", 768))
)
_SMALL: tuple[Problem, ...] = tuple(
    {"format": fmt, "columns": columns, "total": False, "epsilon": "1e-05"}
    for fmt, columns in (("fp16", 48), ("fp16", 64), ("bf16", 256), ("fp32", 80))
)
_SMALL_SUMS: tuple[Problem, ...] = tuple({**problem, "total": True} for problem in _SMALL)
_SUMS: tuple[Problem, ...] = tuple({**problem, "total": True} for problem in _EXAMPLES)


class LayerNorm(_Norm):
    """``y = (x - mean) / sqrt(var + eps) * scale + bias`` over the last axis.

    Ba et al., "Layer Normalization", 2016, arXiv:1607.06450, eq. 4. Two passes, so that no large mean cancels.
    """

    name, op, centred, residual = "layer-norm", "LayerNorm", True, False
    size: ClassVar[int] = 1
    source: ClassVar[str] = "arXiv:1607.06450"
    body: ClassVar[str] = _HEAD % (op, "x, scale, bias", "y") + f" y = {_LAYER} (x, scale, bias) }}"
    examples: ClassVar[tuple[Problem, ...]] = _EXAMPLES[:2]
    small: ClassVar[tuple[Problem, ...]] = _SMALL


class AddLayerNorm(_Norm):
    """``total = x + residual`` and its layer normalization; one read and one write less than apart.

    Ba et al., "Layer Normalization", 2016, arXiv:1607.06450, eq. 4. The sum is rounded to the format before it is normalized.
    """

    name, op, centred, residual = "add-layer-norm", "AddLayerNorm", True, True
    size: ClassVar[int] = 2
    source: ClassVar[str] = "arXiv:1607.06450"
    body: ClassVar[str] = (
        _HEAD % (op, "x, residual, scale, bias", "y, total")
        + f" total = Add (x, residual) y = {_LAYER} (total, scale, bias) }}"
    )
    examples: ClassVar[tuple[Problem, ...]] = _SUMS[1:2]
    small: ClassVar[tuple[Problem, ...]] = _SMALL_SUMS


class RmsNorm(_Norm):
    """``y = x / sqrt(mean(x**2) + eps) * scale`` over the last axis, in float32.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467, eq. 4, with eps inside the root.
    """

    name, op, centred, residual = "rms-norm", "RmsNorm", False, False
    size: ClassVar[int] = 6
    source: ClassVar[str] = "arXiv:1910.07467"
    body: ClassVar[str] = _HEAD % (op, "x, scale", "y") + RMS % ("x", "x") + "}"
    examples: ClassVar[tuple[Problem, ...]] = _EXAMPLES[1:2]
    small: ClassVar[tuple[Problem, ...]] = _SMALL


class AddRmsNorm(_Norm):
    """``total = x + residual`` and its RMS normalization; one read and one write less than apart.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467, eq. 4, with eps inside the root.
    The sum is rounded to the format before it is normalized.
    """

    name, op, centred, residual = "add-rms-norm", "AddRmsNorm", False, True
    size: ClassVar[int] = 7
    source: ClassVar[str] = "arXiv:1910.07467"
    body: ClassVar[str] = (
        _HEAD % (op, "x, residual, scale", "y, total")
        + " total = Add (x, residual)"
        + RMS % ("total", "total")
        + "}"
    )
    examples: ClassVar[tuple[Problem, ...]] = _SUMS[1:2]
    small: ClassVar[tuple[Problem, ...]] = _SMALL_SUMS
