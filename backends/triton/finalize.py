"""What is left to do on the device: load the code, try the finalists, compare with the golden outputs, measure; each once."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit import golden
from optkit.backends import records
from optkit.backends.base import Finished
from optkit.backends.records import TIMED, VERIFIED
from optkit.backends.triton import bundle
from optkit.backends.triton.runtime import Call, DeviceSession, open_device
from optkit.closeness import batch, closeness, spread, verify
from optkit.errors import ModelError

if TYPE_CHECKING:
    from optkit.backends.base import Mark, Task
    from optkit.backends.triton.rest import Place
    from optkit.kernels.cuda import Device

TUNED = "tuned.json"
# Launches between two events, and how often they are timed.
_TOGETHER, _ROUNDS = 20, 11
_RUNS, _FIRST = 200, 50
_DEVICE = ("device", "cuda_driver", "hip_driver", "arch")


def finalize(
    path: Path, target: str, arch: str, rest: Place, task: Task, mark: Mark, *, force: bool
) -> Finished:
    """Carry out in ``path`` what is left there; what the records say was done with this code on this device stays.

    Raises:
        BackendUnavailableError: There is no driver, no GPU, or ONNX Runtime does not run where the rest is to run.
        UsageError: The device is another one.
        ModelError: Code does not load or launch, or its outputs are not those of the graph.
    """
    with open_device(target, arch) as device:
        facts = device.facts()
        made_with = _made_with(path, facts, rest)
        with task("load the machine code"):
            session = DeviceSession(path, device, rest=rest)
        with session:
            return _finish(path, session, facts, made_with, task, mark, force=force)


def tuned(path: Path, device: Device, rest: Place) -> dict[int, str]:
    """What was chosen for this code on this device: programs by the index of their launch; empty where nothing was."""
    bundle.read(path)
    found = records.read(path / TUNED, _made_with(path, device.facts(), rest))
    return {} if found is None else {int(index): name for index, name in found["choices"].items()}


def _made_with(path: Path, facts: Mapping[str, Any], rest: Place) -> dict[str, Any]:
    """What decides whether a record is of this pair of code and device."""
    return {**{key: facts[key] for key in _DEVICE if key in facts}, "code": _digest(path), "rest": rest}


def _finish(
    path: Path,
    session: DeviceSession,
    facts: Mapping[str, Any],
    made_with: dict[str, Any],
    task: Task,
    mark: Mark,
    *,
    force: bool,
) -> Finished:
    files = sorted((path / golden.FOLDER).glob("*.npz"))
    if not files:
        raise ModelError(f"{golden.FOLDER} has no batches", hint="compile again")
    chosen = {} if force else records.read(path / TUNED, made_with)
    with task("time the finalists of each kernel"):
        chosen = _tune(
            session, batch(files[0])[0], dict(chosen or {}), records.writer(path / TUNED, made_with)
        )
    session.choices = [chosen["choices"][str(i)] for i in range(len(session.launches))]
    made_with = {**made_with, "choices": hashlib.sha256("\n".join(session.choices).encode()).hexdigest()}
    verified, timed = records.proved(
        lambda name: None if force else records.read(path / name, made_with),
        lambda: records.writer(path / VERIFIED, made_with)(
            verify(session.run, path / golden.FOLDER, bundle.read(path)["min_cosine"])
        ),
        lambda: records.writer(path / TIMED, made_with)(
            {"batches": [_bench(session, batch(file)[0]) for file in files]}
        ),
        task=task,
        mark=mark,
        against="the golden outputs",
        wrong="the kernels do not compute what the graph computes",
        hint="optkit kernels check tells whether a kernel is wrong by itself",
    )
    return Finished(
        device={key: facts[key] for key in sorted(facts)},
        cosine=min(o["cosine"] for o in verified["outputs"]),
        batches=tuple(timed["batches"]),
    )


def _tune(
    session: DeviceSession,
    feeds: Mapping[str, np.ndarray],
    found: dict[str, Any],
    write: Callable[[records.Record], object],
) -> dict[str, Any]:
    """The fastest program of each call, by kernel and sizes; what ``found`` has is not timed again.

    A finalist whose outputs are not those of the first is left out, with its cosine.
    """
    groups: dict[str, Any] = found.setdefault("groups", {})
    choices: dict[str, str] = found.setdefault("choices", {})

    def visit(index: int, call: Call) -> None:
        names = call.row["kernels"]
        key = json.dumps([names, call.sizes], sort_keys=True)
        if key not in groups:
            groups[key] = _race(session, call) if len(names) > 1 else {"fastest": names[0], "programs": []}
            write(found)
        choices[str(index)] = groups[key]["fastest"]

    if len(choices) < len(session.launches):
        session.bind(feeds)
        session.enqueue(visit)
        session.device.wait()
        write(found)
    return found


def _race(session: DeviceSession, call: Call) -> dict[str, Any]:
    first: list[np.ndarray] | None = None
    rows: list[dict[str, Any]] = []
    for name in call.row["kernels"]:
        prepared = call.prepare(name)
        prepared.start(session.device)
        outputs = [t.array(session.pool) for t in call.outputs if t is not None]
        first = outputs if first is None else first
        close = min(closeness(a, b)["cosine"] for a, b in zip(first, outputs, strict=True))
        row = {"program": name, "cosine": close}
        if close >= golden.min_cosine(("fp16",)):
            row["median_ms"] = (
                statistics.median(prepared.times(session.device, together=_TOGETHER, rounds=_ROUNDS)) * 1e3
            )
        rows.append(row)
    timed = [row for row in rows if "median_ms" in row]
    return {
        "fastest": min(timed, key=lambda row: row["median_ms"])["program"], "programs": rows,
        "how": f"{_TOGETHER} launches between two events, {_ROUNDS} times, caches warm", "sizes": dict(call.sizes),
    }  # fmt: skip


def _bench(session: DeviceSession, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Runs between two events on the stream; inputs are there already, outputs stay."""
    device = session.device
    session.bind(feeds)
    for _ in range(_FIRST):
        session.enqueue()
    device.wait()
    times = []
    for _ in range(_RUNS):
        start = device.event()
        session.enqueue()
        times.append(device.seconds(start, device.event()))
    return {
        **spread(times), "warmup": _FIRST, "transfers": "not counted",
        "inputs": {name: list(array.shape) for name, array in feeds.items()},
    }  # fmt: skip


def _digest(path: Path) -> str:
    """Of the graph's steps and all machine code."""
    bundle.read(path)  # Says so where it is missing.
    total = hashlib.sha256()
    for file in (path / bundle.LAUNCHES, *sorted((path / bundle.FOLDER).iterdir())):
        total.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
