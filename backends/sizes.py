"""The sizes that inputs may have, and the graph once they have them: what depends on sizes alone is a constant then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from pydantic import Field

from optkit.errors import ModelError, UsageError
from optkit.graph import RANDOM, subgraphs
from optkit.inference import at_shapes, infer
from optkit.reference import ReferenceSession, with_outputs
from optkit.rewrite import Names, register, remove_unused, substitute

# Of integers on a grid nothing is computed before; what is random is never.
_KEPT = RANDOM | {"Constant", "QuantizeLinear", "DequantizeLinear"}


Count = Annotated[int, Field(ge=1)]


def spelling(value: Any) -> str:
    """Which form of an option about sizes is meant, so that what is wrong with it is said of that form."""
    return "sizes" if isinstance(value, list | tuple) else "size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Sizes of the free axes, and the name that the file has for them."""

    key: str
    sizes: Mapping[str, int]


def inputs(model: ir.Model) -> list[ir.Value]:
    """What a caller gives."""
    return [v for v in model.graph.inputs if not v.is_initializer()]


def keys(value: ir.Value) -> list[str | int]:
    """Sizes of an input, and names of those that are free; one without a name is ``<input>.<axis>``."""
    if value.shape is None:
        raise ModelError(f"the rank of the input {value.name!r} is not known, and it has to be")
    return [
        d if isinstance(d, int) else (d.value or f"{value.name}.{axis}") for axis, d in enumerate(value.shape)
    ]


def signatures(
    model: ir.Model,
    wanted: Mapping[str, int | tuple[int, ...]],
    usual: Mapping[str, tuple[int, ...]],
    *,
    partial: bool = False,
) -> list[Signature]:
    """Sizes for all free axes.

    Args:
        wanted: By axis, its size or a list of sizes.
        usual: Shapes of inputs, for axes that are not wanted otherwise; a first axis without either is 1.
        partial: Leave out what is not known, in place of an error.

    Raises:
        ModelError: The rank of an input is not known.
        UsageError: A name is none of an axis, lists do not belong together, or an axis has no size.
    """
    free: dict[str, None] = {}
    known: dict[str, int] = {}
    for value in inputs(model):
        shape = usual.get(str(value.name))
        for axis, key in enumerate(keys(value)):
            if not isinstance(key, str):
                continue
            free[key] = None
            if shape is not None and len(shape) > axis:
                known.setdefault(key, shape[axis])
            elif axis == 0:
                known.setdefault(key, 1)
    if unknown := [name for name in wanted if name not in free]:
        raise UsageError(
            f"options.shapes.{unknown[0]}: no free axis has this name",
            hint=f"free axes: {', '.join(free) or 'none: every axis has its size'}",
        )
    listed = {k: v for k, v in wanted.items() if isinstance(v, tuple)}
    if len({len(v) for v in listed.values()}) > 1:
        counts = ", ".join(f"{k}: {len(v)}" for k, v in listed.items())
        raise UsageError(f"options.shapes: lists of sizes must be as long as one another ({counts})")
    known |= {k: v for k, v in wanted.items() if isinstance(v, int)}
    if not partial and (rest := [k for k in free if k not in known and k not in listed]):
        example = ", ".join(f"{name}: 128" for name in rest)
        raise UsageError(
            f"every axis needs a size, and {', '.join(rest)} may have any",
            hint=f"--set 'options.shapes={{{example}}}', a list of sizes for several signatures, or calibration data that are alike",
        )
    count = len(next(iter(listed.values()))) if listed else 1
    return [
        Signature(
            key="serving_default" if i == 0 else f"sizes_{i}",
            sizes=known | {k: v[i] for k, v in listed.items()},
        )
        for i in range(count)
    ]


def fixed(model: ir.Model, sizes: Mapping[str, int]) -> ir.Model:
    """A copy for inputs of these sizes alone."""
    model = model.clone()
    if model.functions:
        InlinePass()(model)
    shapes = {
        str(v.name): tuple(sizes[k] if isinstance(k, str) else k for k in keys(v)) for v in inputs(model)
    }
    model = at_shapes(model, shapes)
    # What is constant by now may be a size that others follow from.
    while _settle(model):
        model = at_shapes(model, shapes)
    return model


def _settle(model: ir.Model) -> bool:
    """Make constants of what depends on sizes and constants alone; ONNX Runtime computes them."""
    known, names = infer(model), Names(model)
    settled = {v for v in model.graph.initializers.values() if not v.is_graph_input()}
    found: dict[ir.Value, np.ndarray | None] = {}
    for node in model.graph:
        if node.op_type in _KEPT or any(True for _ in subgraphs(node)):
            continue
        values = [v for v in node.inputs if v is not None]
        elements = known.get(node.outputs[0])
        if elements is not None and all(isinstance(e, int) for e in elements.flat):
            assert node.outputs[0].dtype is not None
            found[node.outputs[0]] = elements.astype(node.outputs[0].dtype.numpy())
        elif all(v in settled for v in values):
            found |= dict.fromkeys(node.outputs)
        else:
            continue
        settled.update(node.outputs)
    read = {
        v: a
        for v, a in found.items()
        if not v.is_graph_output() and any(u.node.outputs[0] not in found for u in v.uses())
    }
    missing = [str(v.name) for v, array in read.items() if array is None]
    if missing:
        session = ReferenceSession(with_outputs(model, missing))
        # They do not depend on what comes in.
        empty = {str(v.name): np.zeros(v.shape.numpy(), v.dtype.numpy()) for v in inputs(model)}  # type: ignore[union-attr]
        computed = session.run(empty)
        session.close()
    for value, array in read.items():
        settled_array = computed[str(value.name)] if array is None else array
        substitute(value, register(model.graph, names.new(f"{value.name}/settled"), settled_array))
    remove_unused(n for n in tuple(model.graph) if n.outputs[0] in found)
    return bool(read)
