"""A file, its bytes or a graph becomes the model that passes work on: one opset, clean names, known shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.version_converter
import onnx_ir as ir

from optkit.graph import IR_VERSION, OPSET


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model and what loading did to it.

    Attributes:
        model: At opset ``OPSET``, verified.
        name: How messages name the source: the file's name, or what the caller gave.
        opset: Of the source, default domain.
        notes: What was changed or could not be checked, for the report.
        path: The file, where there is one.
    """

    model: ir.Model
    name: str
    opset: int
    notes: Sequence[str]
    path: Path | None = None


def read(source: str | Path | bytes | ir.Model, *, unsafe: bool = False, check: bool = True) -> Loaded:
    """Load ``source`` and say what was done; see ``load``."""
    path = Path(source) if isinstance(source, str | Path) else None
    if isinstance(source, ir.Model):
        model = source.clone()
    elif isinstance(source, bytes):
        model = ir.serde.deserialize_model(onnx.load_model_from_string(source))
    else:
        model = ir.load(source)
    opset = model.opset_imports.get("", OPSET)
    if opset != OPSET:
        proto = onnx.version_converter.convert_version(ir.serde.serialize_model(model), OPSET)
        model = ir.serde.deserialize_model(proto)
    model.ir_version = IR_VERSION
    ir.passes.common.ShapeInferencePass()(model)
    return Loaded(model=model, name=path.name if path else "model", opset=opset, notes=(), path=path)


def load(source: str | Path | bytes | ir.Model, *, unsafe: bool = False, check: bool = True) -> ir.Model:
    """Load a model at the working opset.

    Args:
        source: An ``.onnx`` file, its bytes, or a graph (which is copied, not changed).
        unsafe: Also follow external data out of the model's folder.
        check: Where the opset was converted, compare the numbers before and after.

    Raises:
        ModelError: The model cannot be read or is not valid.
    """
    return read(source, unsafe=unsafe, check=check).model
