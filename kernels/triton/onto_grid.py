"""Norms and gates whose result goes onto a grid of 8 bits: what the product behind them reads, written once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute
from optkit.kernels.base import BYTES, DOMAIN, Argument, Kernel, Problem, columns_of, format_of
from optkit.kernels.triton.drawing import DTYPES, draw
from optkit.kernels.triton.gated import GeGlu, SwiGlu
from optkit.kernels.triton.norm import RMS, AddLayerNorm, AddRmsNorm, LayerNorm, RmsNorm
from optkit.kernels.triton.quantize import draw_grid, grid_arguments, grid_problem, on_grid
from optkit.rewrite import Match, Rule, remove_unused, substitute


class _OntoGrid(Kernel):
    """What a kernel computes, rounded to its format as it would be between the two kernels, and then onto the grid.

    Step and zero point of the grid are the last two operands.
    """

    size: ClassVar[int] = 0
    """After the two that it stands for are called."""

    before: ClassVar[str]
    """The operator whose result it is that goes onto the grid."""

    def problem(self, node: ir.Node) -> Problem | str:
        found, stored = super().problem(node), grid_problem(node)  # type: ignore[safe-super]
        if isinstance(found, str):
            return found
        return f"no format of {self.name}" if stored is None else {**found, "stored": stored}

    def output_format(self, problem: Problem, output: int = 0) -> str:
        return str(problem["format"] if output else problem["stored"])

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        return [*super().shapes(problem, rows), (), ()]  # type: ignore[safe-super]

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        found = draw(super().shapes(problem, rows), str(problem["format"]), seed)  # type: ignore[safe-super]
        return [*found, *draw_grid(str(problem["stored"]))]

    def allowed(self, problem: Problem) -> float:
        # What is next to the border between two numbers of the format, and then of the grid, may fall to either side.
        return max(1.0, super().allowed(problem))  # type: ignore[safe-super]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        *operands, step, zero = inputs
        assert step is not None
        assert zero is not None
        value, *rest = super().reference(problem, operands)  # type: ignore[safe-super]
        rounded = value.astype(np.float32).astype(DTYPES[str(problem["format"])])
        return [on_grid(rounded, step, zero), *([value] if problem.get("normal") else []), *rest]

    def rules(self) -> Sequence[Rule]:
        return [Rule(_quantizer, self._onto, self._behind, name=self.name)]

    def _behind(self, root: ir.Node, x: ir.Value, **_: ir.Value) -> Match:
        match, node = Match(), x.producer()
        if node is None or node.op_type != self.before or node.graph is not root.graph:
            return match.fail(f"not what {self.before} computes", x)
        if node.domain != (DOMAIN if self.before != "Gelu" else ""):
            return match.fail(f"{self.before} is no call of a kernel", x)
        if x is not node.outputs[0] or x.is_graph_output():
            return match.fail("an output of the graph, or not what is normalized", x)
        return self._free(match, root, node)

    @abstractmethod
    def _free(self, match: Match, root: ir.Node, node: ir.Node) -> Match:
        """Whether ``node`` may be computed at the place of ``root``."""

    @abstractmethod
    def _onto(self, op: Any, root: ir.Node, x: ir.Value, step: ir.Value, zero: ir.Value) -> Any:
        """The call in place of ``root`` and of what computes ``x``."""


def _quantizer(op: Any, x: Any, step: Any, zero: Any) -> Any:
    return op.of(DOMAIN, "Quantize")(x, step, zero)


class _NormOntoGrid(_OntoGrid):
    residual: ClassVar[bool]

    def problem(self, node: ir.Node) -> Problem | str:
        found = super().problem(node)
        if isinstance(found, str):
            return found
        read = {i for i, v in enumerate(node.outputs) if v.uses() or v.is_graph_output()}
        return {**found, "normal": 1 in read, "total": self.residual and 2 in read}

    def bound(self, problem: Problem) -> dict[str, str]:
        found = {k: v for k, v in super().bound(problem).items() if k not in ("y", "total")}  # type: ignore[misc]
        step = len(self.shapes(problem, 1)) - 2
        found |= {a.name: a.binds for a in grid_arguments(str(problem["stored"]), step)}
        found["q"] = "output:0"
        if problem["normal"]:
            found["y"] = "output:1"
        if problem["total"]:
            found["total"] = "output:2"
        return found

    def outputs(
        self, problem: Problem, shapes: Sequence[tuple[int, ...]]
    ) -> Sequence[tuple[int, ...] | None]:
        found = [shapes[0], shapes[0] if problem["normal"] else None]
        return [*found, shapes[0] if problem["total"] else None] if self.residual else found

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        operations, moved = super().work(problem, shapes)  # type: ignore[safe-super]
        n, each = self.sizes(problem, shapes)["rows"] * shapes[0][-1], BYTES[str(problem["format"])]
        return operations + 4.0 * n, moved + float(n * (1 - each * (not problem["normal"])))

    def _free(self, match: Match, root: ir.Node, node: ir.Node) -> Match:
        assert node.graph is not None
        place = {n: index for index, n in enumerate(node.graph)}
        readers = [u.node for v in node.outputs for u in v.uses() if u.node is not root]
        if any(n.graph is not node.graph for n in readers):
            return match.fail("it is read in a body", node)
        if any(place[n] < place[root] for n in readers):
            return match.fail("it is read before it goes onto the grid", root)
        if any(v.is_graph_output() for v in node.outputs):
            return match.fail("its sum is an output of the graph", node)
        return match

    def _onto(self, op: Any, root: ir.Node, x: ir.Value, step: ir.Value, zero: ir.Value) -> Any:
        node = x.producer()
        assert node is not None
        attributes = {"epsilon": node.attributes.get_float("epsilon", 1e-5)}
        operands = [*node.inputs, step, zero]
        q, *others = op.node(self.op, operands, attributes, domain=DOMAIN, outputs=2 + self.residual)
        q.type, q.shape = root.outputs[0].type, x.shape
        for value, old in zip(others, node.outputs, strict=False):
            value.type, value.shape = x.type, x.shape
            substitute(old, value)
        remove_unused([node])
        return q


class _GateOntoGrid(_OntoGrid):
    paired: ClassVar[bool]

    def grid(self, problem: Problem) -> tuple[Argument, ...]:
        return grid_arguments(str(problem["stored"]), 1 + self.paired)

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        operations, moved = super().work(problem, shapes)  # type: ignore[safe-super]
        n = shapes[0][0] * shapes[0][1]
        return operations + 4.0 * n, moved + float(n * (1 - BYTES[str(problem["format"])]))

    def _free(self, match: Match, root: ir.Node, node: ir.Node) -> Match:
        if len(node.outputs[0].uses()) > 1:
            return match.fail("it is read as a float too", node)
        fmt, columns = format_of(node.inputs[0]), columns_of(node.inputs[0])
        if fmt not in self.formats or columns is None or columns % 16:
            return match.fail("the last axis is no fixed multiple of 16, or not of floats", node)
        if attribute(node, "approximate", "none") != "none":
            return match.fail("Gelu by tanh", node)
        return match

    def _onto(self, op: Any, root: ir.Node, x: ir.Value, step: ir.Value, zero: ir.Value) -> Any:
        node = x.producer()
        assert node is not None
        (q,) = op.node(self.op, [*node.inputs, step, zero], domain=DOMAIN)
        q.type, q.shape = root.outputs[0].type, x.shape
        return q


_END = " f = Cast <to = 1> (%s) q = QuantizeLinear (f, step, zero) }"
_HEAD = '<domain: "optkit", opset_import: ["" : %%d]> %s <epsilon: float = 1e-5> (%s, step, zero) => (%s) {'
_LAYER = " y = LayerNormalization <axis: int = -1, epsilon: float = @epsilon> (%s, scale, bias)"
_SOURCE = "arXiv:1712.05877, arXiv:2209.05433"
_MORE: dict[str, Any] = {"stored": "int8"}


def _small(*kept: tuple[bool, bool]) -> tuple[Problem, ...]:
    """A problem for each choice of outputs that are read: of the result, of the sum."""
    kinds = (("fp16", 48, "int8"), ("bf16", 256, "fp8"), ("fp32", 80, "int8"))
    return tuple(
        {
            "format": fmt, "columns": columns, "total": total, "normal": normal, "epsilon": "1e-05", "stored": stored,
        }
        for (fmt, columns, stored), (normal, total) in zip(kinds, kept, strict=True)
    )  # fmt: skip


_ALONE, _SUMS = (
    _small((True, False), (False, False), (True, False)),
    _small((True, False), (False, True), (True, True)),
)
_NORM: dict[str, Any] = {"epsilon": "1e-05", **_MORE}


class LayerNormQuantize(_NormOntoGrid, LayerNorm):
    """``layer-norm`` and its result on a grid of int8 or e4m3, one step for all elements; the result itself where it is read.

    As ``quantize``, which read what this one has in registers.
    """

    name, op, before = "layer-norm-quantize", "LayerNormQuantize", "LayerNorm"
    source: ClassVar[str] = f"arXiv:1607.06450, {_SOURCE}"
    body: ClassVar[str] = _HEAD % (op, "x, scale, bias", "q, y") + _LAYER % "x" + _END % "y"
    examples: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp16", "columns": 384, "total": False, "normal": True, **_NORM},
    )
    small: ClassVar[tuple[Problem, ...]] = _ALONE


class AddLayerNormQuantize(_NormOntoGrid, AddLayerNorm):
    """``add-layer-norm`` and its result on a grid of int8 or e4m3; the result and the sum where they are read.

    As ``layer-norm-quantize``.
    """

    name, op, before = "add-layer-norm-quantize", "AddLayerNormQuantize", "AddLayerNorm"
    source: ClassVar[str] = f"arXiv:1607.06450, {_SOURCE}"
    body: ClassVar[str] = (
        _HEAD % (op, "x, residual, scale, bias", "q, y, total")
        + " total = Add (x, residual)"
        + _LAYER % "total"
        + _END % "y"
    )
    examples: ClassVar[tuple[Problem, ...]] = (
        {"format": "fp16", "columns": 384, "total": False, "normal": True, **_NORM, "stored": "fp8"},
    )
    small: ClassVar[tuple[Problem, ...]] = _SUMS


class RmsNormQuantize(_NormOntoGrid, RmsNorm):
    """``rms-norm`` and its result on a grid of int8 or e4m3; the result itself where it is read.

    As ``layer-norm-quantize``.
    """

    name, op, before = "rms-norm-quantize", "RmsNormQuantize", "RmsNorm"
    source: ClassVar[str] = f"arXiv:1910.07467, {_SOURCE}"
    body: ClassVar[str] = _HEAD % (op, "x, scale", "q, y") + RMS % ("x", "x") + _END % "y"
    examples: ClassVar[tuple[Problem, ...]] = (
        {"format": "bf16", "columns": 4096, "total": False, "normal": False, **_NORM, "stored": "fp8"},
    )
    small: ClassVar[tuple[Problem, ...]] = _ALONE


class AddRmsNormQuantize(_NormOntoGrid, AddRmsNorm):
    """``add-rms-norm`` and its result on a grid of int8 or e4m3; the result and the sum where they are read.

    As ``layer-norm-quantize``.
    """

    name, op, before = "add-rms-norm-quantize", "AddRmsNormQuantize", "AddRmsNorm"
    source: ClassVar[str] = f"arXiv:1910.07467, {_SOURCE}"
    body: ClassVar[str] = (
        _HEAD % (op, "x, residual, scale", "q, y, total")
        + " total = Add (x, residual)"
        + RMS % ("total", "total")
        + _END % "y"
    )
    examples: ClassVar[tuple[Problem, ...]] = (
        {"format": "bf16", "columns": 4096, "total": True, "normal": False, **_NORM},
    )
    small: ClassVar[tuple[Problem, ...]] = _SUMS


_SMALL: tuple[Problem, ...] = tuple(
    {"format": f, "columns": 128, "stored": s}
    for f, s in (("fp16", "int8"), ("bf16", "fp8"), ("fp32", "int8"))
)
_GATE = '<domain: "optkit", opset_import: ["" : %%d]> %s (%s, step, zero) => (q) { %s'


class SwiGluQuantize(_GateOntoGrid, SwiGlu):
    """``swiglu`` with its result on a grid of int8 or e4m3, one step for all elements.

    As ``layer-norm-quantize``.
    """

    name, op, before = "swiglu-quantize", "SwiGluQuantize", "SwiGlu"
    source: ClassVar[str] = f"arXiv:2002.05202, {_SOURCE}"
    body: ClassVar[str] = (
        _GATE % (op, "gate, up", "s = Sigmoid (gate) a = Mul (gate, s) y = Mul (a, up)") + _END % "y"
    )
    examples: ClassVar[tuple[Problem, ...]] = ({"format": "bf16", "columns": 14336, **_MORE},)
    small: ClassVar[tuple[Problem, ...]] = _SMALL


class GeGluQuantize(_GateOntoGrid, GeGlu):
    """``geglu`` with its result on a grid of int8 or e4m3, one step for all elements.

    As ``layer-norm-quantize``.
    """

    name, op, before = "geglu-quantize", "GeGluQuantize", "GeGlu"
    source: ClassVar[str] = f"arXiv:2002.05202, {_SOURCE}"
    body: ClassVar[str] = _GATE % (op, "gate, up", "a = Gelu (gate) y = Mul (a, up)") + _END % "y"
    examples: ClassVar[tuple[Problem, ...]] = (
        {"format": "bf16", "columns": 14336, **_MORE, "stored": "fp8"},
    )
    small: ClassVar[tuple[Problem, ...]] = _SMALL


class GeluQuantize(_GateOntoGrid, GeGlu):
    """``gelu(x)``, the exact one, on a grid of int8 or e4m3, one step for all elements.

    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, arXiv:1606.08415, section 2. As ``layer-norm-quantize``.
    """

    name, op, before = "gelu-quantize", "GeluQuantize", "Gelu"
    paired: ClassVar[bool] = False
    source: ClassVar[str] = f"arXiv:1606.08415, {_SOURCE}"
    body: ClassVar[str] = _GATE % (op, "x", "y = Gelu (x)") + _END % "y"
    examples: ClassVar[tuple[Problem, ...]] = ({"format": "fp16", "columns": 1536, **_MORE},)
    small: ClassVar[tuple[Problem, ...]] = _SMALL
