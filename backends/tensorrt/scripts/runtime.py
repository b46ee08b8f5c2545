"""TensorRT, or the end of the program where it does not load."""

from __future__ import annotations

import sys
from typing import NoReturn

# As optkit's commands end where the machine lacks what they need.
_NOT_HERE = 4


def not_here(message: str) -> NoReturn:
    """Say in a line what this machine lacks and what to do, and exit with 4."""
    print(message, file=sys.stderr)
    raise SystemExit(_NOT_HERE)


try:
    import tensorrt as trt
except ImportError as error:
    not_here(f"TensorRT does not load ({error}): pip install tensorrt-cu13")

__all__ = ["not_here", "trt"]
