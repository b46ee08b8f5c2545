"""Write the models of the suite for LiteRT and run them there: error, accuracy, speed, size.

    python -m optkit.benchmarks.litert --only minilm_l6 --out results/

Each model goes through ``litert-fp32`` and through the integers that suit it: ``litert-int8`` where it is made of
convolutions, ``litert-int8-dynamic`` where of linear layers. The error is the largest difference of an output to ONNX
Runtime's (its own rewrites off, float32, the file as published) as a share of the largest value of that output, on calibration
inputs. Accuracy is that of the model's evaluator, sample by sample against ONNX Runtime's. Times are CPU time on one thread of
this machine, LiteRT's float32 in turn with ONNX Runtime's and LiteRT's integers in turn with its float32; phones differ.
Free axes have the sizes of the data; texts are padded to a multiple of 32 words, as an app would do.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from optkit.backends.litert.lower import LiteRt, LiteRtOptions
from optkit.backends.sizes import inputs, keys
from optkit.bench import speedup
from optkit.benchmarks import suite
from optkit.benchmarks.coreml import difference
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.benchmarks.tables import processors, table
from optkit.data import CalibrationData
from optkit.errors import OptkitError
from optkit.evaluate import Budget, Evaluator, compare, load_python
from optkit.frontend import load
from optkit.legalize import legalize
from optkit.passes.base import Context
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.targets import target

TARGET = "android-cpu"
_BATCHES, _LARGEST = 3, 48
# Made of linear layers; integers from layer to layer are for convolutions.
_DYNAMIC = frozenset({"minilm_l6", "vit_s_shaped"})
_WORDS = 32
# As for the model families: what may differ in float32 by roundings, or by twice what ONNX Runtime's own rewrites move.
_ROUNDING, _ALIKE = 1e-4, 2

Feeds = dict[str, np.ndarray]


def padded(feeds: Mapping[str, np.ndarray]) -> Feeds:
    """Texts with words that the mask leaves out, up to a multiple of 32."""
    length = next(iter(feeds.values())).shape[1]
    more = -length % _WORDS
    return {name: np.pad(array, ((0, 0), (0, more))) for name, array in feeds.items()}


def _shapes(model: Any, batches: Iterable[Feeds]) -> dict[str, Any]:
    """Sizes of the free axes in the data, as ``options.shapes`` has them."""
    names = {
        str(v.name): [(axis, k) for axis, k in enumerate(keys(v)) if isinstance(k, str)]
        for v in inputs(model)
    }
    seen = dict.fromkeys(
        tuple({k: b[n].shape[a] for n, axes in names.items() for a, k in axes}.items()) for b in batches
    )
    columns = [dict(row) for row in seen]
    return {k: tuple(c[k] for c in columns) for k in columns[0]} if columns[0] else {}


def build(path: Path, recipe: str, data: Sequence[Feeds], shapes: Mapping[str, Any], folder: Path) -> Any:
    """The file of a model, opened on one thread."""
    backend, device, plan = LiteRt(), target(TARGET), Recipe.load(recipe)
    options = LiteRtOptions.model_validate({"shapes": shapes})
    model = load(path, check=False)
    context = Context(target=device, data=CalibrationData(list(data)), placements=backend.placements)
    run_passes(model, plan.passes, context)
    legalize(model, backend, device, name=path.name)
    folder.mkdir()
    backend.lower(model, device, options, folder)
    return backend.load(folder, device, options, threads=1)


def measure(name: str) -> dict[str, Any]:
    """Both files of one model of the suite."""
    path, module = suite.fetch(name), load_python(EVALUATORS / SUITE[name].evaluator, "evaluator")
    text = name == "minilm_l6"
    shape: Callable[[Mapping[str, np.ndarray]], Feeds] = padded if text else dict
    data = [shape(b) for b in islice(module.calibration(), _LARGEST)]
    trained = hasattr(module, "samples")
    seen = [shape(f) for f, _ in module.samples()] if trained else []
    reference, usual = ReferenceSession(path, optimize=False), ReferenceSession(path)
    feeds = data[:_BATCHES]
    expected = [reference.run(batch) for batch in feeds]
    moved = max(difference(a, usual.run(b)) for a, b in zip(expected, feeds, strict=True))
    quantized = "litert-int8-dynamic" if name in _DYNAMIC else "litert-int8"
    row: dict[str, Any] = {"name": name, "bytes": path.stat().st_size, "recipe": quantized}
    with tempfile.TemporaryDirectory(prefix=f"optkit-{name}-") as folder:
        try:
            shapes = _shapes(load(path, check=False), [*data, *seen])
            plain = build(path, "litert-fp32", data, shapes, Path(folder) / "fp32")
            small = build(path, quantized, data, shapes, Path(folder) / "int8")
        except OptkitError as error:
            return row | {"passed": False, "reason": str(error)[:600]}
        with plain, small:
            worst = max(difference(a, plain.run(b)) for a, b in zip(expected, feeds, strict=True))
            first = speedup(usual.run, plain.run, feeds, rounds=60, budget=20.0)
            second = speedup(plain.run, small.run, feeds, rounds=60, budget=20.0)
            row |= {
                "passed": worst <= max(_ROUNDING, _ALIKE * moved),
                "error": float(f"{worst:.2g}"),
                "bytes_fp32": _bytes(Path(folder) / "fp32"),
                "bytes_int8": _bytes(Path(folder) / "int8"),
                "fp32_over_ort": round(first.ratio, 3),
                "int8_over_fp32": round(second.ratio, 3),
                "int8_over_fp32_ci95": [round(x, 3) for x in second.ci95],
                "ms_fp32": second.reference.median * 1e3,
                "ms_int8": second.candidate.median * 1e3,
            }
            if trained:
                evaluator = _evaluator(module, shape)
                before = evaluator.scores(usual.run)
                found = compare(evaluator, before, evaluator.scores(small.run), Budget.parse("1%"))
                row |= {
                    "metric": module.METRIC, "before": found.reference, "after": found.candidate, "drop": found.drop, "ci95": found.ci95,
                    "verdict": found.verdict, "n": found.n,
                }  # fmt: skip
    return row


def _evaluator(module: Any, shape: Callable[[Mapping[str, np.ndarray]], Feeds]) -> Evaluator:
    known = Evaluator.load(module.__file__)

    def samples() -> Iterator[tuple[Feeds, Any]]:
        for feeds, label in module.samples():
            yield shape(feeds), label

    return replace(known, samples=samples)


def _bytes(folder: Path) -> int:
    return (folder / "model.tflite").stat().st_size


def markdown(result: Mapping[str, Any]) -> str:
    """The page for readers."""
    lines = [
        "# LiteRT",
        "",
        f"{processors(result)}. " + ", ".join(f"{k} {v}" for k, v in result["machine"]["versions"].items()) + ".",
        "",
        "Run by LiteRT on this machine's processor, one thread; no phone was at hand. The error of float32 is the largest difference to",
        f"ONNX Runtime as a share of the largest value; it passes up to {_ROUNDING:g}, or up to {_ALIKE} times what ONNX Runtime's own rewrites",
        "move the outputs. Speed-ups are ratios of CPU time, in turn: LiteRT float32 over ONNX Runtime float32, LiteRT int8 over its float32.",
        "Int8 gains where the processor multiplies bytes in one step (VNNI, the dot product of Arm): without, the two are about as fast.",
        "Written by `python -m optkit.benchmarks.litert`, which says how.",
        "",
        "| model | fp32 | error | over ONNX Runtime | MB | int8 recipe | over LiteRT fp32 (95 %) | MB | metric | float → int8 (drop at most) |",
        "|" + " --- |" * 10,
    ]  # fmt: skip
    for row in result["models"]:
        if "reason" in row:
            lines.append(f"| {row['name']} | fail |" + " - |" * 8)
            continue
        low, high = row["int8_over_fp32_ci95"]
        metric = "random weights: speed alone"
        if "metric" in row:
            metric = f"{row['before']:.4f} → {row['after']:.4f} ({row['ci95'][1]:+.4f}, {row['verdict']})"
        lines.append(
            f"| {row['name']} | {'pass' if row['passed'] else 'fail'} | {row['error']:.1e} | {row['fp32_over_ort']:.2f}x "
            f"| {row['bytes_fp32'] / 1e6:.1f} | {row['recipe']} | {row['int8_over_fp32']:.2f}x ({low:.2f} to {high:.2f}) "
            f"| {row['bytes_int8'] / 1e6:.1f} | {row.get('metric', '–')} | {metric} |"
        )
    reasons = [f"* {m['name']}: {' '.join(m['reason'].split())}" for m in result["models"] if "reason" in m]
    return "\n".join([*lines, *(["", *reasons] if reasons else [])]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    table("litert", __doc__, arguments, known=tuple(SUITE), measure=measure, markdown=markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
