"""Inputs with what a graph computes from them on a CPU: what a device is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optkit.data import draw
from optkit.errors import ModelError
from optkit.reference import ReferenceSession, unsound

FOLDER = "golden"
# Cosine to the golden outputs. Sums in another order change float32 in the 7th digit and half precision in the 4th; a value
# next to the border of an int8 step may fall to the other side.
_CLOSE = {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.999}
_CLOSE_QUANTIZED = 0.99


def min_cosine(formats: Sequence[str]) -> float:
    """How close outputs on the device must be to those of the same graph on a CPU."""
    return min((_CLOSE.get(fmt, _CLOSE_QUANTIZED) for fmt in formats), default=_CLOSE["fp32"])


def write(
    file: Path, folder: Path, model: ir.Model, sizes: Sequence[Mapping[str, int]], *, seed: int
) -> None:
    """Write one batch for each of ``sizes``: drawn inputs, and what ONNX Runtime computes from them with the graph.

    Args:
        file: The graph, as it was saved.
        folder: Made here.
        sizes: Of the free axes, by symbol.

    Raises:
        ModelError: The graph does not run with inputs of these sizes.
    """
    folder.mkdir()
    random = np.random.default_rng(seed)
    session = ReferenceSession(file, disabled=unsound(model))
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
        with (folder / f"{index:03d}.npz").open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
    session.close()
