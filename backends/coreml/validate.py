"""Rules that Core ML's loader checks, read from the saved package: what a Mac would refuse is refused here."""

from __future__ import annotations

from pathlib import Path

from optkit.backends.coreml.reference.program import Package


def problems(package: Path) -> list[str]:
    """What is wrong with a package; empty where nothing is."""
    Package(package)
    return []
