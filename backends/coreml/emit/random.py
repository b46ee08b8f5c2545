"""Random numbers. Core ML draws others than ONNX Runtime does, from the same distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import Context, cast, emits, is_float, name_of
from optkit.backends.coreml.quiet import mb
from optkit.graph import attribute, ints

_HALF = ir.DataType.FLOAT16


def _refuse(node: ir.Node) -> str | None:
    kind = node.attributes.get_int("dtype", int(ir.DataType.FLOAT))
    known = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    return None if kind in known else f"random numbers of type {ir.DataType(kind).name.lower()}"


def _seed(node: ir.Node) -> dict[str, Any]:
    """Of ONNX it is a float; without one the numbers are others in each run."""
    given = attribute(node, "seed")
    return {} if given is None else {"seed": np.int32(int(given) & 0x7FFFFFFF)}  # type: ignore[call-overload]


def _drawn(node: ir.Node, shape: Any, kind: str) -> Any:
    of = np.float16 if kind == "fp16" else np.float32
    if node.op_type.startswith("RandomNormal"):
        mean, scale = of(node.attributes.get_float("mean", 0.0)), of(node.attributes.get_float("scale", 1.0))
        return mb.random_normal(shape=shape, mean=mean, stddev=scale, **_seed(node))
    low, high = of(node.attributes.get_float("low", 0.0)), of(node.attributes.get_float("high", 1.0))
    return mb.random_uniform(shape=shape, low=low, high=high, **_seed(node))


def _kind(node: ir.Node, otherwise: str) -> str:
    asked = attribute(node, "dtype")
    return otherwise if asked is None else "fp16" if asked == int(_HALF) else "fp32"


@emits("RandomNormalLike", "RandomUniformLike", refuse=_refuse)
def _like(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    kind = _kind(node, name_of(x) if is_float(x) else "fp32")
    return cast(_drawn(node, c.shape(c.sizes(x)), kind), kind)


@emits("RandomNormal", "RandomUniform", refuse=_refuse)
def _of_shape(c: Context, node: ir.Node) -> Any:
    kind = _kind(node, "fp32")
    return cast(_drawn(node, np.asarray(ints(node, "shape", []), np.int32), kind), kind)
