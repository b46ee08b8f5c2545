"""Evaluating a module that may be in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluating(module: Any) -> Iterator[bool]:
    """While open, every part of ``module`` evaluates; afterwards each is in the mode that it was in. Tells whether any trained.

    ``train()`` would also set norms to training that their owner has frozen.
    """
    parts = list(module.modules()) if hasattr(module, "modules") else []
    training = [part for part in parts if part.training]
    try:
        for part in training:
            part.training = False
        yield bool(training)
    finally:
        for part in training:
            part.training = True
