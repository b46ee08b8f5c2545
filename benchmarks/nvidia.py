"""Compile models for GPUs of NVIDIA's and AMD's without having one: what is built, what its plan shows, what it computes.

    python -m optkit.benchmarks.nvidia --only "minilm_l6 h100 triton-int8"

Each row is one run of ``optkit compile`` in a process of its own, with the model's calibration data. Engines are TensorRT-RTX's,
for the very card; for ``h100`` TensorRT's are built on the device, and TensorRT-RTX's plan is that of a proxy. Shares are of the
layers with weights, and of all multiply-accumulates, as the engine's plan names them; where the kernels are Triton's, as the graph
calls them. Outputs are those of the typed graph, or of the bodies of the kernels, on this processor, held against ONNX Runtime's of
the file as published; the metric is that of the model's evaluator with a budget of 1 %, for ``l4`` (other cards have the same typed
graph), for ``nvfp4`` and for Triton on ``h100``, where weights are trained. Where a recipe misses it and floats ship, plan, layers,
size and cosine are those of the floats; the engine that did not ship stands in a row ``without metric``. Rows without a metric were
judged by nothing, their limits switched off (``limits.min_cosine=0``): that they were built is all that is said of them. Rows that
are missing were not measured. Programs are compiled anew. CPU seconds are those of all processes, from the file to the artifact,
with calibration and judging. Nothing ran on a GPU.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import onnx_ir as ir

import optkit
from optkit.backends.tensorrt import bundle
from optkit.backends.tensorrt.verdict import Record
from optkit.backends.triton import bundle as kernels
from optkit.benchmarks import suite
from optkit.benchmarks.builders import phone
from optkit.benchmarks.fetch import cache
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.benchmarks.tables import processors, table
from optkit.closeness import closeness
from optkit.evaluate import load_python
from optkit.graph import constant, walk
from optkit.microscaling import BLOCK_FORMATS
from optkit.ops import spec
from optkit.reference import ReferenceSession

DECODER = "smollm2_135m"
MODELS = ("minilm_l6", "ppocr4_rec", "ppocr4_det", "efficientnet_lite0", "vit_s_shaped", DECODER)
_CONVOLUTIONS = frozenset({"ppocr4_rec", "ppocr4_det", "efficientnet_lite0"})
ENGINES = (
    ("l4", "tensorrt-int8"),
    ("l4", "fp8"),
    ("rtx4090", "tensorrt-int8"),
    ("rtx4090", "fp8"),
    ("h100", "fp8"),
)
# Kernels of ours for convolutions are depthwise ones in float16.
PROGRAMS = {
    name: ("triton-fp16",) if name in _CONVOLUTIONS else ("triton-int8", "triton-fp8", "triton-fp8-blocks")
    for name in MODELS
}
# Linear layers alone have operands in 4 bits.
_FOUR = ("rtx5090", "tensorrt-nvfp4")
# Convolutional networks miss the budget by recipe; what is searched for keeps layers in float until they do not.
_SEARCHED = ("l4", "int8")
# Channels of activations stand out in front of linear layers.
_SMOOTH = ("l4", "tensorrt-int8-smooth")
# What ships where a recipe misses, by the names of candidates.
_FLOATS = {"float": "missed: float32 ships", "unquantized": "missed: float16 ships"}
# A row's last word: nothing is judged, so that the engine is that of the recipe whatever it loses.
_UNJUDGED = "unjudged"
ROWS = tuple(
    f"{model} {target} {recipe}"
    for model in MODELS
    for target, recipe in (
        *ENGINES,
        *((_SEARCHED,) if model in _CONVOLUTIONS else (_SMOOTH, _FOUR)),
        *(("h100", recipe) for recipe in PROGRAMS[model]),
        ("mi300x", PROGRAMS[model][0]),
    )
) + tuple(f"{DECODER} l4 {recipe} {_UNJUDGED}" for recipe in ("tensorrt-int8", "fp8"))
_NARROW = ("int8", "fp8", "nvfp4")
_CALLS = tuple(fmt.dequantize for fmt in BLOCK_FORMATS.values())
_BATCHES = 3


def _source(model: str) -> tuple[Path, Path]:
    """The model's file, and its data and evaluator."""
    if model != DECODER:
        return suite.fetch(model), EVALUATORS / SUITE[model].evaluator
    path = cache() / "models" / DECODER / f"{DECODER}.onnx"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}")
        phone.decoder(part)
        part.replace(path)
    return path, EVALUATORS / "smollm2.py"


def measure(name: str) -> dict[str, Any]:
    """One row."""
    model, target, recipe, *unjudged = name.split()
    path, evaluator = _source(model)
    module = load_python(evaluator, "evaluator")
    judged = (
        not unjudged
        and hasattr(module, "samples")
        and (target == "l4" or (target, recipe) == _FOUR or (target == "h100" and recipe in PROGRAMS[model]))
    )
    with tempfile.TemporaryDirectory(prefix="optkit-nvidia-") as folder:
        out = Path(folder) / "out"
        row = _compile(path, target, recipe, evaluator, judged, out)
        if "failed" not in row:
            feeds = list(islice(module.calibration(), _BATCHES))
            reference = ReferenceSession(path)
            expected = [reference.run(batch) for batch in feeds]
            reference.close()
            artifact = optkit.load(out)
            given = [artifact.run(batch) for batch in feeds]
            row |= _look(out)
            row["cosine"] = min(
                closeness(value, found[key])["cosine"]
                for found, wanted in zip(given, expected, strict=True)
                for key, value in wanted.items()
                if value.dtype.kind == "f"
            )
    print(name, row.get("failed") or row["reason"] or "kept", file=sys.stderr, flush=True)
    return {"name": name, "model": model, "target": target, "recipe": recipe, **row}


def _compile(
    path: Path, target: str, recipe: str, evaluator: Path, judged: bool, out: Path
) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "optkit", "compile", str(path), "--target", target, "--recipe", recipe, "--out", str(out), "--json",
        "--calib", f"{evaluator}:calibration",
        *(["--eval", str(evaluator), "--max-drop", "1%"] if judged else ["--set", "limits.min_cosine=0"]),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="optkit-cache-") as fresh:
        for kept in ("models", "data"):
            (Path(fresh) / kept).symlink_to(cache() / kept)
        before = _cpu()
        done = subprocess.run(
            command, env=os.environ | {"OPTKIT_CACHE": fresh}, capture_output=True, text=True, check=False
        )
    spent = round(_cpu() - before, 1)
    if done.returncode not in (0, 3, 5):
        return {"failed": " ".join(done.stderr.strip().splitlines()[-2:])[:400], "cpu_seconds": spent}
    report = json.loads(done.stdout)
    manifest = report["manifest"]
    first, last = report["candidates"][0], report["candidates"][-1]
    # Where floats shipped, the row is about what did not.
    tried, judged_by = (first if last["name"] in _FLOATS else last), manifest["accuracy"] or {}
    # What is plainly missed is judged by the first samples alone, and so is the reference that it is compared with.
    reference = None if tried["metric"] is None else tried["metric"] + tried["drop"]
    return {
        "verdict": tried["verdict"], "reason": tried["reason"], "cpu_seconds": spent, "shipped": last["name"],
        "metric": judged_by.get("metric"), "reference": reference, "candidate": tried["metric"],
        "drop": tried["drop"], "ci95": tried["ci95"], "bytes": manifest["size"]["after"],
        "formats": manifest["achieved"]["formats"], "evidence": [k for k, v in manifest["evidence"].items() if v],
        "deferred": len(manifest["deferred"]), "estimate": report["estimate"],
    }  # fmt: skip


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _look(out: Path) -> dict[str, Any]:
    """What is in the artifact: layers with weights by format, and programs."""
    record = Record.load(out)
    if record is None:
        facts = kernels.read(out)
        programs = {name for row in facts["launches"] for name in row["kernels"]}
        called = [
            row["op"] for row in facts["launches"] if row["op"].startswith(("Linear", "MatMul", "Depthwise"))
        ]
        left = [n for n in walk(ir.load(out / kernels.MODEL)) if n.domain == "" and _weighted(n)]
        eight = sum(op.startswith(("LinearInt8", "LinearFp8")) for op in called)
        return {
            "layers": [eight, len(called) + len(left)], "launches": len(facts["launches"]), "programs": len(programs), "plan": None,
            "without_kernel": len(facts["without_kernel"]),
        }  # fmt: skip
    layers = [str(n.name) for n in walk(ir.load(out / bundle.MODEL)) if _weighted(n)]
    narrow = sum(record.products.get(name) in _NARROW for name in layers)
    unnamed = sum(name not in record.products for name in layers)
    return {
        "layers": [narrow, len(layers)], "unnamed": unnamed, "plan": record.where, "sha256": record.sha256,
        "operations": sum(record.operations.values()),
    }  # fmt: skip


def _weighted(node: ir.Node) -> bool:
    """Whether it multiplies with a constant, which may go through a grid."""
    known = spec(node)
    if known is None or known.macs is None or len(node.inputs) < 2:
        return False
    weight = node.inputs[1]
    for _ in range(3):
        producer = None if weight is None else weight.producer()
        if producer is None or producer.op_type not in (
            "DequantizeLinear",
            "QuantizeLinear",
            "Cast",
            "Transpose",
            *_CALLS,
        ):
            break
        weight = producer.inputs[0]
    return weight is not None and constant(weight) is not None


def markdown(result: Mapping[str, Any]) -> str:
    """The page for readers."""
    lines = [
        "# GPUs of NVIDIA and AMD, without one",
        "",
        *(line for line in (__doc__ or "").split("\n\n")[2].strip().splitlines()),
        "Written by `python -m optkit.benchmarks.nvidia`.",
        "",
        f"{processors(result)}. " + ", ".join(f"{k} {v}" for k, v in result["machine"]["versions"].items()) + ".",
        "",
        "## TensorRT",
        "",
        "| model | target | recipe | plan | layers in 8 bits or less | of all MACs | launches | MB | cosine | metric: float → this (drop at most) | verdict | CPU s |",
        "|" + " --- |" * 12,
    ]  # fmt: skip
    for row in _rows(result, engines=True):
        plan = "-" if "failed" in row else row["plan"] or "typed graph"
        lines.append(_line(row, plan, str(row.get("operations", "-"))))
    lines += [
        "",
        "## Triton",
        "",
        "| model | target | recipe | programs of launches | layers in 8 bits or less | of all MACs | nodes without kernel | MB | cosine | metric: float → this (drop at most) | verdict | CPU s |",
        "|" + " --- |" * 12,
    ]
    for row in _rows(result, engines=False):
        programs = "-" if "failed" in row else f"{row['programs']} of {row['launches']}"
        lines.append(_line(row, programs, str(row.get("without_kernel", "-"))))
    notes = [
        f"* {row['name']}: {row.get('failed') or row['reason']}"
        for row in (*_rows(result, engines=True), *_rows(result, engines=False))
        if row.get("failed") or row["reason"]
    ]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def _rows(result: Mapping[str, Any], *, engines: bool) -> list[Mapping[str, Any]]:
    return [row for row in result["models"] if row["recipe"].startswith("triton") != engines]


def _line(row: Mapping[str, Any], plan: str, launches: str) -> str:
    head = f"| {row['model']} | {row['target']} | {row['recipe']} | {plan} |"
    if "failed" in row:
        return head + " - |" * 6 + f" failed | {row['cpu_seconds']:.0f} |"
    narrow, layers = row["layers"]
    macs = sum(row["formats"].get(f, 0.0) for f in _NARROW)
    metric = "without metric" if row["name"].endswith(_UNJUDGED) else "-"
    if row["candidate"] is not None:
        metric = f"{row['metric']}: {row['reference']:.4f} → {row['candidate']:.4f} ({row['ci95'][1]:+.4f})"
    recipe, _, mixed = row["shipped"].partition("-mixed-")
    kept = "built" if row["candidate"] is None else "kept"
    verdict = {"recipe": kept, **_FLOATS}.get(recipe, f"kept: {recipe}")
    verdict += f", {mixed} layers in float" if mixed else ""
    return (
        f"{head} {narrow} of {layers} | {macs:.0%} | {launches} | {row['bytes'] / 1e6:.1f} | {row['cosine']:.5f} | {metric} "
        f"| {verdict} | {row['cpu_seconds']:.0f} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    table("nvidia", __doc__, arguments, known=ROWS, measure=measure, markdown=markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
