"""The emitters: ONNX operators to those of LiteRT, a file an op family."""

from __future__ import annotations

from optkit.backends.litert.emit import conv as conv  # each enters its rows into the table
from optkit.backends.litert.emit import elementwise as elementwise
from optkit.backends.litert.emit import indexing as indexing
from optkit.backends.litert.emit import matmul as matmul
from optkit.backends.litert.emit import norm as norm
from optkit.backends.litert.emit import quant as quant
from optkit.backends.litert.emit import random as random
from optkit.backends.litert.emit import recurrent as recurrent
from optkit.backends.litert.emit import reduce as reduce
from optkit.backends.litert.emit import resize as resize
from optkit.backends.litert.emit import shape as shape
from optkit.backends.litert.emit.base import ROWS, Context, Row

__all__ = ["ROWS", "Context", "Row"]
