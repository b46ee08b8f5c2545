"""How operators are written for which the exporter of torch has no word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from optkit.exporting import loops, recurrent


def translations() -> dict[Any, Callable[..., Any]]:
    """By operator, for ``torch.onnx.export``."""
    aten: Any = torch.ops.aten
    return {**recurrent.translations(), **loops.translations(), aten.sort.stable: _sort}


def _sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """TopK of all: it gives equal elements in their order, whatever was asked."""
    from onnxscript import opset18 as op

    axis = dim % len(x.shape)
    size = op.Shape(x, start=axis, end=axis + 1)
    values, places = op.TopK(x, size, axis=axis, largest=int(descending), sorted=1)
    return values, places
