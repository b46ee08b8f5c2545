"""Finish an artifact on the device that it is for, and write down what was done there."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from optkit.artifact import DEVICE, MANIFEST, load
from optkit.backends.base import Finished
from optkit.passes.base import Progress, Silent
from optkit.report import dump
from optkit.targets import target


def finalize(folder: str | Path, *, force: bool = False, progress: Progress | None = None) -> Finished:
    """Do what the manifest of the artifact in ``folder`` says is left, and set its evidence.

    It can be stopped and called again: finished steps are not repeated, and each evidence is in the manifest as soon as its
    step is done.

    Args:
        force: Repeat them all the same.
        progress: Where to say what is being done.

    Raises:
        UsageError: Not an artifact, one that is complete as it is, or one for another device.
        BackendUnavailableError: The device, its driver or a package is missing.
        ModelError: Files are damaged, a step fails, or the device computes something else.
    """
    artifact = load(folder)
    manifest = artifact.manifest
    backend, options = artifact.backend, artifact.options
    where = target(manifest.target)
    task = (progress or Silent()).task

    def mark(name: str, there: bool) -> None:
        nonlocal manifest
        if getattr(manifest.evidence, name) != there:
            manifest = manifest.model_copy(
                update={"evidence": manifest.evidence.model_copy(update={name: there})}
            )
            _replace(artifact.folder / MANIFEST, dump(manifest))

    found = backend.finalize(artifact.folder, where, options, task, mark, force=force)
    _replace(artifact.folder / DEVICE, json.dumps(asdict(found), indent=2) + "\n")
    done = set(backend.deferred(artifact.folder, where, options)) - set(found.left)
    left = tuple(step for step in manifest.deferred if step not in done)
    manifest = manifest.model_copy(update={"deferred": left})
    _replace(artifact.folder / MANIFEST, dump(manifest))
    return found


def _replace(file: Path, text: str) -> None:
    """Write ``file`` whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)
