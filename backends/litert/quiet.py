"""LiteRT's interpreter, without what it writes to the standard error of the process when a model is opened."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from ai_edge_litert import interpreter as litert

_LOCK = threading.Lock()
# The severities that are no news to a user: which kernels were chosen.
_CHATTER = ("INFO:", "WARNING: Attempting to use a delegate")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Of what native code writes to standard error meanwhile, only what is no chatter comes through."""
    with _LOCK, tempfile.TemporaryFile() as kept:
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            kept.seek(0)
            for line in kept.read().decode("utf-8", "replace").splitlines():
                if line.strip() and not line.startswith(_CHATTER):
                    sys.stderr.write(f"{line}\n")


def interpreter(file: str, threads: int | None) -> Any:
    """An interpreter with XNNPACK's kernels.

    Raises:
        ValueError: It does not take the file.
    """
    with silence():
        return litert.Interpreter(model_path=file, num_threads=threads)
