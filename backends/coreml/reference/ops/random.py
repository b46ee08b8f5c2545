"""Random numbers: of the right distribution, and others than Core ML draws."""

from __future__ import annotations

from typing import Any

import numpy as np

from optkit.backends.coreml.reference.ops.table import operation

Array = np.ndarray


def _generator(seed: int) -> np.random.Generator:
    """With a seed the same in each run."""
    return np.random.default_rng(None if seed < 0 else seed)


def _sizes(shape: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in np.reshape(shape, -1))


@operation("random_normal")
def normal(shape: Array, mean: float = 0.0, stddev: float = 1.0, seed: int = -1) -> Array:
    """From a normal distribution."""
    return _generator(seed).normal(mean, stddev, _sizes(shape)).astype(np.float32)


@operation("random_uniform")
def uniform(shape: Array, low: float = 0.0, high: float = 1.0, seed: int = -1) -> Array:
    """From ``low``, up to and without ``high``."""
    return _generator(seed).uniform(low, high, _sizes(shape)).astype(np.float32)
