"""Peak memory of this process while something runs, sampled by a thread.

Anonymous memory is what counts: pages of mapped files are the kernel's to take back.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

from optkit.errors import BackendUnavailableError

_STATUS = Path("/proc/self/status")


class Peak:
    """Watches from ``with`` on; at its end ``anonymous`` and ``resident`` are the largest bytes seen.

    Raises:
        BackendUnavailableError: The system does not tell (it is not Linux).
    """

    def __init__(self, interval: float = 0.005) -> None:
        if not _STATUS.exists():
            raise BackendUnavailableError("peak memory is read from /proc, which this system does not have")
        self.anonymous = self.resident = 0
        self._interval, self._done = interval, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        anonymous, resident = now()
        self.anonymous, self.resident = max(self.anonymous, anonymous), max(self.resident, resident)


def now() -> tuple[int, int]:
    """Anonymous and resident bytes at this moment."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    anonymous, resident = (int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))
    return anonymous, resident
