"""A model larger than two gigabytes: what cleaning and quantizing its weights takes in memory and on disk.

    python -m optkit.benchmarks.large --size 2.1 --folder /scratch

The model is made on disk a piece at a time, in the folder given, and removed afterwards. optkit runs in a process of
its own; the memory that counts is anonymous, since mapped weights are the kernel's to take back.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from optkit.backends import BACKENDS
from optkit.benchmarks.machine import processor, versions
from optkit.benchmarks.memory import Peak, now
from optkit.frontend import load
from optkit.passes.base import Context
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.targets import target

_WIDTH, _INNER = 4096, 16384
_PIECE = 1 << 22


def make(folder: Path, size: float, seed: int = 0) -> Path:
    """Write a chain of linear layers of about ``size`` gigabytes, weights beside the graph; ``[1, 4096]`` in and out."""
    blocks = max(1, round(size * 1e9 / (2 * _WIDTH * _INNER * 4)))
    rng = np.random.default_rng(seed)
    nodes, weights, offset, x = [], [], 0, "x"
    with (folder / "model.onnx.data").open("wb") as file:
        for i in range(blocks):
            for part, (rows, columns) in {"up": (_WIDTH, _INNER), "down": (_INNER, _WIDTH)}.items():
                name = f"block{i}.{part}"
                for start in range(0, rows * columns, _PIECE):
                    count = min(_PIECE, rows * columns - start)
                    piece = rng.standard_normal(count, np.float32) * np.float32(np.sqrt(2 / rows))
                    file.write(piece.tobytes())
                weights.append(_external(f"{name}.weight", (rows, columns), offset))
                offset += rows * columns * 4
                nodes.append(helper.make_node("MatMul", [x, f"{name}.weight"], [name], name=name))
                x = name
                if part == "up":
                    nodes.append(helper.make_node("Relu", [x], [f"{x}.relu"], name=f"{x}.relu"))
                    x = f"{x}.relu"
            # A normalisation a block, so that numbers stay in range however many blocks there are.
            nodes.append(
                helper.make_node("LayerNormalization", [x, "scale"], [f"{x}.norm"], name=f"{x}.norm")
            )
            x = f"{x}.norm"
    nodes.append(helper.make_node("Identity", [x], ["y"], name="y"))
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", _WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", _WIDTH])],
        [*weights, onnx.numpy_helper.from_array(np.ones(_WIDTH, np.float32), "scale")],
    )
    path = folder / "model.onnx"
    path.write_bytes(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        ).SerializeToString()
    )
    return path


def _external(name: str, shape: tuple[int, ...], offset: int) -> TensorProto:
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL
    )
    length = 4 * int(np.prod(shape))
    for key, value in (("location", "model.onnx.data"), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def quantize(path: Path, out: Path, recipe: str) -> dict[str, Any]:
    """Load, run the passes of ``recipe``, write; what it took."""
    before, _ = now()
    start = time.process_time()
    backend = BACKENDS["onnxruntime"]()
    with Peak() as peak:
        model = load(path)
        context = Context(target=target("cpu"), placements=backend.placements)
        records, _ = run_passes(model, Recipe.load(recipe).passes, context)
        backend.lower(model, context.target, backend.options(), out)
    return {
        "recipe": recipe,
        "cpu_seconds": round(time.process_time() - start, 2),
        "model_mb": _megabytes(path.parent),
        "written_mb": _megabytes(out),
        "peak_anonymous_mb": round(peak.anonymous / 1e6),
        "peak_resident_mb": round(peak.resident / 1e6),
        "anonymous_before_mb": round(before / 1e6),
        "changes": sum(record.changes for record in records),
    }


def _megabytes(folder: Path) -> int:
    return round(sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) / 1e6)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m optkit.benchmarks.large",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=float, default=2.1, help="gigabytes")
    parser.add_argument("--recipe", default="int8-dynamic", help="a recipe that needs no data")
    parser.add_argument("--folder", type=Path, help="where the model is made; the system's temporary folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON, beside the line on stdout")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="optkit-large-", dir=options.folder) as scratch:
        source, out = Path(scratch) / "source", Path(scratch) / "out"
        source.mkdir()
        out.mkdir()
        path = make(source, options.size)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(quantize, path, out, options.recipe).result()
    print(json.dumps(row))
    if options.out:
        record = {"schema": 1, "processor": processor(), "versions": versions(), "rows": [row]}
        options.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
