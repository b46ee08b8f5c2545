"""Gated activations: what stands between the two products of a feed-forward block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute
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
)
from optkit.kernels.triton.drawing import draw
from optkit.rewrite import Match, Rule
from optkit.targets.gpu import GFX942, Capability

# Warps of a block and 16-byte reads of a thread, by architecture: enough bytes in flight for the memory of each.
BLOCKS = {
    (8, 0): (8, 2), (8, 6): (4, 1), (8, 7): (4, 1), (8, 9): (4, 1),
    (9, 0): (8, 2), (10, 0): (8, 4), (12, 0): (4, 2), (12, 1): (4, 1), GFX942: (8, 1),
}  # fmt: skip
_STEP = 16


class _Gated(Kernel):
    kind: ClassVar[str]
    paired: ClassVar[bool] = True
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")
    examples: ClassVar[tuple[Problem, ...]] = ({"format": "bf16", "columns": 14336},)
    small: ClassVar[tuple[Problem, ...]] = tuple(
        {"format": f, "columns": 128} for f in ("fp16", "bf16", "fp32")
    )

    def problem(self, node: ir.Node) -> Problem | str:
        fmt, columns = format_of(node.inputs[0]), columns_of(node.inputs[0])
        if fmt is None or fmt not in self.formats:
            return f"no format of {self.name}"
        if columns is None or columns % _STEP:
            return f"the last axis is no fixed multiple of {_STEP}"
        return {"format": fmt, "columns": columns}

    def program(self, problem: Problem, capability: Capability) -> Program:
        fmt = str(problem["format"])
        warps, reads = BLOCKS[capability]
        block = warps * 32 * reads * 16 // BYTES[fmt]
        names, grid = ("gate", "up") if self.paired else ("gate",), self.grid(problem)
        arguments = (
            *(Argument(name=n, type=pointer(fmt), binds=f"input:{i}", aligned=True) for i, n in enumerate(names)),
            *grid,
            Argument(name="y", type=pointer(str(problem.get("stored", fmt))), binds="output:0", aligned=True),
            # A multiple of 16, as its last axis is one.
            Argument(name="n", type="i32", binds="n", aligned=True),
        )  # fmt: skip
        given = [a.name for a in arguments]
        return Program(
            function="optkit.kernels.triton.device.gated:gated",
            arguments=arguments,
            constants={
                **{n: None for n in ("up", "step", "zero") if n not in given},
                "BLOCK": block, "KIND": self.kind, "PAIRED": self.paired, "GRID": bool(grid),
            },
            grid=(f"cdiv(n, {block})", "1", "1"),
            warps=warps,
        )  # fmt: skip

    def grid(self, problem: Problem) -> tuple[Argument, ...]:
        """Step and zero point of the grid that the result is put onto; nothing where it stays a float."""
        return ()

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"n": "elements(0)"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[0]]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        return [(rows, int(problem["columns"]))] * (1 + self.paired)

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        block = int(self.program(problem, capability).constants["BLOCK"] or 1) // int(problem["columns"])
        return tuple(sorted({1, block - 1, block, block + 1}))

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        return draw(self.shapes(problem, rows), str(problem["format"]), seed)

    def allowed(self, problem: Problem) -> float:
        # Halves are rounded once; float32 also has the rounding of exp or erf and four products.
        return {"fp16": 0.51, "bf16": 0.51, "fp32": 4.0}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        gate, *up = (a.astype(np.float64) for a in inputs if a is not None)
        return [math.prod(up, start=activated(self.kind, gate))]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        n = shapes[0][0] * shapes[0][1]
        return 8.0 * n, (2.0 + self.paired) * n * BYTES[str(problem["format"])]

    def _check(self, root: ir.Node, gate: ir.Value, up: ir.Value) -> Match:
        match, columns = Match(), columns_of(gate)
        if format_of(gate) not in self.formats or up.dtype != gate.dtype:
            return match.fail("not known to be float32, float16 or bfloat16", gate)
        if gate.shape is None or shape_of(gate) != shape_of(up):
            return match.fail("gate and value are not known to have one shape", up)
        if columns is None or columns % _STEP:
            return match.fail(f"the last axis is no fixed multiple of {_STEP}", gate)
        if self.kind == "gelu" and any(
            attribute(p, "approximate", "none") != "none"
            for v in root.inputs
            if v is not None and (p := v.producer()) is not None and p.op_type == "Gelu"
        ):
            return match.fail("Gelu by tanh", root)
        return match

    def _rewrite(self, op: Any, root: ir.Node, gate: ir.Value, up: ir.Value) -> Any:
        (y,) = op.node(self.op, [gate, up], domain=DOMAIN)
        y.type, y.shape = gate.type, gate.shape
        return y

    def rules(self) -> Sequence[Rule]:
        return [Rule(_silu if self.kind == "silu" else _gelu, self._rewrite, self._check, name=self.name)]


def activated(kind: str, x: np.ndarray) -> np.ndarray:
    """The activation of float64 values."""
    if kind == "silu":
        return np.asarray(x / (1 + np.exp(-x)))
    if kind == "gelu":
        return np.asarray(0.5 * x * (1 + _erf(x / np.sqrt(2))))
    return np.maximum(x, 0) if kind == "relu" else x


def _erf(x: np.ndarray) -> np.ndarray:
    # The standard library has it for numbers alone.

    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x))


def _silu(op: Any, gate: Any, up: Any) -> Any:
    return op.any(
        op.Mul(op.Mul(gate, op.Sigmoid(gate)), up),
        op.Mul(gate, op.Mul(op.Sigmoid(gate), up)),
        op.Mul(op.Sigmoid(gate), op.Mul(gate, up)),
    )


def _gelu(op: Any, gate: Any, up: Any) -> Any:
    return op.Mul(op.Gelu(gate), up)


_HEAD = '<domain: "optkit", opset_import: ["" : %%d]> %s (gate, up) => (y) { %s y = Mul (a, up) }'


class SwiGlu(_Gated):
    """``y = gate * sigmoid(gate) * up``.

    Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202, eq. 6, without its products. All in float32.
    """

    name, op, kind = "swiglu", "SwiGlu", "silu"
    size: ClassVar[int] = 3
    source: ClassVar[str] = "arXiv:2002.05202"
    body: ClassVar[str] = _HEAD % (op, "s = Sigmoid (gate) a = Mul (gate, s)")


class GeGlu(_Gated):
    """``y = gelu(gate) * up``, with the exact Gelu.

    Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202, eq. 6, without its products. All in float32.
    """

    name, op, kind = "geglu", "GeGlu", "gelu"
    size: ClassVar[int] = 2
    source: ClassVar[str] = "arXiv:2002.05202"
    body: ClassVar[str] = _HEAD % (op, "a = Gelu (gate)")
