"""The emitters: ONNX operators to operations of a Core ML program, a file an op family."""

from __future__ import annotations

from optkit.backends.coreml.emit import (  # each enters its rows into the table
    boxes as boxes,
)
from optkit.backends.coreml.emit import (
    control as control,
)
from optkit.backends.coreml.emit import (
    conv as conv,
)
from optkit.backends.coreml.emit import (
    elementwise as elementwise,
)
from optkit.backends.coreml.emit import (
    gather as gather,
)
from optkit.backends.coreml.emit import (
    matmul as matmul,
)
from optkit.backends.coreml.emit import (
    norm as norm,
)
from optkit.backends.coreml.emit import (
    quant as quant,
)
from optkit.backends.coreml.emit import (
    random as random,
)
from optkit.backends.coreml.emit import (
    recurrent as recurrent,
)
from optkit.backends.coreml.emit import (
    reduce as reduce,
)
from optkit.backends.coreml.emit import (
    resize as resize,
)
from optkit.backends.coreml.emit import (
    shape as shape,
)
from optkit.backends.coreml.emit.base import ROWS, Context, Row

__all__ = ["ROWS", "Context", "Row"]
