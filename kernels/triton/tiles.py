"""Kernels whose configuration is a tile: of each, a device gets several that differ in more than how many loads are under way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from optkit.kernels.base import Kernel, Problem, Program
from optkit.targets.gpu import Capability


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Rows and columns of a tile of the output, and the depth that is loaded at a time where that is free.

    Attributes:
        units: Programs that stay, and walk over tiles with descriptors; None where each has one tile.
    """

    m: int
    n: int
    k: int = 0
    warps: int
    stages: int
    units: int | None = None


class Tiled(Kernel):
    """A product. Which tile is fastest depends on how many rows there are, which only the device knows."""

    @abstractmethod
    def tiles(self, problem: Problem, capability: Capability) -> Sequence[Tile]:
        """The configurations for an architecture, the likeliest first."""

    @abstractmethod
    def tiled(self, problem: Problem, tile: Tile) -> Program:
        """The specialization of one."""

    def program(self, problem: Problem, capability: Capability) -> Program:
        """The likeliest."""
        return self.tiled(problem, self.tiles(problem, capability)[0])

    def finalists(self, problem: Problem, capability: Capability) -> Sequence[Program]:
        """One for each tile."""
        return [self.tiled(problem, tile) for tile in self.tiles(problem, capability)]

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        """Around the rows of the likeliest tile."""
        m = self.tiles(problem, capability)[0].m
        return (1, m - 1, m, m + 1)
