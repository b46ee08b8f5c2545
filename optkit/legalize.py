"""Make a graph fit a backend, or say for every node why it can't be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from optkit.decompositions import RULES
from optkit.errors import ModelError, UnsupportedOpError
from optkit.frontend import load
from optkit.functions import NotDefinedError, alone, number, put, written_out
from optkit.graph import OPSET, describe, subgraphs, walk
from optkit.inference import infer
from optkit.passes import PASSES
from optkit.passes.base import Context
from optkit.passes.cleanup.constants import known_tensor
from optkit.pipeline import run_passes
from optkit.rewrite import Builder, Names, remove, substitute

if TYPE_CHECKING:
    from optkit.backends.base import Backend
    from optkit.targets import Target

# What chooses scales in each run.
_CHOOSING = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
_FOUR = (ir.DataType.INT4, ir.DataType.UINT4)
# Fusions are left out: they would make the node again that was written out.
_SIMPLER = (
    "lift-constants", "remove-noops", "fold-constants", "fold-shapes", "clean-casts", "remove-noops", "remove-dead",
)  # fmt: skip


def legalize(model: ir.Model, backend: Backend, target: Target, *, name: str) -> None:
    """Write out what ``backend`` can't run in terms of what it can, and check that every node is such.

    A node that it can't run is replaced by what defines its operator: a rule of ``optkit.decompositions``, or the function
    that ONNX has for it, in as many steps as it takes. Where the backend says so, passes replace more than a node: integer products with
    scales of each run by ``dynamic-to-float``, float16 and float64 by float32 by ``widen-halves`` and ``narrow-doubles``, and products with
    weights in 4 bits that have zero points by ``split-zero-points``.

    Raises:
        UnsupportedOpError: Lists all nodes that cannot be written out so, with the reason for each; the graph is as it was.
    """
    problems: list[tuple[ir.Node, str]] = []
    if passes := tuple(_wanted(model, backend)):
        # On a copy first, since a graph that is refused stays as it is.
        copy = model.clone()
        _run(passes, copy, target)
        problems = _fit(copy, backend, target)
        if not problems:
            _run(passes, model, target)
    if not problems:
        problems = _fit(model, backend, target)
    if problems:
        raise UnsupportedOpError(
            f"{name} on {backend.name} for {target.name}",
            [(describe(node), reason) for node, reason in problems],
            hint="change these nodes in the model, or choose another --backend or --precision",
        )


def _wanted(model: ir.Model, backend: Backend) -> Iterator[str]:
    """The passes that write out what ``model`` has and ``backend`` wants written out."""
    if backend.dynamic_in_floats and any(n.op_type in _CHOOSING for n in walk(model)):
        yield "dynamic-to-float"
    if backend.halves_in_floats and any(
        o.dtype == ir.DataType.FLOAT16 for n in walk(model) for o in n.outputs
    ):
        yield "widen-halves"
    if backend.doubles_in_floats and has_doubles(model):
        yield "narrow-doubles"
    if backend.zero_points_apart and any(_has_zero_points(n) for n in walk(model)):
        yield "split-zero-points"


def has_doubles(model: ir.Model) -> bool:
    """Whether it computes in float64, and neither takes nor gives it: that would take the type itself."""
    ports = any(v.dtype == ir.DataType.DOUBLE for v in (*model.graph.inputs, *model.graph.outputs))
    return not ports and any(o.dtype == ir.DataType.DOUBLE for n in walk(model) for o in n.outputs)


def _has_zero_points(node: ir.Node) -> bool:
    """Whether it dequantizes 4 bits that may not stand around 0."""
    kind = node.inputs[0].dtype if node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None
    return kind in _FOUR and (kind == ir.DataType.UINT4 or len(node.inputs) > 2)


def _run(passes: Sequence[str], model: ir.Model, target: Target) -> None:
    """With constants folded."""
    run_passes(model, [PASSES[name]() for name in (*passes, *_SIMPLER)], Context(target=target))


def _fit(
    model: ir.Model, backend: Backend, target: Target, above: frozenset[str] = frozenset()
) -> list[tuple[ir.Node, str]]:
    """Replace all nodes that ``backend`` can't run, or none and say why.

    Args:
        above: Operators that ``model`` is part of the definition of: none is defined by itself.
    """
    problems: list[tuple[ir.Node, str]] = []
    written: list[tuple[ir.Node, ir.Model]] = []
    for node in walk(model):
        reason = backend.unsupported(node, target)
        if reason is None:
            continue
        inner: list[tuple[ir.Node, str]] = []
        for body in _definitions(node, target) if node.op_type not in above else ():
            found = _fit(body, backend, target, above | {node.op_type})
            if not found:
                written.append((node, body))
                break
            inner = found
        else:
            if node.op_type not in above and backend.settles(node):
                continue
            why = (
                f"; written out it needs {inner[0][0].op_type}: {_named(inner[0][1], node)}" if inner else ""
            )
            problems.append((node, reason + why))
    if written and not problems:
        names = Names(model)
        for node, body in written:
            put(node, body.graph, names.new)
        infer(model)
    return problems


def _named(reason: str, node: ir.Node) -> str:
    """With the names that the inputs and outputs of a definition have at ``node``."""

    def name(found: re.Match[str]) -> str:
        value = (node.inputs if found[1] == "i" else node.outputs)[int(found[2])]
        return found[0] if value is None else repr(value.name)

    return re.sub(r"'([io])(\d+)'", name, reason)


def _definitions(node: ir.Node, target: Target) -> Iterator[ir.Model]:
    """Models that compute what ``node`` does, ours first, with inputs and outputs as of ``alone``."""
    if node.domain != "" or any(True for _ in subgraphs(node)):
        return
    for rule in RULES.get(node.op_type, ()):
        model = _model(node, alone(node, OPSET))
        if model is None:
            return
        (inner,) = model.graph
        result = rule(Builder(inner, Names(model)), inner)
        if result is not None:
            substitute(inner.outputs[0], result)
            remove(inner)
            yield _simplified(model, target)
    schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    versions = (*schema.function_opset_versions, *schema.context_dependent_function_opset_versions)  # type: ignore[attr-defined]
    version = max((v for v in versions if v <= OPSET), default=None)
    if version is not None:
        try:
            model = _model(node, written_out(alone(node, version)))
        except NotDefinedError:
            return
        if model is not None:
            yield _simplified(model, target)


def _model(node: ir.Node, proto: onnx.ModelProto) -> ir.Model | None:
    """In the form that passes rely on, with the constants of ``node``; None where it cannot be brought there."""
    try:
        model = load(ir.from_proto(proto), check=False)
    except ModelError:
        return None
    for value in tuple(model.graph.inputs):
        tensor = known_tensor(node.inputs[number(value)])
        if tensor is not None:
            model.graph.inputs.remove(value)
            value.const_value = tensor
            model.graph.register_initializer(value)
    return model


def _simplified(model: ir.Model, target: Target) -> ir.Model:
    _run((), model, target)
    return model
