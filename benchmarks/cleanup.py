"""Clean up the graphs of the suite and compare with onnxslim and onnxsim: nodes, time, numbers.

    pip install onnxslim onnxsim
    python -m optkit.benchmarks.cleanup --only ppocr4_rec --out results/

Every tool reads the file as published and writes its own, with its default settings; optkit runs the recipe ``cleanup``.
Time is CPU time of the process and its children, the shortest of some rounds in which the tools take turns; imports and
a first untimed round are left out. optkit's comparison of converted opsets on random inputs is left out too (``check=False``):
the others have no such step in their defaults, or none that is timed here. Nodes are counted in bodies of control flow and
in functions, once a call; Constant nodes are not counted. Numbers are those of ONNX Runtime with its own rewrites off,
on calibration inputs; the difference is the largest one of an output as a share of the largest value of that output.
Beside it stands how far ONNX Runtime's own rewrites, or sums in float64, move the same outputs: what float32 rounding amounts
to there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from optkit.benchmarks import suite
from optkit.benchmarks.exact_sums import with_exact_sums
from optkit.benchmarks.machine import processor, versions
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.errors import BackendUnavailableError, OptkitError, UnknownNameError
from optkit.evaluate import load_python
from optkit.frontend import load
from optkit.passes.base import Context
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.store import save
from optkit.targets import target

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).parent / "results"
PEERS = ("onnxslim", "onnxsim")
_ROUNDS, _BATCHES = 5, 3
# Some roundings of float32, as in `optkit.equivalence`; more where the runtime's own rewrites, or sums that are rounded once,
# move the outputs as much.
_ROUNDING, _ALIKE = 1e-5, 2

Tool = Callable[[Path, Path], None]


def optkit(source: Path, out: Path) -> None:
    """The recipe ``cleanup``."""
    model = load(source, check=False)
    run_passes(model, Recipe.load("cleanup").passes, Context(target=target("cpu")))
    save(model, out)


def onnxslim(source: Path, out: Path) -> None:
    """Its defaults."""
    onnx.save(importlib.import_module("onnxslim").slim(str(source)), str(out))


def onnxsim(source: Path, out: Path) -> None:
    """Its defaults."""
    simplified, _ = importlib.import_module("onnxsim").simplify(onnx.load(str(source)))
    onnx.save(simplified, str(out))


TOOLS: dict[str, Tool] = {"optkit": optkit, "onnxslim": onnxslim, "onnxsim": onnxsim}


def count(model: onnx.ModelProto) -> int:
    """Nodes, Constant nodes left out, with bodies and with functions once a call."""
    functions = {(f.domain, f.name): f for f in model.functions}

    def inside(nodes: Sequence[onnx.NodeProto]) -> int:
        found = 0
        for node in nodes:
            called = functions.get((node.domain, node.op_type))
            found += inside(called.node) if called is not None else node.op_type != "Constant"
            for attribute in node.attribute:
                bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
                found += sum(inside(body.node) for body in bodies)
        return found

    return inside(model.graph.node)


def difference(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> float:
    """The largest difference of an output, as a share of the largest value of that output; infinite where shapes differ."""
    worst = 0.0
    if list(before) != list(after):
        return float("inf")
    for name, a in before.items():
        b = after[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if a.size and not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            x, y = a.astype(np.float64), b.astype(np.float64)
            if not np.array_equal(np.isfinite(x), np.isfinite(y)):
                return float("inf")
            x, y = x[np.isfinite(x)], y[np.isfinite(x)]
            worst = max(worst, float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)))
    return worst


def measure(name: str) -> dict[str, Any]:
    """All tools on one model of the suite."""
    path = suite.fetch(name)
    calibration = load_python(EVALUATORS / SUITE[name].evaluator, "evaluator").calibration
    feeds = list(islice(calibration(), _BATCHES))
    folder = Path(tempfile.mkdtemp(prefix=f"optkit-{name}-"))
    try:
        reference = ReferenceSession(path, optimize=False)
        expected = [reference.run(batch) for batch in feeds]
        others = ReferenceSession(path), ReferenceSession(with_exact_sums(path), optimize=False)
        moved = max(difference(e, o.run(b)) for o in others for e, b in zip(expected, feeds, strict=True))
        seconds: dict[str, list[float]] = {tool: [] for tool in TOOLS}
        failed: dict[str, str] = {}
        for index in range(1 + _ROUNDS):
            for tool, clean in TOOLS.items():
                if tool in failed:
                    continue
                start = _cpu_seconds()
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        clean(path, folder / f"{tool}.onnx")
                except Exception as error:  # noqa: BLE001  (the peers raise anything; the row says what)
                    failed[tool] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    continue
                if index:
                    seconds[tool].append(_cpu_seconds() - start)
        rows: dict[str, dict[str, Any]] = {}
        for tool in TOOLS:
            if tool in failed:
                rows[tool] = {"error": failed[tool]}
                continue
            file = folder / f"{tool}.onnx"
            try:
                session = ReferenceSession(file, optimize=False)
                worst = max(difference(e, session.run(b)) for e, b in zip(expected, feeds, strict=True))
            except OptkitError as error:
                rows[tool] = {"error": str(error).replace(str(folder), "")[:200]}
                continue
            rows[tool] = {
                "nodes": count(onnx.load(str(file), load_external_data=False)),
                "seconds": round(min(seconds[tool]), 4),
                "difference": float(f"{worst:.2g}") if np.isfinite(worst) else None,
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    nodes = count(onnx.load(str(path), load_external_data=False))
    return {"name": name, "nodes": nodes, "runtime_difference": float(f"{moved:.2g}"), "tools": rows}


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def shortfalls(found: Mapping[str, Any]) -> list[str]:
    """What optkit promises and did not keep on this model, in words."""
    own, slim = found["tools"]["optkit"], found["tools"]["onnxslim"]
    if "error" in own:
        return [own["error"]]
    missed = []
    for peer in PEERS:
        other = found["tools"][peer]
        if "error" not in other and own["nodes"] > other["nodes"]:
            missed.append(f"{own['nodes'] - other['nodes']} nodes more than {peer}")
    if "error" not in slim and own["seconds"] > slim["seconds"]:
        missed.append(f"{own['seconds'] / slim['seconds']:.2f}x the time of onnxslim")
    if own["difference"] is None or own["difference"] > max(_ROUNDING, _ALIKE * found["runtime_difference"]):
        missed.append("other numbers")
    return missed


def markdown(result: Mapping[str, Any]) -> str:
    """The page for readers."""
    chip = result["machine"]["processor"]
    head = ("model", "nodes", *TOOLS, *(f"{t}, CPU s" for t in TOOLS), "difference", "rounding", "missed")
    lines = [
        "# Graph clean-up",
        "",
        f"{chip['name']}. " + ", ".join(f"{k} {v}" for k, v in result["machine"]["versions"].items()) + ".",
        "",
        "Nodes and CPU seconds from file to file, each tool with its defaults; how far optkit's graph moves the outputs,",
        "and how far ONNX Runtime's own rewrites, or sums in float64, move them, as a share of the largest value.",
        "Written by `python -m optkit.benchmarks.cleanup`, which says how.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    for found in result["models"]:
        rows = [found["tools"][tool] for tool in TOOLS]
        cells = [
            found["name"],
            str(found["nodes"]),
            *(str(row.get("nodes", "failed")) for row in rows),
            *(f"{row['seconds']:.2f}" if "seconds" in row else "-" for row in rows),
            _scientific(rows[0].get("difference")),
            _scientific(found["runtime_difference"]),
            "; ".join(shortfalls(found)) or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failures = [
        f"* {found['name']}, {tool}: {row['error']}"
        for found in result["models"]
        for tool, row in found["tools"].items()
        if "error" in row
    ]
    return "\n".join([*lines, *(["", *failures] if failures else [])]) + "\n"


def _scientific(x: float | None) -> str:
    return "-" if x is None else f"{x:.1e}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 1 where optkit falls short of a peer."""
    parser = argparse.ArgumentParser(
        prog="python -m optkit.benchmarks.cleanup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="a model of the suite; may be repeated"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for cleanup.{json,md}")
    options = parser.parse_args(arguments)
    for name in options.only or ():
        if name not in SUITE:
            raise UnknownNameError("model", name, SUITE)
    if missing := [peer for peer in PEERS if find_spec(peer) is None]:
        raise BackendUnavailableError(
            f"{', '.join(missing)} is not installed", hint=f"pip install {' '.join(missing)}"
        )
    models, code = [], 0
    for name in options.only or SUITE:
        print(name, file=sys.stderr)
        # A process each: the peers are native code, and a crash costs one model.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                models.append(pool.submit(measure, name).result())
            except (OptkitError, BrokenProcessPool) as error:
                print(f"error: {name}: {error}", file=sys.stderr)
                code = 1
    found = {peer: version(peer) for peer in PEERS}
    result = {
        "schema": 1,
        "machine": {"processor": processor(), "versions": {**versions(), **found}},
        "models": models,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cleanup.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (options.out / "cleanup.md").write_text(markdown(result), "utf-8")
    print(markdown(result), end="")
    return code or int(any(shortfalls(m) for m in models))


if __name__ == "__main__":
    sys.exit(main())
