"""Whether a device computes what was computed on a CPU, and how long its runs take.

Artifacts carry this file for their programs: it imports nothing of optkit.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def closeness(expected: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """Cosine, largest difference relative to the largest value, and whether shapes and infinities agree."""
    same = expected.shape == found.shape
    if not same or expected.dtype.kind not in "fV":
        equal = same and bool((expected == found).all())
        return {"cosine": 1.0 if equal else 0.0, "largest": 0.0 if equal else None, "finite": equal}
    a, b = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    finite = bool((np.isfinite(a) == np.isfinite(b)).all())
    a, b = np.where(np.isfinite(a), a, 0), np.where(np.isfinite(b), b, 0)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norms if norms else float(np.array_equal(a, b))
    return {
        "cosine": cosine,
        "largest": float(np.abs(a - b).max(initial=0) / (np.abs(a).max(initial=0) or 1)),
        "finite": finite,
    }


def batch(file: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs and outputs of a golden batch, by name."""
    with np.load(file, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    inputs, outputs = (
        {k.removeprefix(kind): v for k, v in found.items() if k.startswith(kind)} for kind in ("in:", "out:")
    )
    return inputs, outputs


def verify(
    run: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]], folder: Path, min_cosine: float
) -> dict[str, Any]:
    """Compare ``run`` with every golden batch in ``folder``; the record says whether all are within the limit."""
    outputs: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*.npz")):
        feeds, expected = batch(file)
        found = run(feeds)
        for name, value in expected.items():
            record = (
                closeness(value, found[name])
                if name in found
                else {"cosine": 0.0, "largest": None, "finite": False}
            )
            outputs.append({"batch": file.stem, "output": name, **record})
    met = bool(outputs) and all(o["finite"] and o["cosine"] >= min_cosine for o in outputs)
    return {"met": met, "min_cosine": min_cosine, "outputs": outputs}


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, mean, extremes and deviation of the times of runs, in milliseconds."""
    ordered = sorted(s * 1e3 for s in seconds)
    runs = len(ordered)
    return {
        "median_ms": statistics.median(ordered),
        "mean_ms": statistics.fmean(ordered),
        "min_ms": ordered[0],
        "p99_ms": ordered[min(runs - 1, int(0.99 * runs))],
        "stdev_ms": statistics.stdev(ordered) if runs > 1 else 0.0,
        "runs": runs,
    }
