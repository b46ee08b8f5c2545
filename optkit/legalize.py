"""Make a graph fit a backend, or say for every node why it can't be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.errors import UnsupportedOpError
from optkit.graph import describe, walk

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.backends.base import Backend
    from optkit.targets import Target


def legalize(model: ir.Model, backend: Backend, target: Target, *, name: str) -> None:
    """Check every node against ``backend``.

    Raises:
        UnsupportedOpError: Lists all nodes that it can't run, with the reason for each.
    """
    problems = [
        (describe(node), reason)
        for node in walk(model)
        if (reason := backend.unsupported(node, target)) is not None
    ]
    if problems:
        raise UnsupportedOpError(
            f"{name} on {backend.name} for {target.name}",
            problems,
            hint="choose another --backend or --precision",
        )
