"""Activations onto grids of 8 bits whose steps follow from the numbers themselves, a step for each block of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, scalar
from optkit.kernels.base import (
    BYTES,
    DOMAIN,
    TYPES,
    Argument,
    Kernel,
    Problem,
    Program,
    columns_of,
    format_of,
    pointer,
    power_of_two,
)
from optkit.kernels.triton.drawing import DTYPES, draw
from optkit.kernels.triton.norm import BLOCKS, fits
from optkit.rewrite import Match, Rule, substitute
from optkit.targets.gpu import Capability

MOST = {"int8": 127.0, "fp8": 448.0}
LEAST = 1e-30
"""No step is smaller: blocks of zeros have one too."""


class _Blocks(Kernel):
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")

    def problem(self, node: ir.Node) -> Problem | str:
        fmt, columns, block = format_of(node.inputs[0]), columns_of(node.inputs[0]), attribute(node, "block")
        stored = next((name for name, kind in TYPES.items() if int(kind) == attribute(node, "to")), None)
        if fmt is None or fmt not in self.formats or stored not in MOST:
            return f"no formats of {self.name}"
        if columns is None or not isinstance(block, int) or columns % block:
            return f"the last axis is no fixed multiple of {block}"
        return fits(block) or {"format": fmt, "columns": block, "stored": stored}

    def program(self, problem: Problem, capability: Capability) -> Program:
        fmt, stored, columns = str(problem["format"]), str(problem["stored"]), int(problem["columns"])
        elements, most = BLOCKS[capability]
        block = power_of_two(columns)
        rows = max(1, elements // block)
        kinds = (("x", fmt, "input:0"), ("q", stored, "output:0"), ("steps", "fp32", "output:1"))
        return Program(
            function="optkit.kernels.triton.device.quantize:quantize_blocks",
            arguments=(
                *(Argument(name=n, type=pointer(kind), binds=b, aligned=True) for n, kind, b in kinds),
                Argument(name="blocks", type="i32", binds="blocks"),
            ),
            constants={"MOST": MOST[stored], "COLUMNS": columns, "BLOCK": block, "ROWS": rows},
            grid=(f"cdiv(blocks, {rows})", "1", "1"),
            warps=max(1, min(most, rows * block * BYTES[fmt] // (16 * 32))),
        )

    def expressions(self, problem: Problem) -> dict[str, str]:
        return {"blocks": f"elements(0) // {problem['columns']}"}

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shapes[0], (*shapes[0][:-1], shapes[0][-1] // int(problem["columns"]))]

    def output_format(self, problem: Problem, output: int = 0) -> str:
        return "fp32" if output else str(problem["stored"])

    def attributes(self, problem: Problem) -> dict[str, Any]:
        return {"block": int(problem["columns"]), "to": int(TYPES[str(problem["stored"])])}

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        return [(rows, 2 * int(problem["columns"]))]

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        rows = int(self.program(problem, capability).constants["ROWS"] or 1)
        return tuple(sorted({1, max(1, rows // 2 - 1), max(1, rows // 2), rows // 2 + 1}))

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        return draw(self.shapes(problem, rows), str(problem["format"]), seed)

    def allowed(self, problem: Problem) -> float:
        # Steps and quotients are those of float32 on both sides.
        return 0.0

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        (x,) = (a for a in inputs if a is not None)
        stored, columns = str(problem["stored"]), int(problem["columns"])
        parts = x.astype(np.float32).reshape(*x.shape[:-1], -1, columns)
        steps = np.maximum(np.abs(parts).max(-1) / np.float32(MOST[stored]), np.float32(LEAST))
        quotient = (parts / steps[..., None]).reshape(x.shape)
        if stored == "int8":
            return [np.rint(quotient.astype(np.float64)), steps.astype(np.float64)]
        # Rounding may lift the largest beyond the grid.
        return [quotient.clip(-448, 448).astype(DTYPES["fp8"]).astype(np.float64), steps.astype(np.float64)]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        n, columns = shapes[0][0] * shapes[0][1], int(problem["columns"])
        return 6.0 * n, float(n * (BYTES[str(problem["format"])] + 1) + 4 * n // columns)

    def rules(self) -> Sequence[Rule]:
        return [
            Rule(
                lambda op, x, steps: op.QuantizeLinear(x, steps), self._rewrite, self._check, name=self.name
            ),
            Rule(_cast, self._without, self._narrow, name=self.name),
        ]

    def _check(self, root: ir.Node, x: ir.Value, steps: ir.Value) -> Match:
        match, columns, block = Match(), columns_of(x), attribute(root, "block_size", 0)
        if format_of(x) not in self.formats or format_of(steps) != "fp32":
            return match.fail("not known to be float32, float16 or bfloat16", x)
        stored, last = format_of(root.outputs[0]), -1 if x.shape is None else len(x.shape) - 1
        if stored not in MOST or attribute(root, "axis", 1) not in (-1, last):
            return match.fail("not to int8 or e4m3 along the last axis", root)
        if columns is None or not isinstance(block, int) or not block or columns % block:
            return match.fail("no blocks that divide the last axis", x)
        if why := fits(block) or _miss(x, steps, block, MOST[stored]):
            return match.fail(why, steps)
        return match

    def _rewrite(self, op: Any, root: ir.Node, x: ir.Value, steps: ir.Value) -> Any:
        kind = root.outputs[0].dtype
        assert kind is not None
        attributes = {"block": root.attributes.get_int("block_size", 0), "to": int(kind)}
        return self._call(op, x, attributes, root.outputs[0], steps)

    def _narrow(self, root: ir.Node, x: ir.Value) -> Match:
        found = format_of(x) in self.formats
        return Match() if found else Match().fail("not known to be float32, float16 or bfloat16", x)

    def _without(self, op: Any, root: ir.Node, x: ir.Value) -> Any:
        attributes = {k: attribute(root, k) for k in ("block", "to")}
        return self._call(op, x, attributes, *root.outputs)

    def _call(self, op: Any, x: ir.Value, attributes: dict[str, Any], old: ir.Value, steps: ir.Value) -> Any:
        q, s = op.node(self.op, [x], attributes, domain=DOMAIN, outputs=2)
        q.type, q.shape = old.type, old.shape
        s.type, s.shape = steps.type, steps.shape
        substitute(steps, s)
        return q


def _miss(x: ir.Value, steps: ir.Value, block: int, most: float) -> str | None:
    """Why ``steps`` are not the largest of each block of ``x`` over ``most``; None where they are."""
    found: ir.Value | None = steps
    for op_type, operand in (
        ("Max", LEAST),
        ("Div", most),
        ("ReduceMax", -1),
        ("Abs", None),
        ("Reshape", None),
    ):
        node = None if found is None else found.producer()
        if node is None or node.op_type != op_type:
            return f"steps that are no {op_type} of what is quantized"
        if operand is not None and (
            (known := scalar(node.inputs[1])) is None or not np.isclose(known, operand, 1e-5, 0)
        ):
            return f"{op_type} has another operand"
        if op_type == "ReduceMax" and attribute(node, "keepdims", 1):
            return "a step for each block has an axis of its own"
        found = node.inputs[0]
        blocks = columns_of(node.outputs[0])
    return None if found is x and blocks == block else "steps of other numbers, or of other blocks"


def _cast(op: Any, x: Any) -> Any:
    return op.of(DOMAIN, "QuantizeBlocks")(op.Cast(x))


class QuantizeBlocks(_Blocks):
    """``q`` in int8 or e4m3 and ``steps``, one for each ``block`` numbers of a row: their largest over the largest of the format.

    DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, arXiv:2412.19437, section 3.3.2: activations are scaled while the model
    runs, 128 numbers of a token together. Rounding as in ``quantize``.
    """

    name, op = "quantize-blocks", "QuantizeBlocks"
    size: ClassVar[int] = 2
    source: ClassVar[str] = "arXiv:2412.19437, ONNX QuantizeLinear"
    examples: ClassVar[tuple[Problem, ...]] = ({"format": "fp16", "columns": 128, "stored": "fp8"},)
    small: ClassVar[tuple[Problem, ...]] = tuple(
        {"format": f, "columns": c, "stored": s}
        for f, c, s in (("fp16", 128, "fp8"), ("bf16", 48, "int8"), ("fp32", 128, "int8"))
    )
    body: ClassVar[str] = (
        f'<domain: "{DOMAIN}", opset_import: ["" : %d]> {op} <block, to> (x) => (q, steps) {{ '
        "f = Cast <to = 1> (x) size = Constant <value_int: int = @block> () first = Constant <value_ints = [0]> () "
        "rest = Constant <value_ints = [-1]> () sizes = Unsqueeze (size, first) form = Concat <axis = 0> (rest, sizes) "
        "parts = Reshape (f, form) a = Abs (parts) m = ReduceMax (a, rest) o = Constant <value = int8 {0}> () "
        "zero = Cast <to: int = @to> (o) one = Constant <value_float = 1.0> () huge = Constant <value_float = 1000.0> () "
        "edge = QuantizeLinear (huge, one, zero) most = Cast <to = 1> (edge) d = Div (m, most) "
        "least = Constant <value_float = 1e-30> () s = Max (d, least) n = Div (parts, s) shape = Shape (x) "
        "wide = Reshape (n, shape) q = QuantizeLinear (wide, one, zero) head = Shape <end = -1> (x) "
        "outer = Concat <axis = 0> (head, rest) steps = Reshape (s, outer) }"
    )
