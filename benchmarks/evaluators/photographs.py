"""Photographs to time and to calibrate random classifiers with; random weights have no accuracy to measure."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optkit.benchmarks.photos import crops


def calibration(n: int = 32) -> Iterator[dict[str, np.ndarray]]:
    """Crops of photographs."""
    for image in crops(n, seed=0):
        yield {"image": image}


def unseen(n: int = 16) -> Iterator[dict[str, np.ndarray]]:
    """Other crops."""
    for image in crops(n, seed=2):
        yield {"image": image}
