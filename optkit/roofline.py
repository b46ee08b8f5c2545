"""What this machine can do at best, measured, and which share of it a latency reaches.

Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009: a run takes at least the time that its operations need at
the peak of their arithmetic, and at least the time that its bytes need from memory.

The peaks are those of the fastest product that any runtime here computes (a matrix product or a convolution, whichever is
faster), not of the instruction set: what a library reaches at its best, so a kernel may come out a little above 100 %.
Per thread: operations over CPU time, best of several runs, so that others on the machine do not lower them; the rate by
wall-clock is kept beside it and tells whether they were there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx_ir as ir
from pydantic import ValidationError

from optkit.arithmetic import stored
from optkit.backends import BACKENDS
from optkit.backends.base import Backend, Executed
from optkit.errors import OptkitError
from optkit.graph import elements
from optkit.ops import spec
from optkit.probes import probes
from optkit.report import Ceilings, Roofline

# CPU seconds for each probe, of which the best run counts, and the fewest runs.
_BUDGET, _FEWEST = 0.15, 4
# Bytes that are read for the bandwidth: weights that a last cache keeps from run to run come faster.
_LARGEST, _SMALLER = 256 << 20, (4 << 20, 16 << 20, 32 << 20, 64 << 20, 128 << 20)
# Whose products are tried, and in which arithmetic.
_TRIED = {"fp32": ("onnxruntime", "openvino"), "int8": ("onnxruntime", "openvino"), "bf16": ("openvino",)}
# Bytes of a weight by the arithmetic that reads it.
_WIDTH = {"int8": 1, "fp16": 2, "bf16": 2}
# Wall-clock this far ahead of CPU time: others were using the machine.
_LOADED = 1.2


def ceilings(processor: str = "") -> Ceilings:
    """This machine's, from the cache; measured in about two seconds where it does not know them.

    Args:
        processor: Name of the processor, so that a cache on a shared disk serves several machines.
    """
    file = _file(processor)
    with contextlib.suppress(OSError, ValueError, ValidationError):
        return Ceilings.model_validate_json(file.read_text(encoding="utf-8"))
    found = measure()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False)  # noqa: SIM115
        with part:
            part.write(found.model_dump_json(indent=1) + "\n")
        Path(part.name).replace(file)
    return found


def _file(processor: str) -> Path:
    named = os.environ.get("OPTKIT_CACHE")
    root = Path(named) if named else Path.home() / ".cache" / "optkit"
    facts = [processor, platform.machine(), os.cpu_count(), _LARGEST, *_SMALLER]
    for package in ("numpy", *sorted({name for names in _TRIED.values() for name in names})):
        try:
            facts.append(version(package))
        except PackageNotFoundError:
            facts.append(None)
    return root / "roofline" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"


def measure() -> Ceilings:
    """Time products in every runtime that is here, and memory, now."""
    rates: dict[str, float] = {}
    sources: dict[str, str] = {}
    stretched = []
    for fmt, names in _TRIED.items():
        for name in names:
            engine = _engine(name)
            if engine is None:
                continue
            for probe in probes(integer=fmt == "int8"):
                run = engine.runner(probe.model, probe.feeds, fmt)
                if run is None:
                    continue
                cpu, wall = _best(run)
                stretched.append(wall / cpu)
                if 2 * probe.macs / cpu > rates.get(fmt, 0.0):
                    rates[fmt], sources[fmt] = 2 * probe.macs / cpu, f"{name} {probe.name}"
    largest, wall = _reading(_LARGEST)
    stretched.append(wall * largest / _LARGEST)
    return Ceilings(
        operations=rates,
        sources=sources,
        bytes=largest,
        cached={size: _reading(size)[0] for size in _SMALLER},
        loaded=float(np.median(stretched)) > _LOADED,
        stretched=float(np.median(stretched)),
    )


def _engine(name: str) -> Backend | None:
    try:
        engine: Backend = BACKENDS[name]()
        return engine if engine.available() is None else None
    except OptkitError:
        return None


def _reading(size: int) -> tuple[float, float]:
    """Bytes a second of CPU time, by whichever of two ways reads faster, and its wall-clock."""
    x = np.ones((size // 4096, 1024), np.float32)
    vector = np.ones(len(x), np.float32)
    cpu, wall = min(_best(lambda: vector @ x), _best(lambda: x.max()))
    return size / cpu, wall


def _best(run: Callable[[], object]) -> tuple[float, float]:
    """CPU time and wall-clock of the fastest of several runs, each by its own clock."""
    run()
    times: list[tuple[float, float]] = []
    start = time.process_time()
    while len(times) < _FEWEST or time.process_time() - start < _BUDGET:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(t[0] for t in times), min(t[1] for t in times)


def weights_read(model: ir.Model) -> int:
    """Elements of the weights that each run multiplies with; tables, of which a run reads a few rows, do not count.

    Of the main graph alone: which bodies of control flow run is not known.
    """
    found: dict[str, int] = {}
    for node in model.graph:
        row = spec(node)
        if row is None or row.family not in ("conv", "matmul"):
            continue
        for value in node.inputs[1:]:
            source = stored(value)
            if source is not None:
                found[str(source.name)] = elements(source.shape) or 0
    return sum(found.values())


def against(
    executed: Sequence[Executed], weights: int, moved: int, seconds: float, machine: Ceilings
) -> Roofline | None:
    """The least that a run can take on this machine, and which share of ``seconds`` that is.

    Args:
        executed: What the runtime ran.
        weights: Elements, as ``weights_read`` gives them.
        moved: Bytes of inputs and outputs.
        seconds: CPU time of one thread.

    Returns:
        None where there is arithmetic that has no ceiling here.
    """
    macs: dict[str, int] = {}
    for e in executed:
        if e.macs:
            macs[e.format] = macs.get(e.format, 0) + e.macs
    if any(fmt not in machine.operations for fmt in macs) or seconds <= 0:
        return None
    total = sum(macs.values())
    width = sum(_WIDTH.get(fmt, 4) * count / total for fmt, count in macs.items()) if total else 4.0
    compute = sum(2 * count / machine.operations[fmt] for fmt, count in macs.items())
    read = weights * width + moved
    memory = read / machine.reading(read)
    floor = max(compute, memory)
    return Roofline(
        floor_ms=floor * 1e3, share=floor / seconds, bound="compute" if compute >= memory else "memory"
    )


def moved(feeds: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> int:
    """Bytes that go in and come out."""
    return sum(int(array.nbytes) for array in (*feeds.values(), *outputs.values()))
