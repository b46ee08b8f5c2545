"""Evolution under a measured constraint: fast enough first, then as close as possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Of each choice of an architecture, which of its options; 0 leaves things as they are.
Genome = tuple[int, ...]

# How often a child has two parents, and a change goes the way that the parent's speed asks for.
_CROSS, _AIMED = 0.5, 0.75
# Children that were tried before, in a row, after which no other is looked for.
_STALE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """An architecture and what it is worth.

    Attributes:
        speedup: Measured; 0 for one that cannot be built.
        closeness: Of its outputs, 1 at most; None for one that is not fast enough.
    """

    genome: Genome
    speedup: float
    closeness: float | None = None

    @property
    def rank(self) -> tuple[bool, float]:
        """Larger is better: what meets the constraint comes before what does not (Deb 2000, section 3)."""
        return (True, self.closeness) if self.closeness is not None else (False, self.speedup)


def evolve(
    kinds: Sequence[str],
    sizes: Sequence[int],
    repair: Callable[[Genome], Genome],
    judge: Callable[[Genome], Judged],
    *,
    trials: int,
    population: int,
    seed: int,
) -> list[Judged]:
    """Judge ``trials`` genomes, or as many as there are; the best come first.

    A steady-state evolution with the constrained tournament of Deb, "An efficient constraint handling method for genetic
    algorithms", 2000, doi:10.1016/S0045-7825(99)00389-8. It starts from every kind of choice alone and all of them
    together, at half and at full strength.

    Args:
        kinds: Of each choice.
        sizes: Options of each choice, the cheapest last.
        repair: Gives the one genome that stands for all that mean the same architecture.
        judge: What a genome is worth.
    """
    rng = np.random.default_rng(seed)
    found: dict[Genome, Judged] = {}
    nothing = repair((0,) * len(sizes))

    def try_out(genome: Genome) -> bool:
        genome = repair(genome)
        if genome == nothing or genome in found:
            return False
        found[genome] = judge(genome)
        return True

    for genome in _first(kinds, sizes):
        if len(found) < min(trials, population):
            try_out(genome)
    stale = 0
    while len(found) < trials and stale < _STALE:
        best = sorted(found.values(), key=lambda j: j.rank, reverse=True)[:population]
        stale = 0 if try_out(_child(best, sizes, rng) if best else _random(sizes, rng)) else stale + 1
    return sorted(found.values(), key=lambda j: j.rank, reverse=True)


def _first(kinds: Sequence[str], sizes: Sequence[int]) -> list[Genome]:
    groups: list[set[str]] = [{kind} for kind in dict.fromkeys(kinds)]
    if len(groups) > 1:
        groups.append(set(kinds))
    return [
        tuple(round(share * (n - 1)) if kind in group else 0 for kind, n in zip(kinds, sizes, strict=True))
        for share in (0.5, 1.0)
        for group in groups
    ]


def _random(sizes: Sequence[int], rng: np.random.Generator) -> Genome:
    return tuple(int(rng.integers(n)) for n in sizes)


def _child(best: Sequence[Judged], sizes: Sequence[int], rng: np.random.Generator) -> Genome:
    """Of one or two parents, the better ones more often; at least one gene is another."""
    mother, father = (best[min(rng.integers(len(best), size=2))] for _ in range(2))
    genes = list(mother.genome)
    if rng.random() < _CROSS:
        genes = [f if rng.random() < 0.5 else m for m, f in zip(genes, father.genome, strict=True)]
    # Too slow asks for cheaper options; fast enough for what may bring it closer.
    way = 1 if mother.closeness is None else -1
    forced = int(rng.integers(len(sizes)))
    for index, n in enumerate(sizes):
        if index != forced and rng.random() >= 1 / len(sizes):
            continue
        step = way if rng.random() < _AIMED else -way
        moved = min(max(genes[index] + step, 0), n - 1)
        genes[index] = moved if moved != genes[index] else int(rng.integers(n))
    return tuple(genes)
