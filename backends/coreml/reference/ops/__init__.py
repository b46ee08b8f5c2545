"""The operations, a file a family of Apple's description of MIL."""

from __future__ import annotations

from optkit.backends.coreml.reference.ops import (  # each enters its functions into the table
    compressed as compressed,
)
from optkit.backends.coreml.reference.ops import (
    elementwise as elementwise,
)
from optkit.backends.coreml.reference.ops import (
    image as image,
)
from optkit.backends.coreml.reference.ops import (
    linear as linear,
)
from optkit.backends.coreml.reference.ops import (
    norm as norm,
)
from optkit.backends.coreml.reference.ops import (
    random as random,
)
from optkit.backends.coreml.reference.ops import (
    recurrent as recurrent,
)
from optkit.backends.coreml.reference.ops import (
    reduction as reduction,
)
from optkit.backends.coreml.reference.ops import (
    scatter as scatter,
)
from optkit.backends.coreml.reference.ops import (
    tensor as tensor,
)
from optkit.backends.coreml.reference.ops import (
    window as window,
)
from optkit.backends.coreml.reference.ops.table import OPERATIONS, OVERWRITING, ROOMY

__all__ = ["OPERATIONS", "OVERWRITING", "ROOMY"]
