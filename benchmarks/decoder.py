"""One step of a decoder, SmolLM2-135M, on this machine's CPU: time, size and perplexity with weights in fewer bits.

    python -m optkit.benchmarks.decoder --only onnxruntime-w4 --out results/

A step takes a token, its place and the cache of those before, and gives the scores of the next; weights are those of the
package's 4-bit file, unpacked to float32. Perplexity is that of English prose (Python's own documentation) in pieces of 24
tokens by the longest that fit, each piece with the caches that the variant itself computes. CPU time of one thread, median
over rounds, in turn with ONNX Runtime fp32, each in processes of its own, one after the other. Calibration data are steps of
other pieces. Peers: ONNX Runtime's dynamic quantization and its own quantizer for weights in 4 bits.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import optkit
from optkit.bench import median_ratio
from optkit.benchmarks.apart import in_turn, keep
from optkit.benchmarks.lines import words
from optkit.benchmarks.tables import processors, table
from optkit.evaluate import Run
from optkit.reference import ReferenceSession

_PIECES, _TOKENS, _CALIBRATION, _EVERY = 20, 24, 8, 5
_SEATINGS, _ROUNDS, _SETTLE = 3, 10, 2
REFERENCE = "ORT fp32"


@cache
def _model() -> Path:
    from optkit.benchmarks.builders import phone

    path = Path(tempfile.mkdtemp(prefix="optkit-decoder-")) / "model.onnx"
    phone.decoder(path)
    return path


@cache
def _pieces() -> np.ndarray:
    """Tokens ``[pieces, tokens]``, of calibration first."""
    from optkit.benchmarks.builders import gguf, phone

    known = gguf.read(phone.fetched("SmolLM2-135M-Instruct.Q4_1.gguf"))[0]["tokenizer.ggml.tokens"]
    places, text, at = {w: i for i, w in enumerate(known)}, "Ġ".join(words(held_out=False)[:4000]), 0
    found = list[int]()
    while len(found) < (_PIECES + _CALIBRATION) * _TOKENS:
        size = max(n for n in range(1, 17) if text[at : at + n] in places)
        found.append(places[text[at : at + size]])
        at += size
    return np.array(found).reshape(-1, _TOKENS)


def _steps(run: Run, tokens: Sequence[int] | np.ndarray) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Inputs and scores of each step, with the caches that ``run`` gives."""
    from optkit.benchmarks.builders.phone import PLACES

    kept: dict[str, np.ndarray] = {f"in_{i}": np.zeros((1, 3, PLACES, 64), np.float32) for i in range(60)}
    steps = []
    for place, token in enumerate(tokens):
        feeds = {"token": np.array([token]), "place": np.array([place]), **kept}
        outputs = run(feeds)
        kept = {f"in_{i}": outputs[f"out_{i}"] for i in range(60)}
        steps.append((feeds, outputs["scores"][0]))
    return steps


def _surprise(run: Run) -> np.ndarray:
    """Mean negative log-likelihood of the tokens of each piece but its first, in nats."""
    found = []
    for tokens in _pieces()[_CALIBRATION:]:
        scores = np.stack([s for _, s in _steps(run, tokens)][:-1]).astype(np.float64)
        top = scores.max(1)
        logsum = np.log(np.exp(scores - top[:, None]).sum(1)) + top
        found.append(float((logsum - scores[np.arange(len(scores)), tokens[1:]]).mean()))
    return np.array(found)


@cache
def _reference() -> np.ndarray:
    return _surprise(_fp32(_model()))


@cache
def _calibration() -> list[dict[str, np.ndarray]]:
    run = _fp32(_model())
    return [f for tokens in _pieces()[:_CALIBRATION] for f, _ in _steps(run, tokens)[2::_EVERY]]


def _fp32(file: Path) -> Run:
    return ReferenceSession(file).run


def _artifact(folder: Path) -> Run:
    return optkit.load(folder).session(threads=1).run


def _compiled(recipe: str, folder: Path) -> tuple[Callable[[], Run], int]:
    # What is lost is what this measures: no limit sends it back to float.
    artifact, _ = optkit.compile(
        _model(), target="cpu", recipe=recipe, data=_calibration(), out=folder / "artifact",
        overrides=["limits.min_cosine=0", "limits.min_speedup=0", "repair=false"],
    )  # fmt: skip
    return partial(_artifact, folder / "artifact"), sum(f.bytes for f in artifact.manifest.files)


def _dynamic(folder: Path) -> tuple[Callable[[], Run], int]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file = folder / "dynamic.onnx"
    quantize_dynamic(str(_model()), str(file), weight_type=QuantType.QInt8, per_channel=True)
    return partial(_fp32, file), file.stat().st_size


def _bits(folder: Path) -> tuple[Callable[[], Run], int]:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(onnx.load(_model()), block_size=32, is_symmetric=True, accuracy_level=4)
    made.process()
    file = folder / "bits.onnx"
    made.model.save_model_to_file(str(file))
    return partial(_fp32, file), file.stat().st_size


VARIANTS: Mapping[str, Callable[[Path], tuple[Callable[[], Run], int]]] = {
    "int8-dynamic": partial(_compiled, "int8-dynamic"),
    "onnxruntime-w4": partial(_compiled, "onnxruntime-w4"),
    "openvino-w4": partial(_compiled, "openvino-w4"),
    "ORT dynamic, per channel": _dynamic,
    "ORT MatMulNBits, level 4": _bits,
}


def measure(name: str) -> dict[str, Any]:
    """A variant: milliseconds, speed-up, bytes, and what it does to the perplexity."""
    folder = Path(tempfile.mkdtemp(prefix="optkit-decoder-"))
    try:
        open_, size = VARIANTS[name](folder)
        surprise, before = _surprise(open_()), _reference()
        feeds = keep(_calibration()[:4], folder / "feeds.npz")
        openers: dict[str, Callable[[], Run]] = {REFERENCE: partial(_fp32, _model()), name: open_}
        times = in_turn(openers, feeds, seatings=_SEATINGS, rounds=_ROUNDS, settle=_SETTLE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    mine, theirs = times[name], times[REFERENCE]
    ratio, ci95 = median_ratio(theirs, mine)
    more = np.random.default_rng(0).choice(surprise - before, (2000, len(before))).mean(1)
    return {
        "name": name,
        "ms": round(float(np.median(mine)) * 1e3, 2),
        "reference_ms": round(float(np.median(theirs)) * 1e3, 2),
        "speedup": round(ratio, 3),
        "speedup_ci95": [round(x, 3) for x in ci95],
        "bytes": size,
        "perplexity": round(math.exp(surprise.mean()), 2),
        "reference_perplexity": round(math.exp(before.mean()), 2),
        "factor_ci95": [round(math.exp(x), 3) for x in np.percentile(more, (2.5, 97.5))],
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The page."""
    rows = result["models"]
    lines = [
        "# A decoder on this CPU",
        "",
        f"{processors(result)}, one thread. Written by `python -m optkit.benchmarks.decoder`, which says how.",
        "",
        f"SmolLM2-135M, a token a step, float32: {rows[0]['reference_ms']} ms in ONNX Runtime, perplexity "
        f"{rows[0]['reference_perplexity']} (on {_PIECES} pieces of {_TOKENS} tokens), {_model_megabytes(result):.0f} MB.",
        "",
        "| variant | CPU ms a token | speed-up [95 %] | MB | perplexity | times float's [95 %] |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        low, high = r["speedup_ci95"]
        factor = r["perplexity"] / r["reference_perplexity"]
        lines.append(
            f"| {r['name']} | {r['ms']} | {r['speedup']:.2f} [{low:.2f}, {high:.2f}] | {r['bytes'] / 1e6:.0f} "
            f"| {r['perplexity']} | {factor:.3f} [{r['factor_ci95'][0]}, {r['factor_ci95'][1]}] |"
        )
    return "\n".join(lines) + "\n"


def _model_megabytes(result: Mapping[str, Any]) -> float:
    return float(result["bytes"]) / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    ort.set_default_logger_severity(4)
    table(
        "decoder", __doc__, arguments, known=list(VARIANTS), measure=measure, markdown=markdown,
        more=lambda: {"bytes": _model().stat().st_size},
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
