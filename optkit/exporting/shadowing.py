"""Names that mean another thing in the files of a module, for the time of tracing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def shadowed(module: torch.nn.Module, name: str, value: Any) -> Iterator[None]:
    """In the files of a module, a name of Python's means another thing."""
    files = [file for file in files_of(module) if name not in vars(file)]
    try:
        for file in files:
            vars(file)[name] = value
        yield
    finally:
        for file in files:
            vars(file).pop(name, None)


def files_of(module: torch.nn.Module) -> list[Any]:
    """The Python files that the classes of a module are from, but for torch's own."""
    found = {type(m).__module__: sys.modules.get(type(m).__module__) for m in module.modules()}
    return [f for name, f in found.items() if f is not None and not name.startswith("torch.")]
