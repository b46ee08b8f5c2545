"""Run the passes of a recipe over a graph."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optkit.errors import OptkitError, PassError
from optkit.graph import count_nodes, verify
from optkit.origin import inherit
from optkit.passes.base import Context, GraphPass, Pass
from optkit.report import PassRecord

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)


def run_passes(
    model: ir.Model, passes: Sequence[Pass], context: Context
) -> tuple[list[PassRecord], dict[str, float]]:
    """Run ``passes`` in order, in place, and check the graph after each.

    Returns:
        A record a pass, and CPU seconds by pass (several runs of one name are added up).

    Raises:
        PassError: A pass failed or left a broken graph; names it.
    """
    records, seconds = [], dict[str, float]()
    for step in passes:
        if not isinstance(step, GraphPass):
            raise PassError(
                f"{step.name} works on a PyTorch module, but the model is already a graph",
                hint="remove the pass, or start from the module",
            )
        before, start = count_nodes(model), time.process_time()
        try:
            changes = step.run(model, context)
        except OptkitError as error:
            error.args = (f"{step.name}: {error}",)
            raise
        except Exception as error:
            raise PassError(
                f"{step.name}: {type(error).__name__}: {error}",
                hint="this is a defect of the pass: please report it with the model",
            ) from error
        inherit(model)
        try:
            verify(model)
        except OptkitError as error:
            raise PassError(
                f"{step.name} broke the graph: {error}",
                hint="this is a defect of the pass: please report it with the model",
            ) from error
        after = count_nodes(model)
        seconds[step.name] = seconds.get(step.name, 0.0) + time.process_time() - start
        records.append(
            PassRecord(name=step.name, nodes_before=before, nodes_after=after, changes=len(changes))
        )
        logger.info("%s: %d changes, %d -> %d nodes", step.name, len(changes), before, after)
    return records, seconds
