"""Random inputs of kernels, exact in their formats."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

DTYPES = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}


def draw(shapes: Sequence[tuple[int, ...]], fmt: str, seed: int) -> list[np.ndarray | None]:
    """Normal values of ``fmt``, the same for the same seed."""
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(np.float32).astype(DTYPES[fmt]) for shape in shapes]
