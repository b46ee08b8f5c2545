"""Convert the models of the suite to Core ML and hold the packages against ONNX Runtime: error, seconds, size.

    python -m optkit.benchmarks.coreml --only minilm_l6 --out results/

Each model goes through the recipe ``cleanup`` into a package in float32 and one in float16, for the system that
the Apple targets run, and the reference evaluator runs what was saved. **Nothing here ran on Apple hardware.**
The error is the largest difference of an output to ONNX Runtime's (its own rewrites off, float32, the file as published),
as a share of the largest value of that output, on calibration inputs; SQNR is that of all outputs together.
Seconds are CPU time from loaded file to saved package, without importing coremltools. The evaluator's time is a ratio of CPU
times to ONNX Runtime's own, one after the other, the shortest of some rounds each.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from PIL import Image, ImageDraw

from optkit.backends.base import Session
from optkit.backends.coreml.lower import CoreMl, CoreMlOptions
from optkit.backends.coreml.package import PACKAGE, WEIGHTS
from optkit.backends.coreml.reference.machine import Machine
from optkit.backends.coreml.reference.program import Package
from optkit.backends.coreml.session import ReferenceSession as PackageSession
from optkit.benchmarks import suite
from optkit.benchmarks.exact_sums import with_exact_sums
from optkit.benchmarks.fetch import cache, digest, unpack_wheel
from optkit.benchmarks.lines import lines, tensor, words
from optkit.benchmarks.photos import crops, pixels
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.benchmarks.tables import processors, table
from optkit.errors import OptkitError
from optkit.evaluate import load_python
from optkit.frontend import load
from optkit.legalize import legalize
from optkit.passes.base import Context
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.targets import target

TARGET = "iphone15"
FORMS = ("fp32", "fp16")
_BATCHES, _ROUNDS = 3, 7
_INSIDE = "basic_pitch/saved_models/icassp_2022/nmp.mlpackage"
_FOREIGN = {
    "Manifest.json": "c1fa5ef8acc34703edcd4e90e9a8640bd4673d9f3a68753c3b9d1ca0365e2928",
    "Data/com.apple.CoreML/model.mlmodel": "af7bf7d49bc167e0bf0c30aa2ca6b432c3e10df048d2dd4173ff3a738c020858",
    "Data/com.apple.CoreML/weights/weight.bin": "691a6b63c7ddcdde0ee131ff3986dcb1250df47cd738612efde966ba9b4c99cd",
}
# A float32 program may differ by roundings, or by twice what ONNX Runtime's own rewrites, or sums in float64, move the same
# outputs: magika takes a variance as the difference of two means, and adds them up in the order that loses most. One in
# float16, by SQNR: rounding once to 11 bits leaves 74 dB, and the noise of a thousand roundings in a row is 30 dB more. Of a file
# that itself rounds to 8 bits in each run, rounding the inputs alone to float16 may move ONNX Runtime's outputs by more.
_ROUNDING, _ALIKE, _LOUDEST = 1e-5, 2, 35.0


def difference(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """The largest one, as a share of the largest value of its output; infinite where shapes or infinities differ."""
    worst = 0.0
    for name, a in expected.items():
        b = found[name]
        if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return float("inf")
        x, y = (v[np.isfinite(v)].astype(np.float64) for v in (a, b))
        if x.size:
            worst = max(worst, float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)))
    return worst


def noise(expected: Sequence[Mapping[str, np.ndarray]], found: Sequence[Mapping[str, np.ndarray]]) -> float:
    """SQNR of all float outputs together, in dB; none at all where one is of another size."""
    signal = error = 0.0
    for a, b in zip(expected, found, strict=True):
        for name, x in a.items():
            if x.shape != b[name].shape:
                return -float("inf")
            if x.dtype.kind == "f":
                wide = x.astype(np.float64)
                signal += float(np.square(wide).sum())
                error += float(np.square(wide - b[name]).sum())
    return 10 * float(np.log10(signal / error)) if error and signal else float("inf")


def _apart(worst: float, sqnr: float) -> dict[str, float | None]:
    """What the record says of them; None is infinite."""
    return {
        "error": float(f"{worst:.2g}") if np.isfinite(worst) else None,
        "sqnr": round(sqnr, 1) if np.isfinite(sqnr) else None,
    }


def _seconds(session: Session | ReferenceSession, feeds: Sequence[Mapping[str, np.ndarray]]) -> float:
    start = time.process_time()
    for batch in feeds:
        session.run(batch)
    return time.process_time() - start


def _memory(folder: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What the evaluator holds at most over the package and twice the largest activation; and without the interpreter's objects.

    That is the file of weights, which lies in memory as it is, and all that Python and NumPy allocate; the text of the program is
    let go once it is read.
    """
    largest = 0

    def watch(op: Any, arguments: Mapping[str, Any], results: list[Any]) -> None:
        nonlocal largest
        largest = max(largest, *(getattr(r, "nbytes", 0) for r in results))

    with closing(PackageSession(folder)) as session:
        session.compute(session.features(feeds), watch)
    arrays = tracemalloc.DomainFilter(inclusive=False, domain=np.lib.tracemalloc_domain)
    tracemalloc.start()
    try:
        with closing(PackageSession(folder)) as session:
            for _ in range(2):
                session.compute(session.features(feeds))
            _, peak = tracemalloc.get_traced_memory()
            kept = tracemalloc.take_snapshot().filter_traces([arrays])
    finally:
        tracemalloc.stop()
    objects = sum(trace.size for trace in kept.traces)
    held = (folder / PACKAGE / WEIGHTS).stat().st_size + peak
    allowed = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) + 2 * largest
    return {"memory": round(held / allowed, 3), "memory_arrays": round((held - objects) / allowed, 3)}


def convert(
    path: Path, form: str, folder: Path, states: Mapping[str, str] | None = None
) -> tuple[Session, float]:
    """The package of a model, opened, and the CPU seconds that it took."""
    folder.mkdir(exist_ok=True)
    backend = CoreMl()
    options = CoreMlOptions(precision="fp16" if form == "fp16" else "fp32", states=dict(states or {}))
    device = target(TARGET)
    start = time.process_time()
    model = load(path, check=False)
    run_passes(model, Recipe.load("cleanup").passes, Context(target=device))
    legalize(model, backend, device, name=path.name)
    backend.lower(model, device, options, folder)
    return backend.load(folder, device, options), time.process_time() - start


def foreign() -> Path:
    """The package of basic-pitch as its authors converted it, fetched beside its ONNX twin."""
    folder = cache() / "models" / "basic_pitch" / "nmp.mlpackage"
    for member, expected in _FOREIGN.items():
        file = folder / member
        if not file.is_file() or digest(file) != expected:
            unpack_wheel(SUITE["basic_pitch"].requirement, {f"{_INSIDE}/{member}": expected}, file.parent)
    return folder


def compared() -> float:
    """How far the reference evaluator is from ONNX Runtime on a package and a model that nobody here wrote."""
    function = Package(foreign()).functions["main"]
    reference = ReferenceSession(suite.fetch("basic_pitch"))
    x = np.random.default_rng(0).normal(size=(1, 43844, 1)).astype(np.float32) * np.float32(0.1)
    found = Machine(function).run({function.inputs[0].name: x})
    expected = reference.run({reference.inputs[0]: x})
    # The twins name their outputs differently.
    return max(
        min(float(np.abs(f - e).max()) for f in found.values() if f.shape == e.shape)
        for e in expected.values()
    )


def measure(name: str) -> dict[str, Any]:
    """All forms of one model of the suite."""
    path = suite.fetch(name)
    calibration = load_python(EVALUATORS / SUITE[name].evaluator, "evaluator").calibration
    feeds = list(islice(calibration(), _BATCHES))
    reference, usual = ReferenceSession(path, optimize=False), ReferenceSession(path)
    expected = [reference.run(batch) for batch in feeds]
    exact = ReferenceSession(with_exact_sums(path), optimize=False)
    moved, summed = (
        max(difference(a, other.run(b)) for a, b in zip(expected, feeds, strict=True))
        for other in (usual, exact)
    )
    forms: dict[str, dict[str, Any]] = {}
    for form in FORMS:
        folder = Path(tempfile.mkdtemp(prefix=f"optkit-{name}-"))
        try:
            session, seconds = convert(path, form, folder)
            with session:
                found = [session.run(batch) for batch in feeds]
                pairs = [(_seconds(usual, feeds), _seconds(session, feeds)) for _ in range(_ROUNDS)]
            worst = max(difference(a, b) for a, b in zip(expected, found, strict=True))
            forms[form] = {
                "passed": worst <= max(_ROUNDING, _ALIKE * moved, _ALIKE * summed)
                if form == "fp32"
                else noise(expected, found) >= _LOUDEST,
                **_apart(worst, noise(expected, found)),
                "seconds": round(seconds, 2),
                "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
                "evaluator_ratio": round(min(b for _, b in pairs) / min(a for a, _ in pairs), 2),
            } | _memory(folder, feeds[0])
        except OptkitError as error:
            forms[form] = {"passed": False, "reason": str(error)[:600]}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return {"name": name, "bytes": path.stat().st_size, "summed": float(f"{summed:.2g}"), "forms": forms}


_Sequences = list[list[dict[str, np.ndarray]]]


def _noise() -> _Sequences:
    random = np.random.default_rng(0)
    return [[{"line": random.normal(size=(1, 1, 32, 128)).astype(np.float32)}] for _ in range(_BATCHES)]


def _tokens() -> _Sequences:
    random = np.random.default_rng(0)
    return [_steps(sequence) for sequence in random.integers(0, 2000, (_BATCHES, 24))]


def _steps(tokens: Sequence[int] | np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{"token": np.array([t]), "place": np.array([i])} for i, t in enumerate(tokens)]


def _faces() -> _Sequences:
    """Pixels as they are, which is what it was trained on."""
    return [[{"input.1": x}] for x in crops(_BATCHES, seed=2, size=640, mean=0, deviation=1 / 255)]


def _digits() -> _Sequences:
    from optkit.benchmarks.digits import Digits

    return [[{"picture": x[None].numpy()}] for x in Digits.load().test_x[:_BATCHES]]


def _lines() -> _Sequences:
    """Rendered text, grey from -1 to 1."""
    return [[{"line": tensor(p, 64, 320)[:, :1]}] for _, p in lines(_BATCHES, seed=2)]


def _captchas() -> _Sequences:
    return [[{"input1": tensor(p, 64, 180)[:, :1]}] for _, p in lines(_BATCHES, seed=3)]


def _tones() -> _Sequences:
    """Frames of 64 ms, with mean 0 and deviation 1 as the network takes them."""
    times = np.arange(1024) / 16000
    pitches = np.array([[110, 220, 330, 440], [98, 196, 294, 392], [131, 262, 523, 784]])
    waves = np.sqrt(2) * np.sin(2 * np.pi * pitches[:_BATCHES, :, None] * times)
    return [[{"frames": w.astype(np.float32)}] for w in waves]


def _spectra() -> _Sequences:
    """Powers, which mel spectra are."""
    random = np.random.default_rng(0)
    return [
        [{"mels": np.square(random.normal(size=(1, 160, 40))).astype(np.float32)}] for _ in range(_BATCHES)
    ]


def _sounds() -> _Sequences:
    """Noise as loud as speech, each stretch after silence."""
    random = np.random.default_rng(0)
    kept = np.zeros((2, 1, 128), np.float32)
    return [
        [{"sound": (0.1 * random.normal(size=(1, 576))).astype(np.float32), "kept": kept}]
        for _ in range(_BATCHES)
    ]


def _sounds_at_16_khz() -> _Sequences:
    return [[{**feeds, "rate": np.array(16000)} for feeds in sequence] for sequence in _sounds()]


# In the letters of the International Phonetic Alphabet, as espeak-ng writes English.
_SPOKEN = (
    "həlˈoʊ wˈɜːld.",
    "ɡˈʊd mˈɔːɹnɪŋ, hˌaʊ ˈɑːɹ juː?",
    "ðə kwˈɪk bɹˈaʊn fˈɑːks dʒˈʌmps ˌoʊvɚ ðə lˈeɪzi dˈɑːɡ.",
)


def _spoken() -> _Sequences:
    """Sentences without the noise that makes each reading another: Core ML draws others than ONNX Runtime."""
    from optkit.benchmarks.builders import phone

    known = json.loads(phone.fetched("en_US-joe-medium.onnx.json").read_text("utf-8"))["phoneme_id_map"]
    found: _Sequences = []
    for text in _SPOKEN[:_BATCHES]:
        # A pause between any two, as it was trained.
        places = [
            known["^"][0],
            *(i for letter in text for i in (known["_"][0], known[letter][0])),
            known["_"][0],
            known["$"][0],
        ]
        scales = np.array([0, 1, 0], np.float32)
        found.append(
            [{"input": np.array([places]), "input_lengths": np.array([len(places)]), "scales": scales}]
        )
    return found


def _grids() -> _Sequences:
    """Tables of three sizes, numbers in their cells."""
    random = np.random.default_rng(0)
    found: _Sequences = []
    for rows, columns in ((3, 3), (4, 5), (6, 4))[:_BATCHES]:
        picture = Image.new("RGB", (488, 488), "white")
        pen, right, low = ImageDraw.Draw(picture), 30 + 85 * columns, 30 + 60 * rows
        for i in range(rows + 1):
            pen.line((30, 30 + 60 * i, right, 30 + 60 * i), fill="black", width=2)
        for i in range(columns + 1):
            pen.line((30 + 85 * i, 30, 30 + 85 * i, low), fill="black", width=2)
        for i, number in enumerate(random.integers(10, 999, rows * columns)):
            pen.text((50 + 85 * (i % columns), 52 + 60 * (i // columns)), str(number), fill="black")
        found.append([{"x": pixels(picture, 0.45, 0.225)}])
    return found


def _photographs() -> _Sequences:
    """One: it takes 160 GMACs."""
    return [[{"input": x}] for x in crops(1, seed=2, size=1024, mean=128 / 255, deviation=256 / 255)]


def _words() -> _Sequences:
    """English by the longest tokens that fit; they need not be those that its own tokenizer takes."""
    from optkit.benchmarks.builders import gguf, phone

    known = gguf.read(phone.fetched("SmolLM2-135M-Instruct.Q4_1.gguf"))[0]["tokenizer.ggml.tokens"]
    places, text = {w: i for i, w in enumerate(known)}, "Ġ".join(words(held_out=False)[:40])
    found = list[int]()
    while len(found) < 24:
        size = max(n for n in range(1, 17) if text[:n] in places)
        found.append(places[text[:size]])
        text = text[size:]
    return [_steps(found)]


# Beside the suite: who writes it, inputs one after the other, and what is kept between them.
MADE: Mapping[str, tuple[str, Callable[[], _Sequences], dict[str, str]]] = {
    "centerface": ("phone:faces", _faces, {}),
    "digits": ("phone:digits", _digits, {}),
    "crnn_en": ("phone:lines", _lines, {}),
    "ddddocr": ("phone:captchas", _captchas, {}),
    "ddddocr_old_int8": ("phone:captchas_in_integers", _captchas, {}),
    "crepe_tiny": ("phone:pitches", _tones, {}),
    "resemblyzer": ("phone:voices", _spectra, {}),
    "silero_vad_half, 32 ms": ("phone:speech", _sounds, {}),
    "silero_vad_ifless, 32 ms": ("phone:either_rate", _sounds_at_16_khz, {}),
    "piper_joe, without noise": ("phone:sentences", _spoken, {}),
    "slanet_plus": ("phone:tables", _grids, {}),
    "isnet_fp16": ("phone:foregrounds", _photographs, {}),
    "isnet_int8": ("phone:foregrounds_in_integers", _photographs, {}),
    "smollm2_135m, with state": ("phone:decoder", _words, {f"in_{i}": f"out_{i}" for i in range(60)}),
    "crnn_shaped": ("sequences:recognizer", _noise, {}),
    "decoder_shaped, with state": ("sequences:decoder", _tokens, {f"in_{i}": f"out_{i}" for i in range(8)}),
}


def _nudged(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the last bit of every float changed, up or down."""
    random = np.random.default_rng(0)
    return {
        k: np.nextafter(v, random.choice(np.array([-np.inf, np.inf], np.float32), v.shape))
        if v.dtype.kind == "f"
        else v
        for k, v in feeds.items()
    }


def _halved(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With floats rounded to float16."""
    return {
        k: v.astype(np.float16).astype(np.float32) if v.dtype == np.float32 else v for k, v in feeds.items()
    }


def measure_made(name: str) -> dict[str, Any]:
    """All forms of a model that is made here; what it keeps, ONNX Runtime is fed again, and the package has as state."""
    builder, sequences, states = MADE[name]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="optkit-made-") as folder:
        path = Path(folder) / "model.onnx"
        module, _, function = builder.partition(":")
        getattr(importlib.import_module(f"optkit.benchmarks.builders.{module}"), function)(path)
        size = path.stat().st_size
        reference = ReferenceSession(path, optimize=False)
        model = load(path, check=False)
        # What a file rounds to float16 itself stays in float16.
        halves = any(v.dtype == ir.DataType.FLOAT16 for v in model.graph.initializers.values())
        inputs = model.graph.inputs
        shapes = {v.name: v.shape.numpy() for v in inputs if v.name in states and v.shape is not None}
        expected, moved, least = [], 0.0, _LOUDEST
        for sequence in sequences():
            kept = {k: np.zeros(shape, np.float32) for k, shape in shapes.items()}
            for feeds in sequence:
                found = reference.run({**feeds, **kept})
                kept = {k: found.pop(v) for k, v in states.items()}
                expected.append(found)
        if not states:
            usual = ReferenceSession(path)
            for other, change in ((usual, dict[str, np.ndarray]), (reference, _nudged)):
                given = [other.run(change(feeds)) for sequence in sequences() for feeds in sequence]
                moved = max(moved, *(difference(a, b) for a, b in zip(expected, given, strict=True)))
            rounded = [reference.run(_halved(feeds)) for sequence in sequences() for feeds in sequence]
            apart = noise(expected, rounded)
            if apart > -np.inf:  # Else they have another size, which no package may have.
                least = min(least, apart - 20 * float(np.log10(_ALIKE)))
        for form in FORMS:
            session, seconds = convert(path, form, Path(folder) / form, states)
            given, room = [], _memory(Path(folder) / form, sequences()[0][0])
            with session:
                for sequence in sequences():
                    session.reset()
                    given += [session.run(feeds) for feeds in sequence]
            worst = max(difference(a, b) for a, b in zip(expected, given, strict=True))
            # Core ML keeps states in float16, whatever the program computes in.
            passed = (
                worst <= max(_ROUNDING, _ALIKE * moved)
                if form == "fp32" and not states and not halves
                else noise(expected, given) >= (least if form == "fp16" else _LOUDEST)
            )
            rows[form] = {
                "passed": passed, **_apart(worst, noise(expected, given)), "seconds": round(seconds, 2),
                "bytes": sum(f.stat().st_size for f in (Path(folder) / form).rglob("*") if f.is_file()),
                "evaluator_ratio": None,
            } | room  # fmt: skip
    return {"name": name, "bytes": size, "summed": None, "forms": rows}


_LEFT_OUT = (
    "Tried by hand, without a row: ssd_mobilenet_v2_coco (TensorFlow writes its file) converts, and where a class has no box its graph",
    "has tensors without elements, which Core ML has not: the evaluator says so and stops.",
)


def markdown(result: Mapping[str, Any]) -> str:
    """The page for readers."""
    heads = ("", "error", "SQNR, dB", "CPU s", "MB", "evaluator / ORT", "memory")
    columns = [f"{form}{', ' if h else ''}{h}" for form in FORMS for h in heads]
    lines = [
        "# Core ML",
        "",
        f"{processors(result)}. "
        + ", ".join(f"{k} {v}" for k, v in result["machine"]["versions"].items())
        + ".",
        "",
        "Verified by the reference evaluator, not executed on Apple hardware. The largest difference to ONNX Runtime as a share",
        f"of the largest value. In float32 it passes up to {_ROUNDING:g}, or up to {_ALIKE} times what ONNX Runtime's own rewrites,",
        "or sums in float64 instead of its own, move the outputs (the third column), and where that is not measured the last bit of",
        f"the inputs; in float16 from {_LOUDEST:g} dB on, or up to {_ALIKE} times what the inputs alone in float16 move ONNX Runtime's outputs.",
        "An output of another size fails.",
        "Names that end in shaped have random weights; states are kept in float16, and 24 tokens go in one after the other. digits was",
        "trained here, smollm2_135m comes out of its file in four bits, piper_joe speaks with its two noises",
        "at 0, since Core ML draws others; isnet_fp16 is in float16 as published, and judged so in both columns. The two that end",
        "in int8 choose scales in each run (ONNX Runtime's dynamic quantization), so that a last bit moves values to other steps.",
        "CPU seconds from file to package; the evaluator's CPU time over ONNX Runtime's; the most memory that it holds, as a share of",
        "the package and twice its largest activation, and (in brackets) without the interpreter's objects, which stand for the program.",
        f"The package of basic-pitch as its authors converted it, against its ONNX twin: {result['foreign_error']:.1e} at most.",
        "Written by `python -m optkit.benchmarks.coreml`, which says how.",
        "",
        f"| model | ONNX, MB | sums in float64 | {' | '.join(columns)} |",
        f"|{' --- |' * (3 + len(columns))}",
    ]
    for model in result["models"]:
        cells = [
            model["name"],
            f"{model['bytes'] / 1e6:.1f}",
            "-" if model["summed"] is None else f"{model['summed']:.1e}",
        ]
        for form in FORMS:
            cells += _cells(model["forms"][form])
        lines.append(f"| {' | '.join(cells)} |")
    reasons = [
        f"* {m['name']}, {form}: {' '.join(row['reason'].split())}"
        for m in result["models"]
        for form, row in m["forms"].items()
        if "reason" in row
    ]
    return "\n".join([*lines, "", *_LEFT_OUT, *(["", *reasons] if reasons else [])]) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "reason" in row:
        return ["fail", *["-"] * 6]
    return [
        "pass" if row["passed"] else "fail",
        "inf" if row["error"] is None else f"{row['error']:.1e}",
        ("-" if row["error"] is None else "inf") if row["sqnr"] is None else f"{row['sqnr']:.0f}",
        f"{row['seconds']:.1f}",
        f"{row['bytes'] / 1e6:.1f}",
        "-" if row["evaluator_ratio"] is None else f"{row['evaluator_ratio']:.1f}",
        _room(row),
    ]


def _room(row: Mapping[str, Any]) -> str:
    """The share, and that without the interpreter's objects."""
    return f"{row['memory']:.2f} ({row['memory_arrays']:.2f})" if "memory" in row else "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 1 where a model fails."""
    models = table(
        "coreml",
        __doc__,
        arguments,
        known=(*SUITE, *MADE),
        measure=lambda name: measure(name) if name in SUITE else measure_made(name),
        markdown=markdown,
        more=lambda: {"foreign_error": float(f"{compared():.2g}")},
    )
    return int(not all(row["passed"] for m in models for row in m["forms"].values()))


if __name__ == "__main__":
    sys.exit(main())
