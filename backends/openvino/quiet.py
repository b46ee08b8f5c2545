"""OpenVINO, imported without its telemetry.

``import openvino`` reports itself, and each ``convert_model``, to Google Analytics from a process of its own, unless the
user has opted out or the package ``openvino-telemetry`` is missing (a requirement of openvino): it then has a stub that
does nothing. Here the package is hidden while openvino is imported, so that it takes the stub.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

_TELEMETRY = "openvino_telemetry"


def _load() -> Any:
    hidden = sys.modules.get(_TELEMETRY)
    known = _TELEMETRY in sys.modules
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[_TELEMETRY]
        if known and hidden is not None:
            sys.modules[_TELEMETRY] = hidden


ov: Any = _load()


@functools.cache
def core() -> Any:
    """The one ``Core`` of this process: plugins are loaded once."""
    return ov.Core()
