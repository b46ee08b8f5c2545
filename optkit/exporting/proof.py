"""The graph computes what the module computes: at the example, at other sizes, and where not, from which layer on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from optkit.errors import ModelError, OptkitError, UsageError
from optkit.exporting.axes import Axes
from optkit.exporting.blame import baked, first_bad, held
from optkit.exporting.difference import TOLERANCE, difference, noise
from optkit.exporting.explain import where
from optkit.exporting.exported import Exported
from optkit.reference import ReferenceSession

_OTHER_SIZES = 2


@dataclass(frozen=True, slots=True)
class Other:
    """Inputs of other sizes, and what the module makes of them."""

    tensors: list[torch.Tensor]
    expected: dict[str, np.ndarray]
    sizes: Mapping[str, int]
    label: str


def prove(model: ir.Model, exported: Exported) -> tuple[str, ...]:
    """Run graph and module on the example and at two other sizes of every free axis, and compare; sentences that say what was compared.

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
            some = "not all of its outputs were" if steady else "none of its outputs was"
            notes.append(f"it draws random numbers, so {some} compared with eager's")
        worst = _compare(session, model, exported, exported.tensors, example, steady, "on the example inputs")
        more, refusal = others(exported)
        for other in more:
            apart = _compare(session, model, exported, other.tensors, other.expected, steady, other.label)
            worst = max(worst, apart)
        _enough(exported, more, refusal)
    finally:
        session.close()
    at = [o.label.removeprefix("at ") for o in more]
    where = f", also {' and '.join(at)}" if at and exported.axes else ""
    same = f"computes the same as the module in eager mode{where} (largest difference {worst:.1e} of the largest value)"
    notes.append(same if steady else f"runs{where}")
    return tuple(notes)


def others(exported: Exported) -> tuple[list[Other], str]:
    """Inputs that the module takes, so many that every free axis has two other sizes, and why it refuses others.

    With nothing free, other values of the same size.
    """
    refusal = ""
    axes, names = exported.axes, exported.signature.names
    if not axes:
        turned = [t.flip(-1) if t.ndim and t.shape[-1] > 1 else t for t in exported.tensors]
        expected, _ = _try(exported, turned)
        return [Other(turned, expected, {}, "on other values")] if expected is not None else [], ""
    found: list[Other] = []
    seen: dict[str, set[int]] = {n: set() for n in axes.sizes}
    for sizes in axes.candidates():
        new = [
            n for n, s in sizes.items() if len(seen[n]) < _OTHER_SIZES and s not in (axes.sizes[n], *seen[n])
        ]
        if not new or not _within(sizes, axes):
            continue
        tensors = axes.resized(names, exported.tensors, sizes)
        expected, reason = _try(exported, tensors)
        label = ", ".join(f"{n} {s}" for n, s in sizes.items())
        if expected is None:
            refusal = refusal or f"; at {label}: {reason}"
            continue
        found.append(Other(tensors, expected, sizes, f"at {label}"))
        for n, s in sizes.items():
            seen[n] |= {s} - {axes.sizes[n]}
        if all(len(s) >= _OTHER_SIZES for s in seen.values()):
            break
    return found, refusal


def _enough(exported: Exported, more: Sequence[Other], refusal: str) -> None:
    """Refuse axes of which nothing is known: one that the module never takes at another size is not free."""
    sizes = exported.axes.sizes
    stuck = [n for n, s in sizes.items() if all(o.sizes[n] == s for o in more)]
    if not sizes or (not stuck and len(more) >= _OTHER_SIZES):
        return
    number = "no" if stuck else "only one"
    raise UsageError(
        f"{exported.name}: the module itself runs at {number} other size of {', '.join(stuck or sizes)}, so that free axes cannot be proved{refusal}",
        hint="compute sizes from x.shape there, ask for fewer axes, or give example inputs of a size that has neighbours",
    )


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
        at = where(error, exported.module)
        return None, f"{at + ': ' if at else ''}{str(error).strip().partition(chr(10))[0][:200]}"
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
        raise baked(model, exported, str(error), where) from error
    worst = 0.0
    for name, output in zip(exported.outputs, model.graph.outputs, strict=True):
        if name not in steady:
            continue
        a, b = expected[name], found[str(output.name)]
        if a.shape != b.shape:
            culprit = held(model, exported, feeds) or first_bad(model, exported, tensors, feeds)
            raise ModelError(
                f"{exported.name}: output {name!r} {where} came out as {list(b.shape)}, eager gives {list(a.shape)}{culprit}",
                hint="a size is baked into the graph: compute it from x.shape there",
            )
        apart = difference(b, a)
        if apart > TOLERANCE and apart > noise(exported, tensors, name):
            culprit = first_bad(model, exported, tensors, feeds) or held(model, exported, feeds)
            raise ModelError(
                f"{exported.name}: output {name!r} {where} differs from eager by {apart:.1e} of its largest value{culprit}",
                hint="rewrite that layer, or give the .onnx file of another exporter",
            )
        worst = max(worst, apart)
    return worst
