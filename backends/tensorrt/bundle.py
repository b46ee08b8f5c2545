"""What a TensorRT artifact holds beside the graph: profiles, golden inputs and outputs, and the programs for the device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optkit.data import draw
from optkit.errors import ModelError
from optkit.kernels import cuda
from optkit.reference import ReferenceSession, unsound

MODEL, BUNDLE, ENGINE, GOLDEN = "model.onnx", "bundle.json", "engine.plan", "golden"
# What only the mode that builds on the device needs.
_BUILD = ("build_engine.py",)
_PROGRAMS = ("device.py", "engine.py", "verify.py", "bench.py")
_SCRIPTS = Path(__file__).resolve().parent / "scripts"
# Programs that are modules of optkit too.
_SHARED = {"device.py": cuda.__file__}

# Cosine to the golden outputs. Sums in another order change float32 in the 7th digit and half precision in the 4th; a value
# next to the border of an int8 step may fall to the other side.
_CLOSE = {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.999}
_CLOSE_QUANTIZED = 0.99


def min_cosine(formats: Sequence[str]) -> float:
    """How close outputs on the device must be to those of the same graph on a CPU."""
    return min((_CLOSE.get(fmt, _CLOSE_QUANTIZED) for fmt in formats), default=_CLOSE["fp32"])


def write(
    path: Path,
    *,
    target: str,
    arch: str,
    profile: Mapping[str, Sequence[Sequence[int]]],
    formats: Sequence[str],
    tf32: bool,
    rtx: bool,
) -> None:
    """Write ``bundle.json`` and the programs into ``path``.

    Args:
        rtx: Whether the engine is TensorRT-RTX's and there already; else TensorRT builds it on the device.
    """
    facts = {
        "target": target, "arch": arch, "profile": {k: [list(s) for s in v] for k, v in profile.items()},
        "min_cosine": min_cosine(formats), "tf32": tf32, "runtime": "tensorrt_rtx" if rtx else "tensorrt",
    }  # fmt: skip
    (path / BUNDLE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name in (*_PROGRAMS, *(() if rtx else _BUILD)):
        (path / name).write_text(program(name, rtx=rtx), encoding="utf-8")


def program(name: str, *, rtx: bool) -> str:
    """The text of a program; TensorRT-RTX has its own package of the same interface."""
    text = Path(_SHARED.get(name, _SCRIPTS / name)).read_text(encoding="utf-8")
    return text.replace("import tensorrt as trt", "import tensorrt_rtx as trt") if rtx else text


def golden(path: Path, model: ir.Model, sizes: Sequence[Mapping[str, int]], *, seed: int) -> None:
    """Write one batch for each of ``sizes``: drawn inputs, and what ONNX Runtime computes from them with the typed graph."""
    (path / GOLDEN).mkdir()
    random = np.random.default_rng(seed)
    session = ReferenceSession(path / MODEL, disabled=unsound(model))
    for index, free in enumerate(sizes):
        feeds = draw(model, random, free)
        try:
            found = session.run(feeds)
        except ModelError as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise ModelError(
                f"the graph does not run with {shapes}: {error}",
                hint="sizes of free axes are set with --set options.sizes.AXIS=[smallest, usual, largest]",
            ) from error
        arrays = {f"in:{k}": v for k, v in feeds.items()} | {f"out:{k}": v for k, v in found.items()}
        with (path / GOLDEN / f"{index:03d}.npz").open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    session.close()
