"""From the graph to a program of Core ML's intermediate language (MIL)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit import ROWS, Context
from optkit.backends.coreml.emit.base import UnfitError, cast, refused, through_ints
from optkit.backends.coreml.emit.quant import dense, stored_constant
from optkit.backends.coreml.interface import Interface, Port, feature
from optkit.backends.coreml.quiet import ct, mb, mil, types
from optkit.backends.coreml.shapes import Axes
from optkit.errors import ModelError, OptkitError
from optkit.graph import describe, graphs, subgraphs, walk

_TYPES = {"fp32": types.fp32, "fp16": types.fp16, "int32": types.int32}


def build(model: ir.Model, interface: Interface, axes: Axes, version: int) -> tuple[Any, list[Any]]:
    """The program, and the types of its inputs as the converter wants them.

    Args:
        version: Major version of the oldest iOS.

    Raises:
        ModelError: A node turns out not to fit while it is emitted; names it.
    """
    symbols = {k: mil.get_new_symbol() for k in axes.listed}
    ranges = {
        k: ct.RangeDim(lower_bound=r.min, default=r.usual, upper_bound=r.max) for k, r in axes.ranged.items()
    }
    symbols |= {k: r.symbol for k, r in ranges.items()}
    specs, features = {}, []
    for port in interface.inputs:
        shape = [symbols.get(k, k) if isinstance(k, str) else k for k in port.shape or ()] or [1]
        kind = _TYPES[port.stored]
        if port.state:
            specs[port.feature] = mb.StateTensorSpec(shape=tuple(shape), dtype=types.fp16)
            continue
        specs[port.feature] = mb.TensorSpec(shape=tuple(shape), dtype=kind)
        features.append(_feature(port, axes, ranges))
    program = mil.Program()
    with mil.Function(specs, opset_version=getattr(ct.target, f"iOS{version}")) as function:
        context = Context(version=version, unpack=dense, body=_body)
        context.names.update(p.feature for p in (*interface.inputs, *interface.outputs))
        _note_quantized(context, model)
        _read_inputs(context, model, interface, function)
        results = dict(zip([p.name for p in interface.outputs], _body(context, model.graph), strict=True))
        outputs = []
        for port in interface.outputs:
            if port.state:
                value = cast(results[port.name], "fp16")
                mb.coreml_update_state(state=function.inputs[port.feature], value=value)
            else:
                outputs.append(_output(results[port.name], port))
        function.set_outputs(outputs)
    program.add_function("main", function)
    return program, features


def _feature(port: Port, axes: Axes, ranges: Mapping[str, Any]) -> Any:
    shape = port.shape or (1,)
    count = max([len(axes.listed[k]) for k in shape if isinstance(k, str) and k in axes.listed], default=0)
    if count:
        sizes = [[axes.listed[k][i] if isinstance(k, str) else k for k in shape] for i in range(count)]
        unique = list(dict.fromkeys(map(tuple, sizes)))
        found: Any = ct.EnumeratedShapes(shapes=unique) if len(unique) > 1 else ct.Shape(unique[0])
    else:
        found = ct.Shape([ranges[k] if isinstance(k, str) else k for k in shape])
    if port.picture is not None:
        color = {"RGB": ct.colorlayout.RGB, "BGR": ct.colorlayout.BGR, "G": ct.colorlayout.GRAYSCALE}
        bias = [float(b) for b in port.picture.biases.reshape(-1)]
        return ct.ImageType(
            name=port.feature, shape=found, scale=port.picture.scale, bias=bias if len(bias) > 1 else bias[0],
            color_layout=color[port.picture.color],
        )  # fmt: skip
    return ct.TensorType(name=port.feature, shape=found)


def _note_quantized(context: Context, model: ir.Model) -> None:
    for graph in graphs(model):
        for node in graph:
            if stored_constant(node):
                context.quantized[node.outputs[0]] = node


def _read_inputs(context: Context, model: ir.Model, interface: Interface, function: Any) -> None:
    values = {v.name: v for v in model.graph.inputs}
    for port in interface.inputs:
        variable = function.inputs[port.feature]
        if port.state:
            variable = mb.read_state(input=variable)
            variable = cast(variable, port.stored)
        if port.dtype == "bool":
            variable = mb.not_equal(x=variable, y=np.int32(0))
        if port.scalar:
            variable = through_ints(variable, lambda v: mb.squeeze(x=v, axes=[0]))
        context.variables[values[port.name]] = variable


def _output(variable: Any, port: Port) -> Any:
    variable = cast(variable, port.stored)
    if variable.rank == 0:
        variable = mb.expand_dims(x=variable, axes=[0])
    return mb.identity(x=variable, name=port.feature)


def _body(context: Context, graph: ir.Graph) -> list[Any]:
    """Emit the nodes of a graph; the variables of its outputs.

    Raises:
        UnfitError: Nodes do not fit. What reads their outputs is not looked at.
    """
    problems: list[tuple[str, str]] = []
    hint, missing = None, set[ir.Value | None]()
    for node in graph:
        if node.op_type == "Constant" or node.outputs[0] in context.quantized:
            continue
        if not missing.isdisjoint(_reads(node)):
            missing.update(node.outputs)
            continue
        try:
            _emit(context, node)
        except UnfitError as error:
            problems.extend(error.problems)
            hint = hint or error.hint
            missing.update(node.outputs)
    if problems:
        raise UnfitError(problems, hint=hint)
    return [context[v] for v in graph.outputs]


def _reads(node: ir.Node) -> Iterator[ir.Value | None]:
    """What a node reads, in its bodies too."""
    yield from node.inputs
    for body in subgraphs(node):
        for inner in walk(body):
            yield from inner.inputs
        yield from body.outputs


def _emit(context: Context, node: ir.Node) -> None:
    try:
        found = ROWS[node.op_type].emit(context, node)
    except UnfitError:
        raise
    except OptkitError as error:
        raise refused(node, str(error), hint=error.hint) from error
    except Exception as error:
        # The builder says what does not fit by whatever its checks raise.
        said = f": {error}" if str(error) else ", without saying why"
        raise refused(node, f"coremltools refuses it: {type(error).__name__}{said}") from error
    for value, variable in zip(
        node.outputs, found if isinstance(found, list | tuple) else [found], strict=False
    ):
        if variable is None:
            continue
        _check(node, value, variable)
        context.variables[value] = variable
        if variable.op is not None and variable.op.op_type != "const" and variable not in context.named:
            # So that what Xcode and messages show is what the model says.
            context.named.add(variable)
            variable.name = feature(str(value.name), context.names)


def _check(node: ir.Node, value: ir.Value, variable: Any) -> None:
    """The shape that Core ML infers must be the one that ONNX does, and have elements where it is not folded away."""
    if 0 in variable.shape and (variable.val is None or value.is_graph_output()):
        raise refused(
            node, f"its output is {list(variable.shape)}, and Core ML has no tensors without elements"
        )
    if value.shape is None:
        return
    if variable.rank > 5:
        raise refused(node, f"its output has {variable.rank} axes, and Core ML has at most 5")
    apart = len(value.shape) != variable.rank or any(
        isinstance(a, int) and isinstance(b, int | np.integer) and a != b
        for a, b in zip(value.shape, variable.shape, strict=True)
    )
    if apart:
        raise ModelError(
            f"{describe(node)}: Core ML computes {[str(d) for d in variable.shape]} where ONNX has {value.shape}",
            hint="this is a mistake in optkit: please report it with the model",
        )
