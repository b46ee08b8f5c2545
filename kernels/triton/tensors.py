"""Arrays as tensors of torch, in the formats of programs' arguments, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

TORCH = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
    "fp8e4nv": torch.float8_e4m3fn,
}
# What NumPy knows only as bits.
_RAW = {"bf16": (np.int16, torch.int16), "fp8e4nv": (np.int8, torch.int8)}


def tensor(array: np.ndarray, fmt: str) -> Any:
    """On the CPU."""
    raw = array.view(_RAW[fmt][0]) if fmt in _RAW else array
    return torch.from_numpy(np.ascontiguousarray(raw)).view(TORCH[fmt])


def array(tensor_: Any, fmt: str) -> np.ndarray:
    """Its numbers, or their bits where NumPy has no such numbers."""
    found: np.ndarray = (tensor_.view(_RAW[fmt][1]) if fmt in _RAW else tensor_).numpy()
    return found
