"""A candidate: a recipe carried out, how fast and how close it is, and what it falls short of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optkit.recipe import Recipe
from optkit.report import LayerRecord, PassRecord, SaturationRecord

if TYPE_CHECKING:
    from pathlib import Path

    from optkit.backends.base import Estimate
    from optkit.bench import Speedup
    from optkit.evaluate import Comparison, Fidelity

# Rounds of the measurement that ranks, and the CPU seconds that it may take.
RANK = (9, 2.0)
# Of the range of an output: a step of int8.
STEP = 1 / 255
# One must win by this factor to be taken for faster: below, the difference is noise.
CLEARLY = 1.03


@dataclass(slots=True, kw_only=True)
class Built:
    """A recipe carried out: files in a folder, not yet an artifact.

    Attributes:
        lossy: Its passes, or what the backend was told, changed numbers.
        rounds: The graph as it was given holds rounded activations, as after quantization-aware training.
        narrows: Its inputs or states hold less than those of the graph.
        tuned: Its options were compared with others of the backend.
    """

    name: str
    recipe: Recipe
    folder: Path
    records: list[PassRecord]
    seconds: dict[str, float]
    bytes: int
    lossy: bool
    scheme: str
    weights: dict[str, int]
    rounds: bool = False
    narrows: bool = False
    tuned: bool = False
    sqnr: float | None = None
    speedup: Speedup | None = None
    estimate: Estimate | None = None
    saturation: SaturationRecord | None = None
    accuracy: Comparison | None = None
    fidelity: Fidelity | None = None
    layers: list[LayerRecord] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        """Whether its outputs may differ from the reference's: by what was done to it, or by what the target makes of it."""
        saturates = self.saturation is not None and bool(self.saturation.at_risk)
        return self.lossy or self.narrows or saturates


def ratio(built: Built) -> float:
    """What candidates are ordered by: one over the size where that is the goal; else the measured speed-up; where the target is not at hand, one over the estimate or the size."""
    if built.recipe.goal == "size":
        return 1 / max(built.bytes, 1)
    if built.speedup is not None:
        return built.speedup.ratio
    if built.estimate is not None:
        return 1 / math.sqrt(built.estimate.low * built.estimate.high)
    return 1 / max(built.bytes, 1)


def shortfalls(built: Built, recipe: Recipe, *, strict: bool) -> list[str]:
    """Why ``built`` may not ship under the limits of ``recipe``; empty where it may."""
    reasons, limits = losses(built, recipe, strict=strict), recipe.limits
    if limits.max_size_mb is not None and built.bytes > limits.max_size_mb * 1e6:
        reasons.append(f"{built.bytes / 1e6:.2f} MB, allowed {limits.max_size_mb:g}")
    if (
        limits.max_latency_ms is not None
        and built.speedup is not None
        and built.speedup.candidate.median * 1e3 > limits.max_latency_ms
    ):
        reasons.append(f"{built.speedup.candidate.median * 1e3:.3f} ms, allowed {limits.max_latency_ms:g}")
    return reasons


def losses(built: Built, recipe: Recipe, *, strict: bool) -> list[str]:
    """Those of the shortfalls that more layers in float can mend."""
    reasons, limits = [], recipe.limits
    if built.accuracy is not None and built.accuracy.verdict is not None:
        a = built.accuracy
        if a.verdict == "missed" or (strict and a.verdict == "inconclusive"):
            interval = f"95% {a.ci95[0]:.4f} to {a.ci95[1]:.4f}"
            reasons.append(
                f"{a.metric} {a.reference:.4f} -> {a.candidate:.4f}, drop {a.drop:.4f} ({interval}), "
                f"allowed {a.budget}: {a.verdict}"
            )
    if built.lossy and built.fidelity is None and built.accuracy is None:
        reasons.append(
            "the model gives other outputs each time, so what quantization does to them can't be seen"
        )
    if built.fidelity is not None and built.differs:
        f = built.fidelity
        if not f.shapes_equal:
            reasons.append("outputs of other shapes than the reference's")
        if f.cosine < limits.min_cosine:
            reasons.append(
                f"cosine to the fp32 reference {f.cosine:.4f}, at least {limits.min_cosine:g} is asked for"
            )
    if built.fidelity is not None and built.rounds and not built.lossy and built.fidelity.largest > STEP:
        # Runtimes that leave rounding out compute something else than what was trained.
        apart = built.fidelity.largest / STEP
        reasons.append(f"an output is {apart:.1f} steps of int8 from what the rounding in the graph gives")
    return reasons
