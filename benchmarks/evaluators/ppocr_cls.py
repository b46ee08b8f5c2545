"""PP-OCR text-line orientation: accuracy on rendered lines, every other one turned by 180 degrees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from optkit.benchmarks.lines import lines, tensor

METRIC = "accuracy"


def samples(n: int = 2000) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Picture of a line, and 1 where it is upside down."""
    return _turned(n, seed=2, held_out=False)


def score(outputs: dict[str, np.ndarray], label: int) -> float:
    """1 for the right orientation."""
    (probabilities,) = outputs.values()
    return float(probabilities[0].argmax() == label)


def calibration(n: int = 64) -> Iterator[dict[str, np.ndarray]]:
    """Lines of text that no sample shows."""
    for feeds, _ in _turned(n, seed=3, held_out=True):
        yield feeds


def _turned(n: int, *, seed: int, held_out: bool) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    for i, (_, picture) in enumerate(lines(n, seed=seed, held_out=held_out)):
        turned = picture.transpose(Image.Transpose.ROTATE_180) if i % 2 else picture
        yield {"x": tensor(turned, 48, 192)}, i % 2
