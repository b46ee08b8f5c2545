"""A graph for inputs of fixed shapes with the sizes of all its values: inferred, folded, and at last as a run has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from optkit.cost import folded
from optkit.data import draw
from optkit.errors import OptkitError, UsageError
from optkit.graph import describe, elements, initializer, walk
from optkit.inference import at_shapes, infer
from optkit.microscaling import is_call
from optkit.passes import PASSES
from optkit.passes.base import Context
from optkit.pipeline import run_passes
from optkit.reference import ReferenceSession
from optkit.targets import target

CALL = "optkit.call"
"""Key of the metadata of nodes that were the body of a function: operator and name of its call."""


def sized(
    model: ir.Model, shapes: Mapping[str, tuple[int, ...]], *, run: bool = False
) -> tuple[ir.Model, tuple[str, ...]]:
    """A copy of ``model`` for inputs of ``shapes``, functions taken apart, and what was assumed on the way.

    Args:
        run: Take what cannot be inferred, branches and sizes that depend on data, from a run on one drawn input.

    Raises:
        UsageError: A size is not known even so.
    """
    fixed, notes = at_shapes(_inlined(model), shapes), list[str]()
    while run and (branch := next((n for n in fixed.graph if n.op_type == "If" and n.domain == ""), None)):
        fixed, note = _decided(fixed, branch)
        notes.append(note)
    if _unknown(fixed):
        fixed = _folded(fixed)
    if run and (unknown := _unknown(fixed)):
        _observed(fixed, unknown)
        notes.append(f"sizes of {_listed(unknown)} are those of one input drawn at random")
    if unknown := _unknown(fixed):
        raise _refused(unknown[0], "it depends on data")
    return fixed, tuple(notes)


def _folded(model: ir.Model) -> ir.Model:
    model = folded(model)
    infer(model)
    return model


def _inlined(model: ir.Model) -> ir.Model:
    if not model.functions:
        return model
    model = model.clone()
    for number, node in enumerate(walk(model)):
        if node.op_identifier() in model.functions:
            node.metadata_props[CALL] = f"{node.op_type} {node.name or number}"
    names = {node.op_identifier() for node in walk(model) if is_call(node)}
    InlinePass(criteria=lambda function: function.identifier() not in names)(model)
    return model


def _unknown(model: ir.Model) -> list[ir.Value]:
    return [
        value
        for node in walk(model)
        for value in node.outputs
        if (value.uses() or value.is_graph_output())
        and (value.dtype is None or elements(value.shape) is None)
    ]


def _decided(model: ir.Model, branch: ir.Node) -> tuple[ir.Model, str]:
    """The graph with the branch that a run takes; with the other where that one does not run at these shapes."""
    condition = branch.inputs[0]
    assert condition is not None
    drawn, index = bool(np.all(_run(model, [condition])[0])), list(model.graph).index(branch)
    for taken in (drawn, not drawn):
        copy = model.clone()
        known = initializer(copy.graph, f"{condition.name}/taken", np.asarray(taken))
        copy.graph[index].replace_input_with(0, known)
        copy = _folded(copy)
        why = (
            "as for an input drawn at random"
            if taken == drawn
            else "as the other does not run at these shapes"
        )
        try:
            _run(copy, copy.graph.outputs)
        except UsageError as error:
            refused = error
        else:
            return copy, f"{describe(branch)} takes its {'then' if taken else 'else'} branch, {why}"
    raise refused


def _observed(model: ir.Model, values: Sequence[ir.Value]) -> None:
    """Give ``values`` the types and shapes that they have in a run."""
    own = [v for v in values if (node := v.producer()) is not None and node.graph is model.graph]
    for value, array in zip(own, _run(model, own), strict=True):
        value.shape = ir.Shape(array.shape)
        value.type = value.type or ir.TensorType(ir.DataType.from_numpy(array.dtype))


def _run(model: ir.Model, values: Sequence[ir.Value]) -> list[np.ndarray]:
    copy = model.clone()
    found = {v.name: v for node in copy.graph for v in node.outputs} | {v.name: v for v in copy.graph.inputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(found[v.name] for v in values)
    run_passes(
        copy, [PASSES["remove-dead"]()], Context(target=target("cpu"))
    )  # ONNX Runtime runs what nobody reads too
    # It would not load a graph with a branch that does not go with these sizes.
    for value in (v for node in walk(copy) for v in node.outputs):
        value.shape = None
    for value in copy.graph.inputs:
        value.shape = None if value.shape is None else ir.Shape([None] * len(value.shape))
    try:
        session = ReferenceSession(copy)
        try:
            results = session.run(draw(model, np.random.default_rng(0)))
        finally:
            session.close()
    except OptkitError as error:
        raise _refused(values[0], str(error)) from error
    return [results[str(v.name)] for v in values]


def _refused(value: ir.Value, why: str) -> UsageError:
    node = value.producer()
    place = "" if node is None else f" at {describe(node)}"
    return UsageError(f"the size of {value.name}{place} is not known: {why}")


def _listed(values: Sequence[ir.Value], most: int = 3) -> str:
    names = [str(v.name) for v in values[:most]]
    return ", ".join(names) + (f" and {len(values) - most} more" if len(values) > most else "")
