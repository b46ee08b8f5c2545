"""What steps on a device wrote down, so that none is repeated for nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.errors import ModelError

if TYPE_CHECKING:
    from optkit.backends.base import Mark, Task

VERIFIED, TIMED = "verified.json", "bench.json"

Record = dict[str, Any]


def read(file: Path, made_with: Mapping[str, Any]) -> Record | None:
    """What a step wrote, if it did so with ``made_with``: this code on this device."""
    if not file.is_file():
        return None
    found: Record = json.loads(file.read_bytes())
    return found["found"] if found.get("made_with") == made_with else None


def writer(file: Path, made_with: Mapping[str, Any]) -> Callable[[Record], Record]:
    """Writes a record whole or not at all, and gives it back."""
    kept = dict(made_with)

    def write(found: Record) -> Record:
        part = file.with_name(f".{file.name}.part")
        with part.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps({"made_with": kept, "found": found}, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
        return found

    return write


def proved(
    read: Callable[[str], Record | None],
    compare: Callable[[], Record],
    measure: Callable[[], Record],
    *,
    task: Task,
    mark: Mark,
    against: str,
    wrong: str,
    hint: str,
    batch: str = "golden batch",
    here: bool = True,
) -> tuple[Record, Record]:
    """The last steps on any device, each once: compare the outputs, and only then measure.

    Args:
        read: The record of a step by its file's name, None where it has to be done.
        compare: Compares and keeps the record: ``met``, ``min_cosine``, and ``outputs`` with ``batch``, ``output``, ``cosine``,
            ``finite``.
        measure: Measures and keeps the record.
        against: What is compared with.
        wrong: What it means when the outputs differ.
        hint: What to try then.
        batch: What one of those compared is called.
        here: Whether this is the device that the artifact names, so that it is evidence of it.

    Raises:
        ModelError: The outputs differ.
    """
    verified = read(VERIFIED)
    if verified is None:
        mark("ran_on_device", False)
        with task(f"compare with {against}"):
            verified = compare()
    if not verified["met"]:
        worst = min(verified["outputs"], key=lambda o: (o["finite"], o["cosine"]))
        raise ModelError(
            f"{wrong}: output {worst['output']!r} of {batch} {worst['batch']} has "
            f"cosine {worst['cosine']:.5f}, at least {verified['min_cosine']:g} is asked for",
            hint=f"all of them are in {VERIFIED}; {hint}",
        )
    mark("ran_on_device", here)
    timed = read(TIMED)
    if timed is None:
        mark("timed_on_device", False)
        with task("measure the latency"):
            timed = measure()
    mark("timed_on_device", here)
    return verified, timed
