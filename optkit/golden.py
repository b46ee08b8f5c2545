"""Inputs with what a graph computes from them on a CPU: what a device is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optkit.closeness import closeness
from optkit.data import draw
from optkit.errors import ModelError
from optkit.reference import ReferenceSession, unsound

FOLDER = "golden"
# Cosine to the golden outputs. Sums in another order change float32 in the 7th digit and half precision in the 4th; a value
# next to the border of an int8 step may fall to the other side.
_CLOSE = {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.999}
_CLOSE_QUANTIZED = 0.99
# Distances are angles, and cosines fall with their squares: twice as far is four times.
_THIRD = 4


def min_cosine(formats: Sequence[str]) -> float:
    """How close outputs are that were computed in products of these formats, summed in another order."""
    return min((_CLOSE.get(fmt, _CLOSE_QUANTIZED) for fmt in formats), default=_CLOSE["fp32"])


def limit(formats: Sequence[str], apart: float) -> float:
    """How close outputs on a device must be to those of the same graph on a CPU.

    Args:
        formats: Of its products.
        apart: Lowest cosine between two ways in which a CPU computes it; a third may be somewhat farther from both.
    """
    return min(min_cosine(formats), 1 - _THIRD * (1 - apart))


def write(
    file: Path, folder: Path, model: ir.Model, sizes: Sequence[Mapping[str, int]], *, seed: int
) -> float:
    """Write one batch for each of ``sizes``: drawn inputs, and what ONNX Runtime computes from them with the graph.

    Returns:
        The lowest cosine of these outputs to those of the same nodes one by one, with nothing fused: how much rounding in
        another order alone does to this graph. 1 where ONNX Runtime computes them in one way only.

    Args:
        file: The graph, as it was saved.
        folder: Made here.
        sizes: Of the free axes, by symbol.

    Raises:
        ModelError: The graph does not run with inputs of these sizes, or computes no number from what was drawn.
    """
    folder.mkdir()
    random = np.random.default_rng(seed)
    session, apart = ReferenceSession(file, disabled=unsound(model)), 1.0
    plain = _one_by_one(file)
    for index, free in enumerate(sizes):
        feeds = draw(model, random, free)
        # Where there is one key alone, False may be what shows it.
        for turned in (feeds, {k: ~v if v.dtype == bool else v for k, v in feeds.items()}):
            try:
                feeds, found = turned, session.run(turned)
            except ModelError as error:
                shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
                raise ModelError(
                    f"the graph does not run with {shapes}: {error}",
                    hint="sizes of free axes are set with --set options.sizes.AXIS=[smallest, usual, largest]",
                ) from error
            if any(map(_numbers, found.values())):
                break
        else:
            raise ModelError(
                "all that the graph computes from inputs drawn at random is NaN or infinite: no device can be held against that",
                hint="export it so that it computes numbers from any input of the stated types",
            )
        arrays = {f"in:{k}": v for k, v in feeds.items()} | {f"out:{k}": v for k, v in found.items()}
        with (folder / f"{index:03d}.npz").open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        if plain is not None:
            other = plain.run(feeds)
            apart = min(apart, *(closeness(found[name], other[name])["cosine"] for name in found))
    for one in (session, plain):
        if one is not None:
            one.close()
    return apart


def _numbers(array: np.ndarray) -> bool:
    return array.dtype.kind != "f" or not array.size or bool(np.isfinite(array).any())


def _one_by_one(file: Path) -> ReferenceSession | None:
    try:
        return ReferenceSession(file, optimize=False)
    except ModelError:  # some operators exist only fused
        return None
