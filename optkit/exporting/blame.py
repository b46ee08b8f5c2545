"""Where a graph and its module part: the node that holds a size, or the first layer that computes something else."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from optkit.errors import ModelError, OptkitError
from optkit.exporting.difference import difference
from optkit.exporting.eager import quiet
from optkit.exporting.exported import Exported
from optkit.graph import constant, describe, walk
from optkit.origin import MODULE
from optkit.reference import ReferenceSession, with_outputs

logger = logging.getLogger(__name__)

_LAYER = 1e-3
_LARGEST_TRACE = 1 << 30


def baked(model: ir.Model, exported: Exported, message: str, where: str) -> ModelError:
    """The error for a graph that does not run: the node that stopped, its line, and the constant it holds."""
    named = {str(n.name): n for n in walk(model)}
    quoted = re.findall(r"[Nn]ame:'([^']+)'|node \(([^)]+)\)", message)
    node = next((named[n] for pair in quoted for n in pair if n in named), None)
    if node is None:
        return ModelError(f"{exported.name}: the exported graph does not run {where}: {message[:400]}")
    held = []
    for value in node.inputs:
        array = constant(value)
        if array is not None and array.dtype.kind == "i" and 0 < array.size <= 16:
            held.append(str(array.tolist()))
    fixed = f", which holds the constant {' and '.join(held)}," if held else ""
    return ModelError(
        f"{exported.name}: {describe(node)}{fixed} does not run {where}: {message.rpartition(' : ')[2][:300]}",
        hint="a size is baked in there: compute it from x.shape, or ask for fewer free axes",
    )


def held(model: ir.Model, exported: Exported, feeds: Mapping[str, np.ndarray]) -> str:
    """The first node that mixes what grows with the inputs and a constant of the size that was traced."""
    if not exported.axes:
        return ""
    traced = {s for s in exported.axes.sizes.values() if s > 1}
    values = [
        v for n in model.graph for v in n.outputs if v.name and v.dtype is not None and v.const_value is None
    ]
    names = [str(v.name) for v in values]
    try:
        session = ReferenceSession(with_outputs(model, names), optimize=False)
        here, there = session.run(feeds), session.run(exported.feeds(exported.tensors))
        session.close()
    except (OptkitError, ValueError) as error:
        logger.debug("sizes cannot be compared: %s", error)
        return ""
    here, there = {**feeds, **here}, {**exported.feeds(exported.tensors), **there}
    for node in model.graph:
        inputs = [str(v.name) for v in node.inputs if v is not None]
        outputs = [str(v.name) for v in node.outputs if v.name in here]
        grows = any(n in here and here[n].shape != there[n].shape for n in inputs)
        if not grows or not outputs or any(here[n].shape != there[n].shape for n in outputs):
            continue
        for value in node.inputs:
            fixed = None if value is None else constant(value)
            name = "" if value is None else str(value.name)
            if (
                fixed is None
                and name in here
                and np.array_equal(here[name], there[name], equal_nan=here[name].dtype.kind == "f")
            ):
                fixed = here[name]
            if fixed is None:
                continue
            sizes = set(fixed.shape) | (
                set(fixed.ravel().tolist()) if fixed.dtype.kind == "i" and fixed.size <= 16 else set()
            )
            if held := sizes & traced:
                return f"; {describe(node)} holds the traced size {min(held)} as a constant"
    return ""


def first_bad(
    model: ir.Model, exported: Exported, tensors: Sequence[torch.Tensor], feeds: Mapping[str, np.ndarray]
) -> str:
    """Where graph and module part: the first layer, in the order of execution, whose output no node of it computes."""
    calls = _layer_outputs(exported, tensors)
    by_module: dict[str, list[ir.Value]] = {}
    nodes: dict[str, ir.Node] = {}
    for node in model.graph:
        path = node.metadata_props.get(MODULE, "")
        if not path:
            continue
        prefixes = [path]
        while "." in prefixes[-1]:
            prefixes.append(prefixes[-1].rpartition(".")[0])
        for prefix in prefixes:
            by_module.setdefault(prefix, []).extend(v for v in node.outputs if v.name and v.dtype is not None)
            nodes[prefix] = node
    wanted = {str(v.name): v for values in by_module.values() for v in values if v.dtype == ir.DataType.FLOAT}
    try:
        session = ReferenceSession(with_outputs(model, list(wanted)), optimize=False)
        values = session.run(feeds)
        session.close()
    except (OptkitError, ValueError) as error:
        logger.debug("layers cannot be compared: %s", error)
        return ""
    for path, kind, outputs in calls:
        own = [values[str(v.name)] for v in by_module.get(path, ()) if str(v.name) in values]
        if not own:
            continue
        for output in outputs:
            if not any(
                v.size == output.size and difference(v.reshape(output.shape), output) < _LAYER for v in own
            ):
                return (
                    f"; the first layer that differs is {path} ({kind}), computed by {describe(nodes[path])}"
                )
    return ""


def _layer_outputs(
    exported: Exported, tensors: Sequence[torch.Tensor]
) -> list[tuple[str, str, list[np.ndarray]]]:
    found: list[tuple[str, str, list[np.ndarray]]] = []
    room = _LARGEST_TRACE
    handles = []

    def keep(path: str) -> Any:
        def hook(module: Any, _: Any, result: Any) -> None:
            nonlocal room
            parts = result if isinstance(result, tuple | list) else (result,)
            arrays = [
                p.numpy(force=True).copy()
                for p in parts
                if isinstance(p, torch.Tensor) and p.dtype == torch.float32
            ]
            room -= sum(a.nbytes for a in arrays)
            if room > 0 and arrays:
                found.append((path, type(module).__name__, arrays[:1]))

        return hook

    try:
        for path, part in exported.module.named_modules():
            if path:
                handles.append(part.register_forward_hook(keep(path)))
        with quiet():
            exported.eager(tensors)
    finally:
        for handle in handles:
            handle.remove()
    return found
