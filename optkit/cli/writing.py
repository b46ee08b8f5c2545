"""Graphs that commands write as ONNX: where to, whether they run, and so that nothing half-written is ever there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optkit.errors import ModelError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def place(out: Path | None, model: Path | str, label: str) -> Path:
    """The file to write: ``out``, ``model.onnx`` in it, or the model's name and ``label`` here.

    Raises:
        UsageError: It is a folder, or the model itself.
    """
    # Of package.module:factory, the function gives the name.
    source = Path(model if isinstance(model, Path) else model.rpartition(":")[2])
    if out is None:
        return Path(f"{source.stem}-{label}.onnx")
    found = out if out.suffix == ".onnx" else out / "model.onnx"
    if found.is_dir():
        raise UsageError(f"{found}: a folder", hint="choose another --out")
    if found.exists() and found.resolve() == source.resolve():
        raise UsageError(f"{found}: is the model itself", hint="choose another --out")
    return found


def check_runs(file: Path, graph: ir.Model, feeds: Mapping[str, np.ndarray]) -> None:
    """Load what was written and run it once.

    Raises:
        ModelError: It does not load or run, or an output is missing.
    """
    from optkit.reference import ReferenceSession, unsound

    session = ReferenceSession(file, disabled=unsound(graph))
    try:
        outputs = session.run(feeds)
    finally:
        session.close()
    for value in graph.graph.outputs:
        found = outputs.get(str(value.name))
        if found is None or (value.shape is not None and len(value.shape) != found.ndim):
            raise ModelError(
                f"output {value.name!r} came out as {'nothing' if found is None else list(found.shape)}"
            )


def move(written: Sequence[Path], final: Path) -> list[Path]:
    """Put the files where they belong: weights first, so that the graph never names a file that is not there."""
    final.parent.mkdir(parents=True, exist_ok=True)
    moved = [final.with_name(f.name) for f in written]
    for source, to in reversed(list(zip(written, moved, strict=True))):
        os.replace(source, to)
    return moved
