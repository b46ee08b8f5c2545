"""LiteRT's interpreter, without what it writes to the standard error of the process when a model is opened."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from ai_edge_litert import interpreter as litert

from optkit.backends.quiet import without


def silence() -> AbstractContextManager[None]:
    """Without the severities that are no news to a user: which kernels were chosen."""
    return without("INFO:", "WARNING: Attempting to use a delegate")


def interpreter(file: str, threads: int | None) -> Any:
    """An interpreter with XNNPACK's kernels.

    Raises:
        ValueError: It does not take the file.
    """
    with silence():
        return litert.Interpreter(model_path=file, num_threads=threads)
