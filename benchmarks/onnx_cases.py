"""What backends make of ONNX's own test cases of operators: models of one node, or of the function that defines it, with their outputs.

    python -m optkit.benchmarks.onnx_cases --backend coreml --out results/

Each case goes through the recipe ``cleanup`` and is lowered in float32. What Core ML and LiteRT have to know when a file is made is
constant: where a case is refused, inputs that are no floats become constants, then all but the first. *Equal* are outputs of the same
shape within the tolerance of the case, or 0.001 of each value, a millionth of the largest, or two roundings where it is in float16.
Where they are not, but are what ONNX Runtime makes of the case, the row says so. Cases with strings, sequences and random numbers are left out.
Core ML's packages are run by the reference evaluator. **Nothing here ran on Apple hardware.** Writes ``onnx_cases.{json,md}``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases

from optkit.backends import BACKENDS
from optkit.benchmarks.machine import processor, versions
from optkit.errors import OptkitError
from optkit.frontend import load
from optkit.legalize import legalize
from optkit.passes.base import Context
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import exchanged
from optkit.targets import target

RESULTS = Path(__file__).parent / "results"
# Backend -> target and options.
WAYS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "coreml": ("mac-m4", {"precision": "fp32"}),
    "litert": ("android-cpu", {}),
    "onnxruntime": ("cpu", {}),
    "openvino": ("cpu", {"precision": "f32"}),
}
_RANDOM = frozenset(
    {
        "Bernoulli",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Multinomial",
        "Dropout",
    }
)
_RELATIVE, _ABSOLUTE, _OF_LARGEST, _HALVES = 1e-3, 1e-5, 1e-6, 2e-3

# What errors say that are mistakes of ours, which is no refusal.
_OURS = "a mistake in optkit"

Arrays = dict[str, np.ndarray]


def cases() -> Iterator[tuple[str, onnx.ModelProto, Arrays, Arrays, float]]:
    """Name, model, inputs, outputs and relative tolerance of each case of tensors of numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    for case in found:
        if case.model is None or not case.data_sets:
            continue
        graph = case.model.graph
        ports = (*graph.input, *graph.output)
        numbers = all(
            p.type.HasField("tensor_type") and p.type.tensor_type.elem_type != onnx.TensorProto.STRING
            for p in ports
        )
        if not numbers or {n.op_type for n in graph.node} & _RANDOM:
            continue
        inputs, outputs = ([_array(a) for a in arrays] for arrays in case.data_sets[0])
        if len(inputs) == len(graph.input):
            names = ([p.name for p in side] for side in (graph.input, graph.output))
            given, wanted = (
                dict(zip(n, a, strict=True)) for n, a in zip(names, (inputs, outputs), strict=True)
            )
            yield case.name, case.model, given, wanted, case.rtol


def _array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def examine(
    backend: str, model: onnx.ModelProto, given: Arrays, wanted: Arrays, tolerance: float
) -> dict[str, Any]:
    """What comes out of one case, by the first choice of constants with which it is taken."""
    floats = [k for k, v in given.items() if v.dtype.kind == "f"]
    choices = [list(given), floats, list(given)[:1]]
    row: dict[str, Any] = {}
    for index, free in enumerate(choices):
        if index and (not free or free in choices[:index]):
            continue
        feeds = {k: given[k] for k in free}
        try:
            found = _run(backend, _with_constants(model, given, free), feeds)
        except OptkitError as error:
            if _OURS in str(error) or _OURS in (error.hint or ""):
                return {"result": "fails", "why": _said(error)}
            row = {"result": "refused", "why": _said(error)}
            continue
        except Exception as error:  # noqa: BLE001  (whatever it is, it is a mistake of ours)
            return {"result": "fails", "why": f"{type(error).__name__}: {_said(error)}"}
        wrong = _differences(found, wanted, tolerance)
        if not wrong:
            return {"result": "equal", "free": free}
        own = _of_onnx_runtime(model, given)
        same = own is not None and not _differences(found, own, tolerance)
        return {"result": "as ONNX Runtime" if same else "wrong", "why": "; ".join(wrong), "free": free}
    return row


def _said(error: Exception) -> str:
    """In one line, without the folder that it lay in: a run gives the page that the run before gave; and without the backend."""
    place = (
        re.escape(tempfile.gettempdir()) + r"/\w+/|^case on \S+ for \S+: |^\S+ for \S+: (?=\d+ unsupported)"
    )
    return re.sub(place, "", " ".join(str(error).split()))[:160]


def _with_constants(model: onnx.ModelProto, given: Arrays, free: Sequence[str]) -> onnx.ModelProto:
    """The model with all inputs constant but those in ``free``."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for port in tuple(made.graph.input):
        if port.name not in free:
            made.graph.input.remove(port)
            made.graph.initializer.append(numpy_helper.from_array(given[port.name], port.name))
    return made


def _run(backend: str, model: onnx.ModelProto, feeds: Arrays) -> Arrays:
    name, chosen = WAYS[backend]
    engine, device = BACKENDS[backend](), target(name)
    options = engine.options.model_validate(chosen)
    graph = load(model.SerializeToString(), check=False)
    exchanged(graph, "case")
    run_passes(graph, Recipe.load("cleanup").passes, Context(target=device))
    legalize(graph, engine, device, name="case")
    with tempfile.TemporaryDirectory() as place:
        engine.lower(graph, device, options, Path(place))
        with engine.load(Path(place), device, options) as session:
            found: Arrays = session.run(feeds)
            return found


def _of_onnx_runtime(model: onnx.ModelProto, given: Arrays) -> Arrays | None:
    """What it makes of the case as it stands, without anything of ours; None where it has no kernel."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return dict(zip((o.name for o in session.get_outputs()), session.run(None, given), strict=True))
    except Exception:  # noqa: BLE001  (it has no class of its own for this; the case then counts as wrong)
        return None


def _differences(found: Arrays, wanted: Arrays, tolerance: float) -> list[str]:
    """What of the outputs differs, in words."""
    said = []
    for name, right in wanted.items():
        got = np.asarray(found[name])
        if right.dtype == ml_dtypes.float8_e4m3fn and got.dtype == np.uint8:  # as ONNX Runtime hands it over
            got = got.view(right.dtype)
        if got.shape != right.shape:
            said.append(f"{name} is {list(got.shape)}, not {list(right.shape)}")
            continue
        relative = max(tolerance, _HALVES if right.dtype == np.float16 else _RELATIVE)
        a, b = (v.astype(np.complex128 if v.dtype.kind == "c" else np.float64) for v in (got, right))
        least = max(_ABSOLUTE, _OF_LARGEST * float(np.max(np.abs(b[np.isfinite(b)]), initial=0)))
        with np.errstate(all="ignore"):
            close = np.asarray(np.isclose(a, b, rtol=relative, atol=least, equal_nan=True))
        if not close.all():
            first = np.argwhere(~np.atleast_1d(close))[0]
            one, other = (np.atleast_1d(v)[tuple(first)] for v in (got, right))
            said.append(
                f"{close.size - np.count_nonzero(close)} of {close.size} of {name} differ: {one} for {other}"
            )
    return said


def text(result: Mapping[str, Any]) -> str:
    """As JSON, a case a line."""
    rows = {
        k: "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in v) + "\n]"
        for k, v in result["backends"].items()
    }
    backends = ",\n".join(f"{json.dumps(k)}: {v}" for k, v in rows.items())
    rest = json.dumps({k: v for k, v in result.items() if k != "backends"})
    return f'{rest[:-1]}, "backends": {{\n{backends}\n}}}}\n'


def markdown(result: Mapping[str, Any]) -> str:
    """The page for readers."""
    lines = [
        "# ONNX's own cases of operators",
        "",
        f"{result['processor']['name']}. " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        "",
        "Core ML verified by the reference evaluator, not executed on Apple hardware; the others run by their own runtimes here. Cases are models",
        "of one node, or of the function that defines it, by ONNX's tests of operators; those with strings, sequences and random numbers are left out.",
        "Equal are outputs within the tolerance of the case. Refused are, by an error that names them, operators, types and sizes that the backend",
        "does not have or computes otherwise, or that optkit does not translate, some of them as the file runs. Of those that stay wrong in OpenVINO",
        "`backends/openvino/misread.py` says why. Written by `python -m optkit.benchmarks.onnx_cases`, which says how.",
        "",
        "| backend | cases | equal | as ONNX Runtime, not as the case | refused | fails | wrong |",
        "|" + " --- |" * 7,
    ]  # fmt: skip
    for backend, rows in result["backends"].items():
        count = Counter(r["result"] for r in rows)
        cells = [str(count[k]) for k in ("equal", "as ONNX Runtime", "refused", "fails", "wrong")]
        lines.append(f"| {backend} | {len(rows)} | {' | '.join(cells)} |")
    for backend, rows in result["backends"].items():
        every = Counter(r["operator"] for r in rows)
        equal = Counter(r["operator"] for r in rows if r["result"] == "equal")
        never = ", ".join(sorted(o for o in every if not equal[o]))
        lines += ["", f"**{backend}**: of {len(every)} operators, no case is equal of: {never}."]
        lines += [
            f"* {r['name']}: {r['result']}: {r['why']}"
            for r in rows
            if r["result"] in ("fails", "wrong", "as ONNX Runtime")
        ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m optkit.benchmarks.onnx_cases", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument(
        "--backend", action="append", choices=list(WAYS), help="may be repeated; others stay as they are"
    )
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="cases whose names hold it; nothing is written"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FOLDER", help="for onnx_cases.{json,md}"
    )
    asked = parser.parse_args(arguments)
    place = asked.out / "onnx_cases.json"
    backends = json.loads(place.read_text())["backends"] if place.exists() else {}
    for backend in asked.backend or WAYS:
        rows = []
        for name, model, given, wanted, tolerance in cases():
            if asked.only in name:
                operator = (
                    name.removeprefix("test_").partition("_")[0]
                    if not model.graph.node
                    else model.graph.node[0].op_type
                )
                rows.append(
                    {"name": name, "operator": operator, **examine(backend, model, given, wanted, tolerance)}
                )
                if rows[-1]["result"] in ("fails", "wrong") or asked.only:
                    print(backend, rows[-1], file=sys.stderr, flush=True)
        backends[backend] = rows
    if not asked.only:
        result = {
            "schema": 1,
            "processor": processor(),
            "versions": versions(),
            "backends": {k: backends[k] for k in WAYS if k in backends},
        }
        asked.out.mkdir(parents=True, exist_ok=True)
        place.write_text(text(result), encoding="utf-8")
        (asked.out / "onnx_cases.md").write_text(markdown(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
