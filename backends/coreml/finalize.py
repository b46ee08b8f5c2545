"""What is left to do on a Mac: load the package in Core ML, ask which unit runs what, compare with the reference evaluator, measure.

Written against the interface of coremltools 9.0, and tested against what stands in for its half that macOS alone has:
**this has never run on a Mac**.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit import golden
from optkit.backends import records
from optkit.backends.base import Finished
from optkit.backends.coreml.eligibility import eligibility
from optkit.backends.coreml.interface import Interface, Port
from optkit.backends.coreml.package import DATA, PACKAGE
from optkit.backends.coreml.quiet import ct, silence
from optkit.backends.coreml.reference.program import Package
from optkit.backends.coreml.session import MacSession, ReferenceSession, has_core_ml
from optkit.backends.records import TIMED, VERIFIED
from optkit.closeness import closeness, spread
from optkit.data import drawn
from optkit.errors import BackendUnavailableError, UsageError

if TYPE_CHECKING:
    from optkit.backends.base import Mark, Task
    from optkit.targets import Target

PLAN = "plan.json"
# What a program that keeps states is asked in a row.
_STEPS = 4
_FIRST, _RUNS = 20, 200
_UNITS = {
    "MLNeuralEngineComputeDevice": "Neural Engine", "MLGPUComputeDevice": "GPU", "MLCPUComputeDevice": "CPU",
}  # fmt: skip


def finalize(
    path: Path, target: Target, precision: str, units: str, task: Task, mark: Mark, *, force: bool
) -> Finished:
    """Carry out in ``path`` what is left there; what the records say was done with this package on this Mac stays.

    The outputs are held against those of the reference evaluator, which this Mac runs as well. Evidence of a run on the
    device is given where the Mac has the chip that the target names: of a phone's package a Mac says that Core ML takes it
    and computes the right numbers, not how fast the phone is.

    Raises:
        BackendUnavailableError: This is no Mac.
        UsageError: The package is for a Mac with another chip.
        ModelError: Core ML does not take the package, or computes something else.
    """
    if not has_core_ml():
        raise BackendUnavailableError(
            f"Core ML runs only on Macs, this is {platform.system()}",
            hint="copy the artifact's folder to a Mac with optkit[coreml], and call optkit finalize there",
        )
    facts = _facts()
    here = is_device(target, facts["device"])
    if not here and target.name.startswith("mac-"):
        raise UsageError(
            f"the artifact is for {target.name} ({target.arch}), this Mac has {facts['device']}",
            hint="compile for it: optkit targets lists all Macs",
        )
    made_with = {**facts, "package": _digest(path), "units": units}
    with task("compile and load in Core ML"):
        session = MacSession(path, units)
    with session:
        mark("compiled" if here else "proxy_compiled", True)
        if force or records.read(path / PLAN, made_with) is None:
            with task("ask which unit runs what"):
                records.writer(path / PLAN, made_with)(_plan(path, session.compiled, units))
        verified, timed = records.proved(
            lambda name: None if force else records.read(path / name, made_with),
            lambda: records.writer(path / VERIFIED, made_with)(_verify(path, session, precision)),
            lambda: records.writer(path / TIMED, made_with)(
                {"batches": [_bench(session, steps[0]) for steps in _batches(path)]}
            ),
            task=task,
            mark=mark,
            against="the reference evaluator",
            wrong="Core ML does not compute what the program says",
            hint="--set options.units=CPU_ONLY tells whether one of the units is it",
            batch="batch",
            here=here,
        )
    return Finished(
        device=facts, cosine=min(o["cosine"] for o in verified["outputs"]), batches=tuple(timed["batches"])
    )


def is_device(target: Target, chip: str) -> bool:
    """Whether a Mac with ``chip`` is what ``target`` names: a Mac by its chip, the Neural Engine by any of Apple's."""
    if target.convolves:
        return chip.startswith("Apple ")
    return target.name.startswith("mac-") and target.arch in chip.split()


def _facts() -> dict[str, str]:
    asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
    chip = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": chip or platform.machine(), "macos": platform.mac_ver()[0], "coremltools": str(ct.__version__)
    }  # fmt: skip


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(p for p in (path / PACKAGE / DATA).rglob("*") if p.is_file()):
        total.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _plan(path: Path, compiled: str, units: str) -> dict[str, Any]:
    """What Core ML says of each operation, beside what was predicted on the machine that wrote the package."""
    with silence():
        plan = ct.models.compute_plan.MLComputePlan.load_from_path(compiled, ct.ComputeUnit[units])
    predicted = {e.name: e.units for e in eligibility(path / PACKAGE)}
    rows: list[dict[str, Any]] = []
    for operation in _operations(plan.model_structure.program.functions["main"].block):
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        if usage is None:  # constants
            continue
        cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
        name = operation.outputs[0].name if operation.outputs else operation.operator_name
        rows.append({
            "name": name, "op": operation.operator_name, "preferred": _unit(usage.preferred_compute_device),
            "supported": [_unit(d) for d in usage.supported_compute_devices], "cost": None if cost is None else cost.weight,
            "predicted": list(predicted.get(name, ())),
        })  # fmt: skip
    counts = Counter(row["preferred"] for row in rows)
    told = [row for row in rows if row["predicted"]]
    agree = sum(set(row["supported"]) <= set(row["predicted"]) for row in told)
    return {
        "preferred": dict(sorted(counts.items())),
        "predictions": len(told),
        "held": agree,
        "operations": rows,
    }


def _operations(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _unit(device: Any) -> str:
    return _UNITS.get(type(device).__name__, type(device).__name__)


def _batches(path: Path) -> list[list[dict[str, np.ndarray]]]:
    """For each of the package's sizes inputs in a row: drawn, the same every time."""
    interface, random = Interface.read(path), np.random.default_rng(0)
    ports = [p for p in interface.inputs if not p.state]
    usual = _defaults(path)
    count = max((len(v) for v in interface.listed.values()), default=1)
    steps = _STEPS if any(p.state for p in interface.inputs) else 1
    found = []
    for index in range(count):
        sizes = {k: v[index] for k, v in interface.listed.items()}
        shapes = {p.name: _shape(p.shape or (), sizes, usual[p.feature]) for p in ports}
        found.append([
            {p.name: _fed(p, drawn(p.spec, random, shapes[p.name])) for p in ports} for _ in range(steps)
        ])  # fmt: skip
    return found


def _shape(
    shape: Sequence[int | str | None], sizes: Mapping[str, int], usual: Sequence[int]
) -> tuple[int, ...]:
    # What has no axes in the model has one in the package.
    return tuple(d if isinstance(d, int) else sizes.get(str(d), usual[axis]) for axis, d in enumerate(shape))


def _defaults(path: Path) -> dict[str, list[int]]:
    """The shapes that the package itself gives for its inputs."""
    found = {}
    for feature in Package(path / PACKAGE).spec.description.input:
        picture = feature.type.imageType
        given = [int(d) for d in feature.type.multiArrayType.shape]
        found[feature.name] = given or [1, 1, int(picture.height), int(picture.width)]
    return found


def _fed(port: Port, array: np.ndarray) -> np.ndarray:
    return array if port.picture is None else port.picture.fed(array, drawn=True)


def _verify(path: Path, session: MacSession, precision: str) -> dict[str, Any]:
    outputs: list[dict[str, Any]] = []
    with closing(ReferenceSession(path)) as reference:
        integers = "quantize" in reference.machine.kinds
        limit = golden.min_cosine([precision, *(["int8"] if integers else [])])
        for index, steps in enumerate(_batches(path)):
            session.reset()
            reference.reset()
            for step, feeds in enumerate(steps):
                expected, found = reference.run(feeds), session.run(feeds)
                outputs += [
                    {"batch": f"{index}.{step}", "output": n, **closeness(a, found[n])}
                    for n, a in expected.items()
                ]
    met = bool(outputs) and all(o["finite"] and o["cosine"] >= limit for o in outputs)
    return {"met": met, "min_cosine": limit, "against": "the reference evaluator", "outputs": outputs}


def _bench(session: MacSession, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Predictions as an application makes them, with what moves to the units and back."""
    features = session.features(feeds)
    session.reset()
    for _ in range(_FIRST):
        session.compute(features)
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        session.compute(features)
        times.append(time.perf_counter() - start)
    return {
        **spread(times), "warmup": _FIRST, "transfers": "counted",
        "inputs": {name: list(array.shape) for name, array in feeds.items()},
    }  # fmt: skip
