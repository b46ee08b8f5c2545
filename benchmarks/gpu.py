"""Every kernel and whole models on the GPU of this machine: ``python -m optkit.benchmarks.gpu [--kernel NAME] [--model NAME]``.

Kernels are timed against PyTorch's libraries and the roofline, models – our kernels, and TensorRT's engine where it is
installed – against torch.compile and ONNX Runtime with CUDA. The record goes to ``baselines/<target>.json`` beside this file.
Without a GPU nothing is written, and the exit code is 4.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import optkit
from optkit.backends.triton.bundle import LAUNCHES
from optkit.benchmarks.machine import versions
from optkit.closeness import batch, closeness
from optkit.errors import BackendUnavailableError, OptkitError, UsageError
from optkit.estimate import of_kernel
from optkit.kernels.base import Kernel, Problem
from optkit.kernels.build import build
from optkit.kernels.cuda import CudaError, Device
from optkit.kernels.gates import left_out
from optkit.kernels.numerics import Launch, errors, launch
from optkit.kernels.placed import place
from optkit.targets import TARGETS, Target, target
from optkit.targets.gpu import Capability
from optkit.workbench import chosen

_BASELINES = Path(__file__).resolve().parent / "baselines"
# Rows of products; of others so many that they move more than any cache holds.
_ROWS, _MOVED = 8192, 256 << 20
# Decoding has one row, and its weights have to be more than any cache holds: as many outputs as Llama 3 has tokens.
_DECODED, _OUTPUTS = "linear-int4-decode", 128_256
_MODELS = {
    "sentence-encoder": ("optkit.benchmarks.builders.minilm:SentenceEncoder", "tokens"),
    "vision-transformer": ("optkit.benchmarks.builders.vit_s:VisionTransformer", "image"),
}
# Our kernels; and TensorRT's engine, where TensorRT is installed.
_RECIPES = ("triton-fp16", "tensorrt-fp16")
# How good is good enough: at least this share of what is named.
_PRODUCTS = ("cuBLAS", 0.95)
_GOALS: dict[str, tuple[str, float]] = {
    "matmul": _PRODUCTS, "linear": _PRODUCTS, "linear-relu": _PRODUCTS, "linear-gelu": _PRODUCTS,
    "attention": ("FlashAttention-3", 0.9), _DECODED: ("bandwidth", 0.8),
    **dict.fromkeys(
        ("layer-norm", "add-layer-norm", "rms-norm", "add-rms-norm", "swiglu", "geglu", "softmax", "quantize", "rotary"),
        ("copy", 0.85),
    ),
}  # fmt: skip


def need_gpu() -> Device:
    """The GPU of this machine.

    Raises:
        BackendUnavailableError: There is none, or PyTorch or Triton cannot use it.
    """
    try:
        device = Device()
    except CudaError as error:
        raise BackendUnavailableError(
            f"nothing is measured without a GPU: {error}", hint="run it on the machine that has one"
        ) from error
    import torch

    if not torch.cuda.is_available():
        device.close()
        raise BackendUnavailableError(
            "kernels are timed against PyTorch on the GPU, and the one that is installed does not have CUDA",
            hint="pip install torch from its index for CUDA, and 'optkit[triton]'",
        )
    return device


def named(device: Device, name: str | None) -> Target:
    """The target that the device is, by what it calls itself, or by ``name``.

    Raises:
        UsageError: It is none, or another architecture.
    """
    facts = device.facts()
    arch = f"sm_{facts['major']}{facts['minor']}"
    words = str(facts["device"]).lower().replace(" ", "").replace("-", "")
    fit = [target(n) for n in TARGETS if target(n).arch.rstrip("a") == arch]
    found = [t for t in fit if (t.name == name if name else t.name.replace("-", "") in words)]
    if not found:
        raise UsageError(
            f"{facts['device']} ({arch}) is {'not ' + name if name else 'no target that is known by its name'}",
            hint=f"--target {' or '.join(t.name for t in fit) or '...: no target has this architecture'}",
        )
    return max(found, key=lambda t: len(t.name))


def problems(kernel: Kernel) -> Sequence[Problem]:
    """What a kernel is measured at: its examples, those of decoding with a matrix that no cache holds."""
    if kernel.name != _DECODED:
        return kernel.examples
    return [{**problem, "columns": _OUTPUTS} for problem in kernel.examples]


def rows_of(kernel: Kernel, problem: Problem, products: str | None) -> int:
    """Rows for a measurement, as the bound of the kernel asks for."""
    if products is not None:
        return 1 if kernel.name == _DECODED else _ROWS
    one, two = (kernel.work(problem, kernel.shapes(problem, n))[1] for n in (64, 128))
    return max(1, int(_MOVED / max(1.0, (two - one) / 64)))


def kernel_record(
    device: Device,
    where: Target,
    kernel: Kernel,
    problem: Problem,
    copied: float,
    *,
    torch_device: str = "cuda",
    rows: int | None = None,
    compiled: bool = True,
) -> dict[str, Any]:
    """One kernel at one problem: its finalists' times, its rivals', and what the roofline allows.

    Args:
        copied: Bytes a second of a copy, read and written.
        torch_device: Where the rivals run.
        rows: Instead of those that its bound asks for.
        compiled: Whether torch.compile is a rival.
    """
    from optkit.benchmarks.rivals import rivals, tensor, timed

    assert where.capability is not None
    every = kernel.finalists(problem, where.capability)
    built = build([(program, where.capability) for program in every])
    judged = [(p, left_out(kernel.name, p, one.record)) for p, one in zip(every, built, strict=True)]
    programs, gaps = [p for p, why in judged if not why], [gap for _, why in judged for gap in why]
    rows = rows or rows_of(kernel, problem, programs[0].products)
    inputs = kernel.draw(problem, rows, seed=0)
    shapes = [() if a is None else a.shape for a in inputs]
    finalists: list[dict[str, Any]] = []
    outputs: list[np.ndarray] = []
    for program in programs:
        (one,) = place(device, [Launch(kernel=kernel, problem=problem, program=program, inputs=inputs)])
        found = one.run()
        outputs = outputs or found
        times = one.prepared.times(device)
        one.close()
        finalists.append({
            "config": program.config, "warps": program.warps, "stages": program.stages, "ms": statistics.median(times) * 1e3,
            "spread_ms": (max(times) - min(times)) * 1e3,
            "cosine": min(closeness(a, b)["cosine"] for a, b in zip(outputs, found, strict=True)),
        })  # fmt: skip
    best = min(f["ms"] for f in finalists)
    given = [tensor(a, torch_device) for a in inputs if a is not None]
    others: list[dict[str, Any]] = []
    for rival in rivals(kernel.name, compiled=compiled):
        try:
            took, theirs = timed(rival, given, kernel.attributes(problem), torch_device)
        except RuntimeError as error:  # what torch raises where it has no program for a device or a format
            others.append(
                {"name": rival.name, "failed": f"{type(error).__name__}: {str(error).strip()[:200]}"}
            )
            continue
        close = [
            closeness(a.astype(np.float32), b.float().cpu().numpy())
            for a, b in zip(outputs, theirs, strict=False)
        ]
        others.append({
            "name": rival.name, "ms": took * 1e3, "cosine": min(c["cosine"] for c in close), "share": took * 1e3 / best,
        })  # fmt: skip
    operations, moved = kernel.work(problem, shapes)
    floor = of_kernel(operations, moved, programs[0].products or "fp32", where)
    record = {
        "kernel": kernel.name, "problem": dict(problem), "shapes": [list(s) for s in shapes], "ms": best,
        "finalists": finalists, "left_out": [str(gap) for gap in gaps], "rivals": others, "floor_ms": floor.floor * 1e3, "bound": floor.bound,
        "share_of_floor": floor.floor * 1e3 / best, "bytes_per_second": moved / best * 1e3,
        "operations_per_second": operations / best * 1e3,
        "share_of_copy": moved / best * 1e3 / copied,
        "share_of_bandwidth": moved / best * 1e3 / (where.bandwidth or float("inf")),
    }  # fmt: skip
    return {**record, "goal": goal(record)}


def goal(record: dict[str, Any]) -> dict[str, Any] | None:
    """What is asked of a kernel, and whether it was reached; None where the rival is not there."""
    if record["kernel"] not in _GOALS:
        return None
    against, least = _GOALS[record["kernel"]]
    if against in ("copy", "bandwidth"):
        share = record[f"share_of_{against}"]
    else:
        found = [r["share"] for r in record["rivals"] if r["name"].startswith(against) and "share" in r]
        share = min(found, default=None)
    return {
        "against": against,
        "least": least,
        "share": share,
        "met": None if share is None else share >= least,
    }


def numerics_record(device: Device, kernel: Kernel, capability: Capability) -> dict[str, Any]:
    """The worst error of a kernel's small problems around the edges of blocks, against float64."""
    steps, allowed, count = 0.0, 0.0, 0
    for problem in kernel.small:
        for rows in kernel.edges(problem, capability):
            one = launch(kernel, problem, capability, rows)
            (placed,) = place(device, [one])
            worst = max(e.steps for e in errors(one, placed.run()))
            placed.close()
            count += 1
            if not worst / kernel.allowed(problem) <= (steps / allowed if allowed else -1.0):
                steps, allowed = worst, kernel.allowed(problem)
    return {
        "kernel": kernel.name,
        "launches": count,
        "steps": steps,
        "allowed": allowed,
        "met": steps <= allowed,
    }


def example(kind: str, rows: int = 32) -> tuple[Any, ...]:
    """Inputs of a model of ours, on the processor."""
    import torch

    generator = torch.Generator().manual_seed(0)
    if kind == "image":
        return (torch.randn(rows, 3, 224, 224, generator=generator),)
    return (
        torch.randint(0, 1000, (rows, 128), generator=generator),
        torch.ones(rows, 128, dtype=torch.int64),
    )


def model_record(
    name: str,
    module: Any,
    inputs: tuple[Any, ...],
    where: Target,
    folder: Path,
    *,
    finish: Callable[[Path], Any],
    recipe: str = _RECIPES[0],
    torch_device: str = "cuda",
    provider: str = "CUDAExecutionProvider",
    compiler: str = "inductor",
) -> dict[str, Any]:
    """A whole model in half precision: the artifact, the same graph in ONNX Runtime, and the module in torch.compile.

    Args:
        module: In float32, on the processor.
        finish: Finishes the artifact on the device; ``optkit.finish.finalize``.
        recipe: What the artifact is compiled by.
        compiler: Backend of torch.compile.
    """
    import torch

    from optkit.benchmarks.rivals import seconds

    artifact, _ = optkit.compile(module, inputs, target=where, recipe=recipe, out=folder)
    found = finish(folder)
    launches = folder / LAUNCHES
    left = (
        {"without_kernel": len(json.loads(launches.read_bytes())["without_kernel"])}
        if launches.is_file()
        else {}
    )
    feeds, expected = batch(sorted((folder / "golden").glob("*.npz"))[0])
    half = [x.to(torch_device).half() if x.is_floating_point() else x.to(torch_device) for x in inputs]
    fast = torch.compile(module.half().to(torch_device), backend=compiler)
    with torch.inference_mode():
        took = seconds(lambda: fast(*half), torch_device, together=5)
    return {
        "model": name, "recipe": recipe, "inputs": {k: list(v.shape) for k, v in feeds.items()},
        "ms": found.batches[0]["median_ms"], "cosine": found.cosine, **left,
        "rivals": [
            {"name": "ONNX Runtime, the same graph", "ms": _onnx_runtime(folder / "model.onnx", feeds, expected, provider)},
            {"name": f"torch.compile ({compiler}), float16", "ms": took * 1e3, "inputs": [list(x.shape) for x in inputs]},
        ],
        "evidence": artifact.manifest.evidence.model_dump(),
    }  # fmt: skip


def _onnx_runtime(
    file: Path, feeds: dict[str, np.ndarray], expected: dict[str, np.ndarray], provider: str, runs: int = 50
) -> float:
    """Milliseconds of a run whose inputs and outputs stay on the device."""
    import time

    import onnxruntime as ort

    available = provider in ort.get_available_providers()
    session = ort.InferenceSession(str(file), providers=[provider]) if available else None
    # It falls back to the processor in silence where a library of CUDA is missing.
    if session is None or session.get_providers()[0] != provider:
        raise BackendUnavailableError(
            f"ONNX Runtime does not run with {provider} here",
            hint="pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )
    place_ = "cuda" if provider.startswith("CUDA") else "cpu"
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, place_, 0))
    for name in expected:
        binding.bind_output(name, place_)
    times = []
    for index in range(runs + 10):
        begun = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if index >= 10:
            times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e3


def measure(
    device: Device, where: Target, kernels: Sequence[str], models: Sequence[str], folder: Path
) -> dict[str, Any]:
    """All records; each is in the file of the target as soon as it is there."""
    from optkit.benchmarks.rivals import copy_bandwidth
    from optkit.finish import finalize

    assert where.capability is not None
    copied = copy_bandwidth("cuda")
    found: dict[str, Any] = {
        "target": where.name, "device": device.facts(), "versions": versions(), "copy_bytes_per_second": copied,
        "numerics": [], "kernels": [], "models": [],
    }  # fmt: skip
    for kernel in chosen(kernels):
        found["numerics"].append(numerics_record(device, kernel, where.capability))
        for problem in problems(kernel):
            found["kernels"].append(kernel_record(device, where, kernel, problem, copied))
            print(line(found["kernels"][-1]))
            write(found, folder)
    for name, recipe in itertools.product(models, _RECIPES):
        reference, kind = _MODELS[name]
        module_name, _, attribute = reference.partition(":")
        module = getattr(importlib.import_module(module_name), attribute)().eval()
        with tempfile.TemporaryDirectory(prefix="optkit-gpu-") as scratch:
            out = Path(scratch) / "out"
            try:
                record = model_record(name, module, example(kind), where, out, finish=finalize, recipe=recipe)
            except BackendUnavailableError as error:
                if recipe == _RECIPES[0]:
                    raise
                record = {"model": name, "recipe": recipe, "failed": str(error)}
        found["models"].append(record)
        print(line(record))
        write(found, folder)
    return found


def line(record: dict[str, Any]) -> str:
    """A record in words."""
    if "failed" in record:
        return f"{record['model']} by {record['recipe']}: {record['failed']}"
    rivals = ", ".join(
        f"{r['name']} {r['ms']:.4f} ms" if "ms" in r else f"{r['name']} failed" for r in record["rivals"]
    )
    asked = record.get("goal")
    verdict = ""
    if asked is not None and asked["met"] is None:
        verdict = f"; {asked['against']} is not there: not judged"
    elif asked is not None:
        verdict = f"; {asked['share']:.2f} of {asked['against']}, {'met' if asked['met'] else 'missed'}"
    what = (
        f"{record['model']} by {record['recipe']}" if "model" in record
        else f"{record['kernel']} {record['problem'].get('format')}"
    )  # fmt: skip
    return f"{what}: {record['ms']:.4f} ms; {rivals or 'no rival'}{verdict}"


def missed(found: dict[str, Any]) -> list[str]:
    """Kernels that are too slow or too far from float64, or that nobody could judge; FlashAttention-3 is for sm_90 alone."""
    hopper = found["device"]["major"] == 9
    slow = [r["kernel"] for r in found["kernels"] if r["goal"] and r["goal"]["met"] is False]
    alone = [r["kernel"] for r in found["kernels"] if r["goal"] and r["goal"]["met"] is None and hopper]
    return slow + alone + [n["kernel"] for n in found["numerics"] if not n["met"]]


def write(found: dict[str, Any], folder: Path) -> Path:
    """The file of a target's records, written whole."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{found['target']}.json"
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(file)
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; exit code 4 without a GPU, 3 where a goal or a number is missed, or not judged for want of a rival."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", action="append", default=[], help="a kernel; all by default")
    parser.add_argument("--model", action="append", choices=sorted(_MODELS), help="a model; all by default")
    parser.add_argument("--target", help="what the GPU is, where its name does not tell")
    parser.add_argument("--out", type=Path, default=_BASELINES)
    asked = parser.parse_args(arguments)
    try:
        kernels = [k.name for k in chosen(asked.kernel)]
        with need_gpu() as device:
            models = sorted(_MODELS) if asked.model is None else asked.model
            found = measure(device, named(device, asked.target), kernels, models, asked.out)
    except OptkitError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(write(found, asked.out))
    return 3 if missed(found) else 0


if __name__ == "__main__":
    sys.exit(main())
