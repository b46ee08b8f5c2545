"""A module in training becomes a graph: while passes look at it, and for good once it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from optkit.errors import ModelError, PassError
from optkit.exporting.export import export
from optkit.exporting.exported import Exported
from optkit.frontend import proved, read
from optkit.graph import walk
from optkit.ops import spec
from optkit.reference import ReferenceSession

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.passes.base import Batch

Dynamic = Sequence[str] | Mapping[str, Any] | None

# Weights are known to passes by the names that they have in the module.
_WRAPPER = "module."


def axes_of(batch: Batch) -> Dynamic:
    """The first axis, as ``batch``, where all inputs share it and the example shows that it is one."""
    given = batch.values() if isinstance(batch, Mapping) else batch
    sizes = {x.shape[0] for x in given if isinstance(x, torch.Tensor) and x.ndim}
    return ("batch",) if len(sizes) == 1 and sizes != {1} else None


def draft(module: torch.nn.Module, batch: Batch, dynamic: Dynamic) -> ir.Model:
    """The module as torch writes it, weights named as in the module; not compared with anything yet.

    Raises:
        ModelError: It cannot be traced; names the line.
    """
    return _named(_exported(module, batch, dynamic))


def loaded(model: ir.Model) -> ir.Model:
    """A draft in the form that passes over graphs rely on; it is what is trained in the end that is compared (``final``)."""
    try:
        return read(model, check=False).model
    except ModelError as error:
        raise PassError(f"the exported module is not usable: {error}", hint=error.hint) from error


def final(module: torch.nn.Module, batch: Batch, dynamic: Dynamic) -> ir.Model:
    """The trained module as a graph that was compared with it.

    A graph of floats is proved as any other (``optkit.exporting.proof``). In one with rounding, sums of floats in another
    order fall on the other side of a tie now and then, so that outputs may differ by a step: of the grid that they lie on
    themselves, else of 255 over their range.

    Raises:
        ModelError: It cannot be traced, or computes something else than the module.
    """
    exported = _exported(module, batch, dynamic)
    if not any(node.op_type == "DequantizeLinear" for node in walk(exported.model)):
        return proved(exported).model
    model = read(exported.model).model
    session = ReferenceSession(model, optimize=False)
    try:
        found = session.run(exported.feeds(exported.tensors))
    finally:
        session.close()
    grids = {str(v.name): _grid(v) for v in model.graph.outputs}
    for name, expected in exported.eager(exported.tensors).items():
        if not np.issubdtype(expected.dtype, np.floating):
            continue
        # Two floats a step apart differ by it only up to their own rounding.
        step = max(float(np.ptp(expected)) / 255, grids[name] * (1 + 1e-5))
        distance = float(np.abs(found[name] - expected).max(initial=0))
        if not distance <= step:
            raise ModelError(
                f"{exported.name}: output {name!r} of the graph differs from the trained module by {distance:.2g}, more than "
                f"one step of its range ({step:.2g})",
                hint="this is a defect of optkit: please report the module",
            )
    return model


def _grid(value: ir.Value) -> float:
    """The step of the grid that a value lies on, of its own pair or of one before it whose numbers it keeps; 0 where there is none."""
    node = value.producer()
    while node is not None and node.op_type != "DequantizeLinear":
        row = spec(node)
        if row is None or not row.keeps_grid(node) or node.inputs[0] is None:
            return 0.0
        node = node.inputs[0].producer()
    scale = None if node is None or node.inputs[1] is None else node.inputs[1].const_value
    return 0.0 if scale is None else float(scale.numpy().max())


def _exported(module: torch.nn.Module, batch: Batch, dynamic: Dynamic) -> Exported:
    return export(module, batch, dynamic, name=type(module).__name__)


def _named(exported: Exported) -> ir.Model:
    model = exported.model
    taken = {v.name for v in (*model.graph.inputs, *(o for node in model.graph for o in node.outputs))}
    for value in tuple(model.graph.initializers.values()):
        short = str(value.name).removeprefix(_WRAPPER)
        if short not in taken and short not in model.graph.initializers:
            value.name = short
    return model
