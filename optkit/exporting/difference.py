"""How far two arrays are apart, and how far rounding alone may take them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import numpy as np
import torch

from optkit.exporting.eager import run_eager
from optkit.exporting.exported import Exported

logger = logging.getLogger(__name__)

# Differences relative to the largest value of an output. Exports of well-conditioned networks differ by 1e-6.
TOLERANCE = 1e-4
# A float32 graph may differ from eager by this many times what eager itself differs from float64.
_CONDITION = 8.0
# Below it nothing but zeros is expected; far above float32's smallest normal number, far below any output that counts.
_ZERO = 1e-30


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest value; the share of integers that differ; inf where one is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    if expected.dtype.kind in "iub":
        return float(np.mean(found != expected))
    a, b = found.astype(np.complex128 if expected.dtype.kind == "c" else np.float64), expected
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(a[finite] - b[finite]).max() / max(float(np.abs(b[finite]).max()), _ZERO))


def noise(exported: Exported, tensors: Sequence[torch.Tensor], name: str) -> float:
    """How far rounding alone may take an output: what eager in float32 differs from eager in float64.

    Of integers it is the share that changes with it, such as places in a sort of what is nearly equal.
    """
    try:
        double = copy.deepcopy(exported.module).double()
        wide = [t.double() if t.is_floating_point() else t for t in tensors]
        exact = run_eager(double, exported.signature, wide, exported.outputs)[name]
        plain = exported.eager(tensors)[name]
    except Exception as error:  # noqa: BLE001  (modules that cannot be copied or widened: no allowance then)
        logger.debug("no float64 reference: %s", error)
        return 0.0
    allowed = _CONDITION * difference(plain, exact)
    # Overflow in one of the two says nothing about rounding.
    return allowed if np.isfinite(allowed) else 0.0
