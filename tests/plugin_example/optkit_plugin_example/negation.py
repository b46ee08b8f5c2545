"""Two Negs in a row are nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, Rule, apply

if TYPE_CHECKING:
    import onnx_ir as ir


def _pattern(op: Any, x: Any) -> Any:
    return op.Neg(op.Neg(x))


def _rewrite(op: Any, x: ir.Value, **_: Any) -> Any:
    return op.Identity(x)


class RemoveDoubleNegation(GraphPass):
    """Replace ``-(-x)`` by ``x``.

    Attributes:
        most: Pairs that are removed in one run; 0 removes none.
    """

    name: ClassVar[str] = "double-negation"

    most: int = 1000

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Apply the rule."""
        return apply([Rule(_pattern, _rewrite, name=self.name)], model) if self.most else []
