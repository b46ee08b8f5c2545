"""Which positions of which axes can only be removed together: a label for every position, joined where they depend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Product:
    """An axis that several were merged into, one of them of unknown size; splitting it gives them back.

    Attributes:
        axes: The axes, the slowest first.
        sizes: Theirs; symbols for what is not known.
    """

    axes: tuple[Axis, ...]
    sizes: tuple[int | str, ...]


# The labels of an axis, one a position; None where the size is not known, so that nothing can be removed.
Axis = np.ndarray | Product | None


class Labels:
    """Labels, joined as sets (Tarjan 1975: union by size, path halving); some are frozen, with a reason."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._frozen: dict[int, str] = {}
        self._roots: np.ndarray | None = None  # of all labels, until more are made or joined

    def fresh(self, n: int) -> np.ndarray:
        """New labels for an axis of ``n`` positions."""
        start, self._roots = len(self._parent), None
        self._parent.extend(range(start, start + n))
        self._size.extend([1] * n)
        return np.arange(start, start + n)

    def root(self, label: int) -> int:
        """The label that stands for all that ``label`` was joined with."""
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def roots(self, axis: np.ndarray) -> np.ndarray:
        """The roots of an axis."""
        if self._roots is None:
            every = range(len(self._parent))
            self._roots = np.fromiter(map(self.root, every), np.int64, len(every))
        found: np.ndarray = self._roots[axis]
        return found

    def join(self, a: Axis, b: Axis, why: str = "") -> None:
        """Position ``i`` of one axis goes with position ``i`` of the other; with an unknown one, both stay."""
        if a is b:
            return
        if isinstance(a, Product) and isinstance(b, Product) and len(a.axes) == len(b.axes):
            for x, y in zip(a.axes, b.axes, strict=True):
                self.join(x, y, why)
            return
        if isinstance(a, Product) or isinstance(b, Product):
            self.freeze(a, why or "meets an axis that was merged")
            self.freeze(b, why or "meets an axis that was merged")
            return
        if a is None or b is None or len(a) != len(b):
            self.freeze(a, why or "its size is not known")
            self.freeze(b, why or "its size is not known")
            return
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            self._join(x, y)

    def join_all(self, labels: Iterable[int]) -> None:
        """All of them go together."""
        first: int | None = None
        for label in labels:
            if first is None:
                first = int(label)
            else:
                self._join(first, int(label))

    def _join(self, x: int, y: int) -> None:
        x, y = self.root(x), self.root(y)
        if x == y:
            return
        self._roots = None
        if self._size[x] < self._size[y]:
            x, y = y, x
        self._parent[y] = x
        self._size[x] += self._size[y]
        if y in self._frozen:
            self._frozen.setdefault(x, self._frozen[y])

    def freeze(self, axis: Axis, why: str) -> None:
        """Nothing of the axis may be removed."""
        if isinstance(axis, Product):
            for inner in axis.axes:
                self.freeze(inner, why)
        elif axis is not None:
            for label in axis.tolist():
                self._frozen.setdefault(self.root(label), why)

    def reason(self, label: int) -> str | None:
        """Why a position must stay, or None."""
        return self._frozen.get(self.root(int(label)))

    def is_frozen(self, axis: Axis) -> bool:
        """Whether all of the axis must stay."""
        if isinstance(axis, Product):
            return all(map(self.is_frozen, axis.axes))
        return axis is None or all(self.reason(label) is not None for label in axis.tolist())
