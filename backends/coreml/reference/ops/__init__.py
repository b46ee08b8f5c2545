"""The operations, a file a family of Apple's description of MIL."""

from __future__ import annotations

from optkit.backends.coreml.reference.ops import (  # each enters its functions into the table
    compressed as compressed,
    elementwise as elementwise,
    image as image,
    linear as linear,
    norm as norm,
    recurrent as recurrent,
    reduction as reduction,
    scatter as scatter,
    tensor as tensor,
    window as window,
)
from optkit.backends.coreml.reference.ops.table import OPERATIONS

__all__ = ["OPERATIONS"]
