"""Run programs on the CPU, in a child process: what they compute against float64, and where they read and write."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from optkit.errors import BackendUnavailableError, ModelError
from optkit.kernels.base import Kernel, Problem, Program
from optkit.kernels.build import child, need_triton
from optkit.kernels.expressions import evaluate
from optkit.targets.gpu import Capability

# Bits of the fraction, and the unit of the last place of 1.
_STEP = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7, "fp8e4nv": 2.0**-3}
# What has no letter in NumPy's own alphabet goes as bits.
_RAW = {"bf16": np.int16, "fp8e4nv": np.int8, "i8": np.int8}
_DTYPES: dict[str, Any] = {
    "fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16, "i8": np.int8, "i32": np.int32, "i64": np.int64,
    "fp8e4nv": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
# What stands behind each output and must still stand there afterwards.
_TAIL, _MARK = 64, 77.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A program with its inputs."""

    kernel: Kernel
    problem: Problem
    program: Program
    inputs: Sequence[np.ndarray | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found of a launch's memory.

    Attributes:
        fault: The access outside the tensors, or the race between blocks, with the line of the kernel; empty where there is none.
        unjudged: Why nothing can be said; empty where all was checked.
        outputs: What it wrote; empty where it stopped.
    """

    fault: str
    unjudged: str
    outputs: Sequence[np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """How far one output is from float64.

    Attributes:
        output: Its index.
        steps: Largest difference, in steps of the format, or of that which the kernel counts in, at the value's size (at least the
            outputs' RMS).
        found: What the program wrote, as float64.
    """

    output: int
    steps: float
    found: np.ndarray


def launch(kernel: Kernel, problem: Problem, capability: Capability, rows: int, seed: int = 0) -> Launch:
    """The program for an architecture with random inputs."""
    return Launch(
        kernel=kernel,
        problem=problem,
        program=kernel.program(problem, capability),
        inputs=kernel.draw(problem, rows, seed),
    )


def rivals(kernel: Kernel, problem: Problem, capability: Capability, seed: int = 0) -> list[Launch]:
    """The other programs that a device may choose, at the most rows that are worth a test, random inputs for all.

    Those that differ in warps and stages alone compute the same: the interpreter has neither.
    """
    first, *others = kernel.finalists(problem, capability)
    inputs = kernel.draw(problem, max(kernel.edges(problem, capability)), seed)
    return [
        Launch(kernel=kernel, problem=problem, program=program, inputs=inputs)
        for program in others
        if program.constants != first.constants
    ]


def interpret(launches: Sequence[Launch]) -> list[list[np.ndarray]]:
    """The outputs of each launch.

    Raises:
        BackendUnavailableError: Triton is not installed.
        ModelError: The interpreter fails, multiplies wrongly, or a program writes behind its outputs.
    """
    need_triton()
    with tempfile.TemporaryDirectory(prefix="optkit-interpret-") as name:
        folder, jobs = Path(name), []
        for index, one in enumerate(launches):
            job, arrays = _job(f"{index}", one)
            np.savez(folder / f"{index}.npz", allow_pickle=False, **arrays)
            jobs.append(job)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        child(folder, "optkit.kernels.triton.interpret", {"TRITON_INTERPRET": "1"}, len(jobs))
        return [_outputs(folder / f"{index}.out.npz", one) for index, one in enumerate(launches)]


def sanitizer() -> bool:
    """Whether ttsem, which executes what Triton makes of a program, is there; it is not imported."""
    return importlib.util.find_spec("ttsem") is not None


def sanitize(launches: Sequence[Launch], capability: Capability) -> list[Verdict]:
    """Where each launch reads and writes, and what its blocks do to each other; nothing lies behind its tensors.

    Raises:
        BackendUnavailableError: Triton or ttsem is not installed.
        ModelError: The process died.
    """
    need_triton()
    if not sanitizer():
        raise BackendUnavailableError(
            "accesses and races are checked by ttsem, which is not installed",
            hint="pip install ttsem (Python 3.12 on; with --ignore-requires-python on 3.11)",
        )
    with tempfile.TemporaryDirectory(prefix="optkit-sanitize-") as name:
        folder, jobs = Path(name), []
        for index, one in enumerate(launches):
            job, arrays = _job(f"{index}", one, tail=0)
            np.savez(folder / f"{index}.npz", allow_pickle=False, **arrays)
            jobs.append({**job, "capability": list(capability)})
        (folder / "jobs.json").write_text(json.dumps(jobs))
        child(folder, "optkit.kernels.triton.sanitize", {"TRITON_DEFAULT_FP_FUSION": "1"}, len(jobs))
        found = json.loads((folder / "verdicts.json").read_bytes())
        return [
            Verdict(**row, outputs=[] if row["fault"] or not file.is_file() else _outputs(file, one, tail=0))
            for index, (one, row) in enumerate(zip(launches, found, strict=True))
            for file in [folder / f"{index}.out.npz"]
        ]


def _shapes(one: Launch) -> list[tuple[int, ...]]:
    return [() if a is None else a.shape for a in one.inputs]


def _job(key: str, one: Launch, tail: int = _TAIL) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    sizes = one.kernel.sizes(one.problem, _shapes(one))
    shapes = one.kernel.outputs(one.problem, _shapes(one))
    pointers, scalars, arrays, outputs = {}, {}, {}, []
    for argument in one.program.arguments:
        kind, _, index = argument.binds.partition(":")
        fmt = argument.type.lstrip("*")
        if kind == "input":
            array = one.inputs[int(index)]
            assert array is not None
            arrays[argument.name] = array.view(_RAW[fmt]) if fmt in _RAW else array
        elif kind == "output":
            shape = shapes[int(index)]
            assert shape is not None
            size = int(np.prod(shape))
            flat = np.full(size + tail, _MARK, _DTYPES[fmt])
            if (written := one.program.aliases.get(int(index))) is not None:
                # It is written into what is there.
                before = one.inputs[written]
                assert before is not None
                flat[:size] = before.reshape(-1)
            arrays[argument.name] = flat.view(_RAW[fmt]) if fmt in _RAW else flat
            outputs.append(argument.name)
        else:
            scalars[argument.name] = evaluate(argument.binds, sizes)
            continue
        pointers[argument.name] = fmt
    grid = [evaluate(expression, sizes) for expression in one.program.grid]
    job = {
        "key": key, "program": one.program.record(), "pointers": pointers, "scalars": scalars, "grid": grid,
        "outputs": outputs,
    }  # fmt: skip
    return job, arrays


def _outputs(file: Path, one: Launch, tail: int = _TAIL) -> list[np.ndarray]:
    shapes, found = one.kernel.outputs(one.problem, _shapes(one)), {}
    with np.load(file) as arrays:
        for argument in one.program.arguments:
            kind, _, index = argument.binds.partition(":")
            if kind != "output":
                continue
            array = arrays[argument.name]
            array = array.view(_DTYPES[argument.type.lstrip("*")])
            end = array.size - tail
            if not (array[end:] == np.asarray(_MARK, array.dtype)).all():
                raise ModelError(f"{one.program.function} wrote behind {argument.name}")
            shape = shapes[int(index)]
            assert shape is not None
            found[int(index)] = array[:end].reshape(shape)
    return [found[index] for index in sorted(found)]


def errors(one: Launch, found: Sequence[np.ndarray]) -> list[Error]:
    """Each output against the kernel's float64 reference."""
    expected = one.kernel.reference(one.problem, one.inputs)
    result = []
    for index, (value, right) in enumerate(zip(found, expected, strict=True)):
        if value.dtype.kind in "iu":
            step: Any = 1.0
        else:
            own = next(name for name, dtype in _DTYPES.items() if value.dtype == dtype)
            kind = one.kernel.precision(one.problem) or own
            least = float(np.sqrt(np.mean(right**2))) or 1.0
            step = _STEP[kind] * np.maximum(np.abs(right), least)
        steps = float(np.max(np.abs(value.astype(np.float64) - right) / step))
        result.append(Error(output=index, steps=steps, found=value.astype(np.float64)))
    return result
