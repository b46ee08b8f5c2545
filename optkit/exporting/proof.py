"""The graph computes what the module computes: at the example, at other sizes, and where not, from which layer on."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from optkit.errors import ModelError, OptkitError, UsageError
from optkit.exporting.axes import Axes
from optkit.exporting.explain import located, place
from optkit.exporting.export import Exported, quiet, run_eager
from optkit.exporting.origin import MODULE
from optkit.graph import constant, describe, walk
from optkit.reference import ReferenceSession, with_outputs

logger = logging.getLogger(__name__)

# Differences relative to the largest value of an output. Exports of well-conditioned networks differ by 1e-6.
TOLERANCE = 1e-4
# A float32 graph may differ from eager by this many times what eager itself differs from float64.
_CONDITION = 8.0
_LAYER = 1e-3
_LARGEST_TRACE = 1 << 30
# Below it nothing but zeros is expected; far above float32's smallest normal number, far below any output that counts.
_ZERO = 1e-30


def prove(model: ir.Model, exported: Exported) -> tuple[str, ...]:
    """Run graph and module on the example and at two other sizes, and compare; sentences that say what was compared.

    Args:
        model: As passes will get it.
        exported: What it was made from.

    Raises:
        ModelError: An output differs or a size is baked in; names the first bad layer, or the node and its line.
    """
    session = ReferenceSession(model, optimize=False)
    try:
        example = exported.eager(exported.tensors)
        again = exported.eager(exported.tensors)
        steady = [n for n in example if np.array_equal(example[n], again[n], equal_nan=True)]
        notes = []
        if len(steady) < len(example):
            notes.append("it draws random numbers, so not all of its outputs were compared with eager's")
        worst = _compare(session, model, exported, exported.tensors, example, steady, "on the example inputs")
        sizes, at = 0, []
        more, refusal = others(exported)
        for other, label in more:
            worst = max(worst, _compare(session, model, exported, other[0], other[1], steady, label))
            sizes += 1
            at.append(label.removeprefix("at "))
        if exported.axes and sizes < 2:
            tried = ", ".join(exported.axes.sizes)
            raise UsageError(
                f"{exported.name}: the module itself runs at {'no' if not sizes else 'only one'} other size of {tried}, so that free axes cannot be proved{refusal}",
                hint="compute sizes from x.shape there, ask for fewer axes, or give example inputs of a size that has neighbours",
            )
    finally:
        session.close()
    where = f", also {' and '.join(at)}" if at and exported.axes else ""
    notes.append(
        f"computes the same as the module in eager mode{where} (largest difference {worst:.1e} of the largest value)"
    )
    return tuple(notes)


def others(
    exported: Exported,
) -> tuple[list[tuple[tuple[list[torch.Tensor], dict[str, np.ndarray]], str]], str]:
    """Inputs of other sizes that the module takes, two of them, and why it refuses others.

    With nothing free, other values of the same size.
    """
    refusal = ""
    axes, names = exported.axes, exported.signature.names
    found: list[tuple[tuple[list[torch.Tensor], dict[str, np.ndarray]], str]] = []
    if not axes:
        turned = [t.flip(-1) if t.ndim and t.shape[-1] > 1 else t for t in exported.tensors]
        expected, _ = _try(exported, turned)
        return ([((turned, expected), "on other values")] if expected is not None else []), ""
    seen = {tuple(axes.sizes.values())}
    for sizes in axes.candidates():
        key = tuple(sizes.values())
        if key in seen or not _within(sizes, axes):
            continue
        seen.add(key)
        other = axes.resized(names, exported.tensors, sizes)
        expected, reason = _try(exported, other)
        label = ", ".join(f"{n} {s}" for n, s in sizes.items())
        if expected is None:
            refusal = refusal or f"; at {label}: {reason}"
            continue
        found.append(((other, expected), f"at {label}"))
        if len(found) == 2:
            break
    return found, refusal


def _within(sizes: Mapping[str, int], axes: Axes) -> bool:
    return all(
        low <= sizes[label] and (high is None or sizes[label] <= high)
        for label, (low, high) in axes.bounds.items()
        if label in sizes
    )


def _try(exported: Exported, tensors: Sequence[torch.Tensor]) -> tuple[dict[str, np.ndarray] | None, str]:
    """What the module gives, or None and why it gives nothing."""
    try:
        expected = exported.eager(tensors)
    except Exception as error:  # noqa: BLE001  (whatever the user's module raises for a size that it does not take)
        at = place(error)
        return None, f"{located(at) + ': ' if at else ''}{str(error).strip().partition(chr(10))[0][:200]}"
    sound = all(v.size and (v.dtype.kind != "f" or np.isfinite(v).any()) for v in expected.values())
    return (expected, "") if sound else (None, "its outputs are empty or not finite")


def _compare(
    session: ReferenceSession,
    model: ir.Model,
    exported: Exported,
    tensors: Sequence[torch.Tensor],
    expected: Mapping[str, np.ndarray],
    steady: Sequence[str],
    where: str,
) -> float:
    feeds = exported.feeds(tensors)
    try:
        found = session.run(feeds)
    except OptkitError as error:
        raise _baked(model, exported, str(error), where) from error
    worst = 0.0
    for name, output in zip(exported.outputs, model.graph.outputs, strict=True):
        if name not in steady:
            continue
        a, b = expected[name], found[str(output.name)]
        if a.shape != b.shape:
            culprit = _held(model, exported, feeds) or _first_bad(model, exported, tensors, feeds)
            raise ModelError(
                f"{exported.name}: output {name!r} {where} came out as {list(b.shape)}, eager gives {list(a.shape)}{culprit}",
                hint="a size is baked into the graph: compute it from x.shape there",
            )
        apart = difference(b, a)
        worst = max(worst, apart if np.isfinite(apart) else 0.0)
        if apart > TOLERANCE and apart > noise(exported, tensors, name):
            culprit = _first_bad(model, exported, tensors, feeds) or _held(model, exported, feeds)
            raise ModelError(
                f"{exported.name}: output {name!r} {where} differs from eager by {apart:.1e} of its largest value{culprit}",
                hint="rewrite that layer, or give the .onnx file of another exporter",
            )
    return worst


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest value; the share of integers that differ; inf where one is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    if expected.dtype.kind in "iub":
        return float(np.mean(found != expected))
    a, b = found.astype(np.complex128 if expected.dtype.kind == "c" else np.float64), expected
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(a[finite] - b[finite]).max() / max(float(np.abs(b[finite]).max()), _ZERO))


def noise(exported: Exported, tensors: Sequence[torch.Tensor], name: str) -> float:
    """How far rounding alone may take an output: what eager in float32 differs from eager in float64."""
    try:
        double = copy.deepcopy(exported.module).double()
        wide = [t.double() if t.is_floating_point() else t for t in tensors]
        exact = run_eager(double, exported.signature, wide, exported.outputs)[name]
        plain = exported.eager(tensors)[name]
    except Exception as error:  # noqa: BLE001  (modules that cannot be copied or widened: no allowance then)
        logger.debug("no float64 reference: %s", error)
        return 0.0
    return _CONDITION * difference(plain, exact) if plain.dtype.kind == "f" else 0.0


def _baked(model: ir.Model, exported: Exported, message: str, where: str) -> ModelError:
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


def _held(model: ir.Model, exported: Exported, feeds: Mapping[str, np.ndarray]) -> str:
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


def _first_bad(
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
