"""The first run of a new file, in a process of its own: LiteRT's kernels may abort, and optkit must not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from optkit.errors import ModelError

_CHILD = "import sys; from optkit.backends.litert.child import main; main(sys.argv[1])"
_SECONDS = 600


def survives(file: Path) -> None:
    """Open ``file`` and run all that is in it once, on zeros; what LiteRT merely refuses is left to who opens it.

    Raises:
        ModelError: The process died, or did not end in time.
    """
    # -P keeps the working directory, which may hold anything, off the child's path.
    command = [sys.executable, "-P", "-c", _CHILD, str(file)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=_SECONDS, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{file.name}: LiteRT did not run it within {_SECONDS} seconds") from error
    if done.returncode:
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [""])[-1][:300]
        raise ModelError(
            f"{file.name}: the process in which LiteRT ran it died ({how}){': ' if last else ''}{last}",
            hint="this is a mistake in optkit or in LiteRT: please report it with the model, or choose another --backend",
        )
