"""Which networks become Core ML packages here, by coremltools and by onnx2coreml, with which errors and in which time.

    pip install 'optkit[families,coreml]' onnx2coreml 'numpy<2.4'
    python -m optkit.benchmarks.coreml_peers --only vision,real

Sizes are those of the example, since onnx2coreml takes no others; everything in float32. coremltools has the module: what
``torch.export`` gives, decomposed not at all, by its guide, or to core ATen, and at last a trace; the first that converts and
comes out right counts. onnx2coreml and optkit have one ONNX file, which torch exported; what onnx2coreml refuses it is given
once more as the recipe ``cleanup`` leaves it, whose time is counted for it as it is for optkit. The error is the largest difference to the module
in float64, where that runs and gives outputs of the same sizes, or in float32; where there is no module to ONNX Runtime (its own rewrites off); as a share of the
largest value. The reference evaluator runs all packages.
Seconds are CPU time from the file, or the exported program, to the saved package, once each tool has converted something
small. Each tool has a process of its own that may take so much time and memory. Writes ``benchmarks/results/coreml_peers.json``
and ``.md``. coremltools 9.0 cannot trace with NumPy 2.4, hence the limit above.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from optkit.backends.coreml.lower import CoreMl, CoreMlOptions
from optkit.backends.coreml.quiet import ct, silence
from optkit.backends.coreml.reference.machine import Machine
from optkit.backends.coreml.reference.program import Package
from optkit.backends.coreml.shapes import fix, keys
from optkit.benchmarks import suite
from optkit.benchmarks.bounded import bounded
from optkit.benchmarks.families.catalogue import KINDS, build, table
from optkit.benchmarks.machine import processor
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.errors import OptkitError
from optkit.evaluate import load_python
from optkit.exporting.difference import difference
from optkit.exporting.eager import quiet, run_eager
from optkit.exporting.export import export
from optkit.exporting.exported import Exported
from optkit.exporting.signature import Flat, Signature
from optkit.frontend import load
from optkit.legalize import legalize
from optkit.passes.base import Context
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.store import save
from optkit.targets import target

RESULTS = Path(__file__).resolve().parent / "results"
TARGET, REAL = "iphone15", "real"
TOOLS = ("optkit", "coremltools", "onnx2coreml")
_SECONDS, _BYTES = 240, 4 << 30
# Below it differences are of the order of sums; above it a package computes something else.
_ROUNDING, _WRONG = 1e-5, 1e-3
_PACKAGES = ("optkit", "coremltools", "onnx2coreml", "numpy", "torch", "transformers", "onnxruntime")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    kinds = [*KINDS, REAL]
    parser.add_argument("--only", default=",".join(kinds), help=f"kinds or models; kinds: {', '.join(kinds)}")
    parser.add_argument("--missing", action="store_true", help="leave out those that have a row")
    parser.add_argument("--tools", default=",".join(TOOLS), help="the others' cells stay as they are")
    asked = parser.parse_args(arguments)
    given = asked.only.split(",")
    wanted = [(k, n) for k in kinds for n in _names(k) if k in given or n in given]
    if not wanted:
        parser.error(f"no model or kind is called {', '.join(given)}")
    place = RESULTS / "coreml_peers.json"
    rows = {r["name"]: r for r in json.loads(place.read_text())["rows"]} if place.exists() else {}
    torch.set_num_threads(1)
    tools = [t for t in TOOLS if t in asked.tools.split(",")]
    _warm(tools)
    for kind, name in wanted:
        if asked.missing and name in rows:
            continue
        row = rows.setdefault(name, {"name": name, "kind": kind, "tools": {}})
        against, cells = _row(kind, name, tools)
        row |= against
        for tool, found in cells:
            row["tools"][tool] = found
            print(f"{name}, {tool}: {found}", file=sys.stderr, flush=True)
        _write(place, rows)
    return 0


def _names(kind: str) -> list[str]:
    return list(SUITE) if kind == REAL else list(table(kind))


def _write(place: Path, rows: Mapping[str, Any]) -> None:
    result = {
        "schema": 1,
        "processor": processor(),
        "versions": {n: version(n) for n in _PACKAGES},
        "rows": [rows[n] for k in (*KINDS, REAL) for n in _names(k) if n in rows],
    }
    place.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "coreml_peers.md").write_text(markdown(result), encoding="utf-8")


def _row(
    kind: str, name: str, tools: Sequence[str]
) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """What the row is held against, and what each tool makes of it."""
    with tempfile.TemporaryDirectory(prefix="optkit-peers-") as place:
        folder = Path(place)
        made = _apart(_prepare, kind, name, folder)
        if "failed" in made:
            # Without a file there is nothing to convert but the module.
            made = {"failed": f"torch exports no ONNX file: {made['failed']}"}
        found: list[tuple[str, dict[str, Any]]] = []
        for tool in tools:
            if tool == "coremltools" and kind == REAL and not SUITE[name].builder:
                found.append(
                    (tool, {"failed": "published as ONNX, which coremltools reads no more", "never": True})
                )
            elif "failed" in made and tool != "coremltools":
                found.append((tool, dict(made)))
            else:
                found.append((tool, _apart(_WORK[tool], kind, name, folder)))
        return {k: v for k, v in made.items() if k != "failed"}, found


def _apart(
    work: Callable[[str, str, Path], dict[str, Any]], kind: str, name: str, folder: Path
) -> dict[str, Any]:
    """In a process of its own: tools may take all memory or time."""
    try:
        made, _ = bounded(_caught, work, kind, name, folder, seconds=_SECONDS, memory=_BYTES, start="fork")
    except OptkitError as error:
        return {"failed": str(error), "stopped": True}
    found: dict[str, Any] = made
    return found


def _caught(
    work: Callable[[str, str, Path], dict[str, Any]], kind: str, name: str, folder: Path
) -> dict[str, Any]:
    try:
        with quiet(), silence():
            return work(kind, name, folder)
    except Exception as error:  # noqa: BLE001  (tools raise whatever they meet)
        return {"failed": _line(error)}


def _line(error: BaseException) -> str:
    # Torch adds where in Python the node is from, which is a path of this machine.
    said = str(error).partition("Original traceback:")[0]
    return f"{type(error).__name__}: {' '.join(said.split())[:300]}"


def _prepare(kind: str, name: str, folder: Path) -> dict[str, Any]:
    """Write the ONNX file with the sizes of the example, the example, and what must come out."""
    if kind == REAL:
        path = suite.fetch(name)
        model = load(path, check=False)
        calibration = load_python(EVALUATORS / SUITE[name].evaluator, "evaluator").calibration
        feeds = next(iter(islice(calibration(), 1)))
        fixed = {
            key: feeds[str(value.name)].shape[axis]
            for value in model.graph.inputs
            if value.name in feeds
            for axis, key in enumerate(keys(value))
            if isinstance(key, str)
        }
        reference = {
            name: ReferenceSession(path, optimize=optimize).run(feeds)
            for name, optimize in (("plain", False), ("own", True))
        }
        expected = list(reference["plain"].values())
        moved = max(difference(a, b) for a, b in zip(reference["own"].values(), expected, strict=True))
        made = {"against": "ONNX Runtime", "rounding": float(f"{moved:.2g}")}
        given = [feeds[str(v.name)] for v in model.graph.inputs if v.name in feeds]
        fix(model, fixed)
    else:
        built = build(table(kind)[name])
        exported = export(built.module, built.inputs, built.dynamic, name=name)
        model, feeds = exported.model, exported.feeds(exported.tensors)
        single, exact = exported.eager(exported.tensors), _exact(exported)
        if exact is not None and any(exact[k].shape != v.shape for k, v in single.items()):
            # What is kept hangs on comparisons that rounding decides, as of equal scores.
            exact = None
        expected = list((single if exact is None else exact).values())
        made = {"against": "float32" if exact is None else "float64", "rounding": 0.0}
        given = [feeds[str(v.name)] for v in model.graph.inputs]
        fix(model, {
            key: size
            for value, array in zip(model.graph.inputs, given, strict=True)
            for key, size in zip(keys(value), array.shape, strict=True)
            if isinstance(key, str)
        })  # fmt: skip
    save(model, folder / "model.onnx")
    np.savez(folder / "given.npz", *given)
    np.savez(folder / "expected.npz", *expected)
    return made


def _exact(exported: Exported) -> dict[str, np.ndarray] | None:
    """What the module gives in float64, as far as it runs there."""
    double = copy.deepcopy(exported.module).double()
    wide = [t.double() if t.is_floating_point() else t for t in exported.tensors]
    try:
        return run_eager(double, exported.signature, wide, exported.outputs)
    except Exception:  # noqa: BLE001  (it raises whatever it meets)
        return None


def _arrays(file: Path) -> list[np.ndarray]:
    with np.load(file) as found:
        return [found[f"arr_{i}"] for i in range(len(found.files))]


def _judged(package: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """What the evaluator makes of a package, inputs and outputs in order."""
    given, expected = _arrays(folder / "given.npz"), _arrays(folder / "expected.npz")
    return {"seconds": round(seconds, 2)} | _error(package, given, expected)


def _error(package: Path, given: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> dict[str, Any]:
    function = Package(package).functions["main"]
    feeds = {p.name: a.reshape(1) if a.ndim == 0 else a for p, a in zip(function.inputs, given, strict=True)}
    values = Machine(function).run(feeds)
    worst = 0.0
    for name, right in zip(function.block.outputs, expected, strict=True):
        array = np.asarray(values[name])
        # Core ML has no values without axes at its borders.
        array = array.reshape(right.shape) if array.size == right.size == 1 else array
        worst = max(worst, difference(array, right))
    return {"error": float(f"{worst:.2g}") if np.isfinite(worst) else None}


def _ours(kind: str, name: str, folder: Path) -> dict[str, Any]:
    out, backend, device = folder / "optkit", CoreMl(), target(TARGET)
    out.mkdir()
    options = CoreMlOptions(precision="fp32")
    start = time.process_time()
    model = load(folder / "model.onnx", check=False)
    run_passes(model, Recipe.load("cleanup").passes, Context(target=device))
    legalize(model, backend, device, name=name)
    backend.lower(model, device, options, out)
    return _judged(out / "model.mlpackage", folder, time.process_time() - start)


def _coremltools(kind: str, name: str, folder: Path) -> dict[str, Any]:
    module, tensors = _caught_module(name) if kind == REAL else _flat(kind, name)
    module.eval()
    rungs: dict[str, Callable[[], Any]] = {
        "program": lambda: _program(module, tensors).run_decompositions({}),
        "core ATen": lambda: _program(module, tensors).run_decompositions(),
        "trace": lambda: torch.jit.trace(module, tuple(tensors), check_trace=False),
    }
    found: dict[str, Any] = {}
    reasons = []
    for rung, make in rungs.items():
        try:
            with torch.no_grad():
                source = make()
            start = time.process_time()
            kinds = [ct.TensorType(shape=tuple(t.shape), dtype=_number(t)) for t in tensors]
            made = ct.convert(
                source, inputs=kinds if rung == "trace" else None, convert_to="mlprogram", skip_model_load=True,
                minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT32,
            )  # fmt: skip
            package = folder / f"{rung}.mlpackage"
            made.save(str(package))
            row = _judged(package, folder, time.process_time() - start) | {"from": rung}
        except Exception as error:  # noqa: BLE001  (it raises whatever it meets)
            reasons.append(f"{rung}: {_line(error)}")
            continue
        if row["error"] is not None and row["error"] <= _WRONG:
            return row
        found = found or row
    return found or {"failed": " | ".join(reasons)[:600]}


def _program(module: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> Any:
    return torch.export.export(module, tuple(t.clone() for t in tensors), strict=False)


def _number(tensor: torch.Tensor) -> Any:
    return np.float32 if tensor.is_floating_point() else np.int32


def _flat(kind: str, name: str) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    built = build(table(kind)[name])
    signature = Signature(built.module, built.inputs)
    return Flat(built.module, signature), signature.tensors


def _caught_module(name: str) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """What a builder hands to the exporter, before it is one."""
    held: list[torch.nn.Module] = []
    entry = SUITE[name]
    assert entry.builder is not None
    module, _, function = entry.builder.partition(":")
    with (
        tempfile.TemporaryDirectory() as place,
        patch("torch.onnx.export", lambda m, *_, **__: held.append(m)),
    ):
        getattr(importlib.import_module(module), function)(
            suite.fetch(name).parent, Path(place) / "model.onnx"
        )
    if not held:
        raise OptkitError("there is no module of it: it is written as ONNX")
    calibration = load_python(EVALUATORS / entry.evaluator, "evaluator").calibration
    return held[0], [torch.from_numpy(a) for a in next(iter(calibration())).values()]


def _onnx2coreml(kind: str, name: str, folder: Path) -> dict[str, Any]:
    o2c = importlib.import_module("onnx2coreml")
    file, reasons = folder / "model.onnx", []
    for cleaned in (False, True):
        start = time.process_time()
        if cleaned:
            model = load(file, check=False)
            run_passes(model, Recipe.load("cleanup").passes, Context(target=target(TARGET)))
            file = folder / "clean.onnx"
            save(model, file)
        try:
            package = folder / "onnx2coreml.mlpackage"
            o2c.convert(str(file), compute_precision="fp32").save(str(package))
            return _judged(package, folder, time.process_time() - start) | {
                "from": "clean" if cleaned else "file"
            }
        except Exception as error:  # noqa: BLE001  (it raises whatever it meets)
            reasons.append(f"{'clean' if cleaned else 'file'}: {_line(error)}")
    return {"failed": " | ".join(reasons)[:600]}


_WORK: Mapping[str, Callable[[str, str, Path], dict[str, Any]]] = {
    "optkit": _ours, "coremltools": _coremltools, "onnx2coreml": _onnx2coreml,
}  # fmt: skip


def _warm(tools: Sequence[str]) -> None:
    """Let each tool import what it needs when it first converts; children inherit it."""
    for kind in KINDS:
        table(kind)
    module, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval(), torch.ones(1, 8)
    with tempfile.TemporaryDirectory() as place, quiet(), silence():
        folder = Path(place)
        with torch.no_grad():
            np.savez(folder / "given.npz", x.numpy())
            np.savez(folder / "expected.npz", module(x).numpy())
        save(export(module, (x,), {}, name="small").model, folder / "model.onnx")
        for tool in tools:
            flat = patch(f"{__name__}._flat", lambda *_: (module, [x]))
            with flat:
                found = _WORK[tool]("vision", "small", folder)
            if "failed" in found:
                raise OptkitError(f"{tool} does not convert a linear layer: {found['failed']}")


def markdown(result: Mapping[str, Any]) -> str:
    """The page for readers."""
    rows = result["rows"]
    done = {t: [r for r in rows if _right(r["tools"].get(t, {}))] for t in TOOLS}
    peers = TOOLS[1:]
    total = len(SUITE) + sum(len(table(k)) for k in KINDS)
    lines = [
        "# Core ML packages of model families and real models, here and by others",
        "",
        *(__doc__ or "").split("\n\n")[2:3],
        "",
        f"{result['processor']['name']}; {', '.join(f'{k} {v}' for k, v in result['versions'].items())}. "
        "Verified by the reference evaluator, not executed on Apple hardware.",
        "",
        f"{len(rows)} of {total} models were run. Converted, and right to {_WRONG:g}: "
        + ", ".join(f"{len(done[t])} by {t}" for t in TOOLS)
        + ".",
        "",
    ]
    for peer in peers:
        both = [r for r in done[peer] if _right(r["tools"].get("optkit", {}))]
        alone = [r["name"] for r in done[peer] if r not in both]
        worse = [
            r["name"]
            for r in both
            if r["tools"]["optkit"]["error"] > max(_ROUNDING, r["tools"][peer]["error"], r.get("rounding", 0))
        ]
        ratios = sorted(
            r["tools"]["optkit"]["seconds"] / max(r["tools"][peer]["seconds"], 0.01) for r in both
        )
        slower = sum(x > 1 for x in ratios)
        lines += [
            f"* **{peer}**: it alone converts {', '.join(alone) or 'none'}. Its error is the smaller one, and ours more than {_ROUNDING:g} and "
            "than ONNX Runtime's own rewrites move a file that is published as one, at "
            f"{', '.join(worse) or 'none'}. Our seconds over its: {ratios[len(ratios) // 2] if ratios else float('nan'):.2f} in the middle, "
            f"{ratios[-1] if ratios else float('nan'):.2f} at most, more than its at {slower} of {len(both)}.",
        ]
    heads = [f"{t}, {what}" for t in TOOLS for what in ("error", "CPU s")]
    lines += ["", f"| model | kind | {' | '.join(heads)} |", f"|{'---|' * (2 + len(heads))}"]
    for row in rows:
        cells = [c for t in TOOLS for c in _cells(row["tools"].get(t, {}))]
        older = "" if "against" in row else " ¹"
        lines.append(f"| {row['name']}{older} | {row['kind']} | {' | '.join(cells)} |")
    if any("against" not in row for row in rows):
        lines += [
            "",
            "¹ Held against the module in float32, and the time of cleaning not counted for onnx2coreml; not run again yet.",
        ]
    lines += ["", "## What fails", ""]
    for row in rows:
        for tool in TOOLS:
            found = row["tools"].get(tool, {})
            if "failed" in found and not found.get("never"):
                why = found["failed"].replace("|", "/").replace("<", "‹").replace(">", "›")
                lines.append(f"* **{row['name']}**, {tool}: {why}")
    return "\n".join(lines) + "\n"


def _right(found: Mapping[str, Any]) -> bool:
    error = found.get("error")
    return error is not None and error <= _WRONG


def _cells(found: Mapping[str, Any]) -> tuple[str, str]:
    if not found or found.get("never"):
        return "", ""
    if "failed" in found:
        return ("stopped" if found.get("stopped") else "fails"), ""
    return "other shapes or numbers" if found[
        "error"
    ] is None else f"{found['error']:.0e}", f"{found['seconds']:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
