"""Larger photographs, for random detectors; random weights have no accuracy to measure."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optkit.benchmarks.photos import crops


def calibration(n: int = 16) -> Iterator[dict[str, np.ndarray]]:
    """Crops of photographs."""
    for image in crops(n, seed=0, size=640):
        yield {"image": image}


def unseen(n: int = 8) -> Iterator[dict[str, np.ndarray]]:
    """Other crops."""
    for image in crops(n, seed=2, size=640):
        yield {"image": image}
