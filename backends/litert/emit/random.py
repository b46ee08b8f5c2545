"""Random numbers. LiteRT draws others than ONNX Runtime does, from the same distributions."""

from __future__ import annotations

import onnx_ir as ir

from optkit.backends.litert.emit.base import Context, emits, size
from optkit.graph import attribute

# Above any seed of 32 bits: one of 0 and 0 means other numbers in each run.
_SECOND = 1 << 32


@emits("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
def _drawn(c: Context, node: ir.Node) -> None:
    """From the standard distribution, scaled and moved."""
    normal, given = node.op_type.startswith("RandomNormal"), attribute(node, "seed")
    if normal:
        code, start = "RANDOM_STANDARD_NORMAL", node.attributes.get_float("mean", 0.0)
        factor = node.attributes.get_float("scale", 1.0)
    else:
        code, start = "RANDOM_UNIFORM", node.attributes.get_float("low", 0.0)
        factor = node.attributes.get_float("high", 1.0) - start
    seeds = {} if given is None else {"seed": int(given) & 0x7FFFFFFF, "seed2": _SECOND}  # type: ignore[call-overload]
    shape = size(node.outputs[0])
    x = c.op(code, [c.vector(shape)], shape, "float32", ("RandomOptions", seeds))
    for operator, value in (("MUL", factor), ("ADD", start)):
        if value != (operator == "MUL"):
            x = c.op(operator, [x, c.number(value)], shape, settings=(f"{operator.title()}Options", {}))
    c.put(node.outputs[0], x)
