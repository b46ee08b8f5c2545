"""One family through every stage, each held against the module in eager mode."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optkit.backends.coreml.shapes import keys
from optkit.benchmarks.families.catalogue import Builder, build
from optkit.candidate import Built
from optkit.compilation import Compilation, available
from optkit.data import CalibrationData
from optkit.errors import OptkitError
from optkit.evaluate import fidelity
from optkit.exporting.difference import TOLERANCE, difference, noise
from optkit.exporting.export import export
from optkit.exporting.exported import Exported
from optkit.exporting.proof import others
from optkit.frontend import Loaded, proved
from optkit.passes.base import Silent
from optkit.recipe import Recipe
from optkit.repair import repair
from optkit.targets import target

_Case = tuple[list[torch.Tensor], dict[str, np.ndarray]]

STAGES = ("export", "onnx", "onnxruntime", "openvino", "coreml", "litert", "int8")
# Stage -> target, backend and recipe.
_WAYS = {
    "onnxruntime": ("cpu", "onnxruntime", "fp32"),
    "openvino": ("cpu", "onnxruntime", "openvino-fp32"),
    "coreml": ("mac-m4", "coreml", "coreml-fp32"),
    "litert": ("android-cpu", "litert", "litert-fp32"),
    "int8": ("cpu", "onnxruntime", "int8-static"),
}


@dataclass(slots=True, kw_only=True)
class Row:
    """What became of one family.

    Attributes:
        sizes: At which the module was run beside the example.
        nodes: After export, and after the clean-up.
        passed: Stages that worked at every size.
        fixed: Whether Core ML takes it with fixed sizes alone, a package for each.
        in_float: Layers that int8 keeps in float to stay within its bound, of how many.
        errors: The largest difference from eager, relative to the largest value; cosine to float for int8.
        failed: For the first stage that did not work and those that do not need it: why.
    """

    name: str
    kind: str
    rung: str = ""
    sizes: list[str] = field(default_factory=list)
    nodes: tuple[int, int] = (0, 0)
    passed: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    fixed: bool = False
    in_float: tuple[int, int] = (0, 0)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def examine(name: str, kind: str, builder: Builder, stages: Collection[str] = STAGES) -> Row:
    """Export, clean up, go through the stages behind, and compare; a failure is part of the answer."""
    row = Row(name=name, kind=kind)
    start = time.process_time()
    built = build(builder)
    try:
        exported = export(built.module, built.inputs, built.dynamic, name=name)
    except OptkitError as error:
        row.failed["export"] = _line(error)
        row.seconds = round(time.process_time() - start, 1)
        return row
    row.rung = exported.rung
    row.passed.append("export")
    try:
        loaded = proved(exported)
    except OptkitError as error:
        row.failed["onnx"] = _line(error)
    else:
        row.passed.append("onnx")
        match = re.search(r"largest difference ([\d.e+-]+)", " ".join(loaded.notes))
        row.errors["onnx"] = float(match[1]) if match else 0.0
        _compiled(row, exported, loaded, stages)
    row.seconds = round(time.process_time() - start, 1)
    return row


def _compiled(row: Row, exported: Exported, loaded: Loaded, stages: Collection[str]) -> None:
    more, _ = others(exported)
    row.sizes = [o.label for o in more]
    cases = [
        (list(exported.tensors), exported.eager(exported.tensors)),
        *((o.tensors, o.expected) for o in more),
    ]
    feeds = [exported.feeds(tensors) for tensors, _ in cases]
    for stage, (_, _, recipe) in _WAYS.items():
        if stage not in stages:
            continue
        plan, data = Recipe.load(recipe), (feeds[1:] or feeds) if stage == "int8" else None
        if stage == "litert":
            plan, data = _fixed(plan, loaded, feeds), feeds
        bad = _tried(row, stage, exported, loaded, plan, data, cases, feeds)
        if bad and stage == "coreml":
            each = [
                _tried(row, stage, exported, loaded, _fixed(plan, loaded, [f]), [f], [case], [f])
                for case, f in zip(cases, feeds, strict=True)
            ]
            row.fixed, bad = not any(each), next(filter(None, each), "")
        if bad:
            row.failed[stage] = bad
        else:
            row.passed.append(stage)


def _tried(
    row: Row,
    stage: str,
    exported: Exported,
    loaded: Loaded,
    plan: Recipe,
    batches: Sequence[dict[str, np.ndarray]] | None,
    cases: Sequence[_Case],
    feeds: Sequence[dict[str, np.ndarray]],
) -> str:
    where, backend, _ = _WAYS[stage]
    data = None if batches is None else CalibrationData(batches, name="examples")
    with tempfile.TemporaryDirectory() as folder:
        work = Compilation(
            loaded, target(where), available(backend), data, None, seed=0, folder=Path(folder), progress=Silent()
        )  # fmt: skip
        try:
            made = work.build(stage, plan)
            if stage == "onnxruntime":
                row.nodes = (made.records[0].nodes_before, made.records[-1].nodes_after)
            if stage == "int8":
                return _integers(row, work, made, exported, cases)
            return _compare(row, stage, exported, cases, _run(work, made, feeds))
        except OptkitError as error:
            return _line(error)
        finally:
            work.reference.close()


def _fixed(plan: Recipe, loaded: Loaded, feeds: Sequence[Mapping[str, np.ndarray]]) -> Recipe:
    """The recipe for the sizes of ``feeds`` alone."""
    sizes = {
        key: several
        if len(several := [batch[str(value.name)].shape[axis] for batch in feeds]) > 1
        else several[0]
        for value in loaded.model.graph.inputs
        for axis, key in enumerate(keys(value))
        if isinstance(key, str)
    }
    return plan.model_copy(update={"options": {**plan.options, "shapes": sizes}})


def _compare(
    row: Row,
    stage: str,
    exported: Exported,
    cases: Sequence[_Case],
    found: Sequence[Mapping[str, np.ndarray]],
) -> str:
    worst = 0.0
    names = [str(v.name) for v in exported.model.graph.outputs]
    for (tensors, expected), got in zip(cases, found, strict=True):
        for own, name in zip(exported.outputs, names, strict=True):
            apart = difference(got[name], expected[own])
            if apart > TOLERANCE and apart > noise(exported, tensors, own):
                shapes = ", ".join(str(list(t.shape)) for t in tensors)
                return f"output {own!r} for inputs of {shapes} differs from eager by {apart:.1e} of its largest value"
            worst = max(worst, apart)
    row.errors[stage] = max(worst, row.errors.get(stage, 0.0))
    return ""


def _integers(row: Row, work: Compilation, made: Built, exported: Exported, cases: Sequence[_Case]) -> str:
    """On the example, which calibration has not seen where axes are free; the bound is that of recipes.

    What misses it goes the way of ``optkit compile``: the layers that hurt most return to float.
    """
    names = dict(zip(exported.outputs, (str(v.name) for v in exported.model.graph.outputs), strict=True))
    expected = {names[own]: array for own, array in cases[0][1].items()}
    feeds = exported.feeds(cases[0][0])
    bound = Recipe.load("int8-static").limits.min_cosine

    def missed(built: Built) -> str:
        try:
            (found,) = _run(work, built, [feeds])
            data = CalibrationData([feeds], name="example")
            answer: Any = fidelity(lambda _: expected, lambda _: dict(found), data)
        except OptkitError as error:
            return _line(error)
        row.errors["int8"] = round(float(answer.cosine), 4)
        return "" if answer.cosine >= bound else f"cosine {answer.cosine:.4f}, at least {bound} is asked for"

    bad = missed(made)
    if not bad:
        return ""
    fixed = repair(work, made.recipe, made, strict=False, faster_than=0.0)
    if fixed is None:
        return f"{bad}; too few layers are left in integers once it is"
    row.in_float = (sum(r.kept_float for r in fixed.layers), len(fixed.layers))
    return missed(fixed)


def _run(
    work: Compilation, made: Built, feeds: Sequence[Mapping[str, np.ndarray]]
) -> list[dict[str, np.ndarray]]:
    with work.session(made) as session:
        return [session.run(batch) for batch in feeds]


def _line(error: OptkitError) -> str:
    return " ".join(str(error).split())[:400]
