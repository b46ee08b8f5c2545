"""The emitters: ONNX operators to operations of a Core ML program, a file an op family."""

from __future__ import annotations

from optkit.backends.coreml.emit import (  # each enters its rows into the table
    control as control,
    conv as conv,
    elementwise as elementwise,
    gather as gather,
    matmul as matmul,
    norm as norm,
    quant as quant,
    recurrent as recurrent,
    reduce as reduce,
    resize as resize,
    shape as shape,
)
from optkit.backends.coreml.emit.base import ROWS, Context, Row

__all__ = ["ROWS", "Context", "Row"]
