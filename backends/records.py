"""What steps on a device wrote down, so that none is repeated for nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def read(file: Path, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a step wrote, if it did so with ``made_with``: this code on this device."""
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_bytes())
    return found["found"] if found.get("made_with") == made_with else None


def writer(file: Path, made_with: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
    """Writes a record whole or not at all."""
    kept = dict(made_with)

    def write(found: Mapping[str, Any]) -> None:
        part = file.with_name(f".{file.name}.part")
        with part.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps({"made_with": kept, "found": found}, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)

    return write
