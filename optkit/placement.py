"""Where Q/DQ pairs go, as data: each backend has its rows, one pass reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["compute", "between"]
Library = Literal["mlas", "onednn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How one operator takes part.

    Attributes:
        op: ONNX operator type.
        role: ``compute``: its weights are worth quantizing, and its inputs get pairs for its sake.
            ``between``: joins only where all its inputs are on a grid already, so that integers flow through.
        output: Whether its output gets a pair. A backend whose integer kernel cannot give float asks for it.
        floats: Whether its kernel gives float as well: its output then gets a pair only for a kernel that reads integers.
        absorbs: Activations right after it that its integer kernel applies for free; the pair goes behind them.
            ``Swish`` also stands for ``x * Sigmoid(x)``.
        into: Operators whose kernel computes this one before it stores: of two operands, the one that the later of such
            nodes makes for this one alone stays float.
        unify: Whether what it reads and makes lies on one grid, as wide as the widest of them: its kernel copies integers and
            never rescales them.
        max_rank: Highest rank of the weights, or of the output of operators between, for which the kernel exists.
    """

    op: str
    role: Role = "compute"
    output: bool = True
    floats: bool = False
    absorbs: frozenset[str] = frozenset()
    into: frozenset[str] = frozenset()
    unify: bool = False
    max_rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The rows of a backend under a name, with the formats its kernels want.

    Attributes:
        activation: Format of activations, per tensor.
        weight: Format of weights, per output channel where ``per_channel``.
        centred: By what share a range on both sides of 0 may be widened so that 0 is in its middle: kernels of signed integers
            have no zero point to make up for.
        library: Whose integer kernels multiply on x86; ``optkit/saturation.py`` knows what those saturate without VNNI.
        bias: Whether biases become int32 on the grid of the products; else they stay float.
        source: Why these rows: a measurement or a document.
    """

    name: str
    rows: Mapping[str, Row]
    activation: str
    weight: str
    per_channel: bool = True
    centred: float = 0.0
    library: Library = "mlas"
    bias: bool = True
    source: str = ""


def rows(*rows: Row) -> dict[str, Row]:
    """Rows by operator."""
    return {row.op: row for row in rows}
