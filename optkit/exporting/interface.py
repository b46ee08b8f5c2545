"""The names that inputs, outputs and free axes of a graph get."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from optkit.errors import ModelError
from optkit.exporting.axes import Axes
from optkit.exporting.signature import Signature


def name_interface(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Inputs and outputs get their names; what has one of them inside is named otherwise.

    An output that is an input, a weight or another output becomes a value of its own.
    """
    graph = model.graph
    if len(graph.inputs) != len(inputs) or len(graph.outputs) != len(outputs):
        raise ModelError(
            f"the exporter wrote {len(graph.inputs)} inputs and {len(graph.outputs)} outputs "
            f"for {len(inputs)} and {len(outputs)} tensors"
        )
    seen: set[ir.Value] = set(graph.inputs) | set(graph.initializers.values())
    for index, value in enumerate(graph.outputs):
        if value in seen:  # an input, a weight or another output handed through
            same = ir.node("Identity", [value], name=f"output_{index}/Identity")
            same.outputs[0].type, same.outputs[0].shape = value.type, value.shape
            graph.append(same)
            graph.outputs[index] = same.outputs[0]
        seen.add(graph.outputs[index])
    wanted = [*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)]
    if doubled := set(inputs) & set(outputs):
        wanted = [(v, f"{n}.out" if v in set(graph.outputs) and n in doubled else n) for v, n in wanted]
    taken = {name for _, name in wanted}
    own = {value for value, _ in wanted}
    for value in (*graph.initializers.values(), *(o for node in graph for o in node.outputs)):
        if value.name in taken and value not in own:
            value.name = f"{value.name}.inner"
    for number, (value, _) in enumerate(wanted):
        value.name = f"optkit.renamed.{number}"
    for value, name in wanted:
        value.name = name


def name_free_axes(model: ir.Model, axes: Axes, names: Sequence[str], *, trusted: bool) -> None:
    """Free axes get the names that were asked for, all through the graph.

    Args:
        trusted: Tracing kept the axes free. Where it did not, it wrote their sizes into shapes, and these are found anew.
    """
    labels: dict[str, str] = {}
    for name, value in zip(names, model.graph.inputs, strict=True):
        if value.shape is None:
            continue
        free = axes.names.get(name, {})
        for axis, label in free.items():
            dim = value.shape[axis]
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value.isidentifier():
                labels.setdefault(dim.value, label)
        value.shape = ir.Shape([free.get(i, d) for i, d in enumerate(value.shape)])
    known = set(model.graph.inputs)

    def renamed(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        words = set(re.findall(r"[A-Za-z_]\w*", dim.value))
        if not words <= set(labels) or any(not labels[w].isidentifier() and dim.value != w for w in words):
            return None
        return re.sub(r"[A-Za-z_]\w*", lambda m: labels[m[0]], dim.value).replace(" ", "")

    for value in dict.fromkeys((*(o for node in model.graph for o in node.outputs), *model.graph.outputs)):
        if value in known or value.shape is None:
            continue
        if trusted:
            value.shape = ir.Shape([renamed(d) for d in value.shape])
        elif axes:
            value.shape = None


def take_bounds(program: Any, axes: Axes, names: Sequence[str]) -> None:
    """What tracing found out about sizes: a table of 512 positions takes no more than 512 tokens."""
    places = [n for n in program.graph.nodes if n.op == "placeholder"][-len(names) :]
    limits = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    for name, node in zip(names, places, strict=True):
        shape: Mapping[int, Any] = dict(enumerate(getattr(node.meta.get("val"), "shape", ())))
        for axis, label in axes.names.get(name, {}).items():
            bounds = limits.get(str(shape.get(axis)))
            if bounds is None or not label.isidentifier():
                continue
            upper = int(bounds.upper) if str(bounds.upper).isdigit() else None
            lower = int(bounds.lower) if str(bounds.lower).isdigit() else 1
            low, high = axes.bounds.get(label, (1, None))
            # Tracing assumes 2 where 1 was never tried; whether 1 works is measured.
            low = max(low, lower if lower > 2 else 1)
            axes.bounds[label] = (low, upper if high is None else min(high, upper or high))


def free_axes(program: Any, signature: Signature) -> tuple[dict[str, dict[int, str]], dict[str, int]]:
    """The axes that a program leaves free: names for each input, and their sizes in the example."""
    places = [n for n in program.graph.nodes if n.op == "placeholder"][-len(signature.names) :]
    free: dict[str, dict[int, str]] = {}
    sizes: dict[str, int] = {}
    labels: dict[str, str] = {}
    for name, node, tensor in zip(signature.names, places, signature.tensors, strict=True):
        for axis, dim in enumerate(getattr(node.meta.get("val"), "shape", ())):
            text = str(dim)
            if text.isdigit():
                continue
            if text.isidentifier() and text not in labels:
                # The first axis of inputs is the batch; others are named by their place, as in ``x_1``.
                labels[text] = (
                    "batch"
                    if axis == 0 and "batch" not in labels.values()
                    else f"{re.sub(r'[^0-9A-Za-z_]+', '_', name)}_{axis}"
                )
                sizes[labels[text]] = tensor.shape[axis]
            label = re.sub(r"[A-Za-z_]\w*", lambda m: labels.get(m[0], m[0]), text).replace(" ", "")
            free.setdefault(name, {})[axis] = label
    return free, sizes
