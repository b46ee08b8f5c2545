"""What native code writes to the standard error of the process, past Python."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

_LOCK = threading.Lock()


@contextlib.contextmanager
def without(*chatter: str) -> Iterator[None]:
    """Of what is written meanwhile, only lines that begin with none of ``chatter`` come through, afterwards."""
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
                if line.strip() and not line.startswith(chatter):
                    sys.stderr.write(f"{line}\n")
