"""What optkit has to reach on x86 processors with VNNI, and what it does: a row a model.

    python -m optkit.benchmarks.goals

One thread, CPU time, in turn with the peers in the same run, on the same data and by the same metric.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from optkit.benchmarks.readme import RESULTS
from optkit.benchmarks.results import ModelResult, Row, Versus, interval, read
from optkit.benchmarks.variants import OURS, OURS_ORT


@dataclass(frozen=True, slots=True)
class Goal:
    """Speed-ups: over ONNX Runtime fp32, over the best stock peer, with ONNX Runtime alone over its own quantizers."""

    fp32: float
    peer: float
    alone: float | None = None


GOALS = {
    "minilm_l6": Goal(3.0, 1.0, 1.2),
    "ppocr4_rec": Goal(3.5, 1.5),
    "efficientnet_lite0": Goal(2.5, 1.5),
    "mobilenetv2_shaped": Goal(2.9, 1.5),
    "resnet50_shaped": Goal(4.3, 1.0),
    "vit_s_shaped": Goal(2.8, 1.05),
    "yolov8n_shaped": Goal(2.6, 1.1),
}
# For every other model: never slower than the best stock peer.
ANY = Goal(1.0, 1.0)

HEAD = (
    "model", "over ORT fp32 [95 %]", "over the best stock peer [95 %]", "ONNX Runtime alone, over ORT's own [95 %]",
    "metric lost [95 %]", "of it to that peer [95 %]", "roofline", "ships", "short of",
)  # fmt: skip
# Two sessions of the same file differ by this share.
_NOISE = 0.02


def table(models: Sequence[ModelResult]) -> str:
    """Markdown; models with a goal of their own first."""
    order = list(GOALS)
    models = sorted(models, key=lambda m: order.index(m.name) if m.name in GOALS else len(order))
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    lines += [f"| {' | '.join(cells(model))} |" for model in models]
    return "\n".join(lines) + "\n"


def cells(model: ModelResult) -> Iterator[str]:
    """One row of the table."""
    goal = GOALS.get(model.name, ANY)
    ours = next((r for r in model.rows if r.name == OURS), None)
    yield model.name
    if ours is None or ours.speedup is None:
        yield from ["-"] * (len(HEAD) - 2)
        yield f"failed: {'no row' if ours is None else ours.error}".replace("|", "/")
        return
    over = {v.ours: v for v in model.versus}
    yield f"{_ratio(ours.speedup, ours.speedup_ci95)} (goal {goal.fp32:g})"
    yield _over(over.get(OURS), goal.peer)
    yield _over(over.get(OURS_ORT), goal.alone)
    yield _lost(model, ours)
    yield _lost_to(over.get(OURS))
    yield "-" if ours.roofline is None else f"{ours.roofline * 100:.0f} %"
    yield ours.note.replace("|", "/")
    yield ", ".join(short(model)) or "-"


def short(model: ModelResult) -> list[str]:
    """Which goals a model misses, in words; a ratio counts as reached up to what two sessions of a file differ by.

    A metric below the best stock peer's is one however few samples decide it: none of ours shall be less accurate.
    """
    goal, over = GOALS.get(model.name, ANY), {v.ours: v for v in model.versus}
    ours = next(r for r in model.rows if r.name == OURS)
    found = []
    if (ours.speedup or 0.0) < goal.fp32 * (1 - _NOISE):
        found.append("ORT fp32")
    for name, wanted, what in ((OURS, goal.peer, "peer"), (OURS_ORT, goal.alone, "ORT alone")):
        if wanted is not None and (name not in over or over[name].ratio < wanted * (1 - _NOISE)):
            found.append(what)
    if ours.verdict != "met":
        found.append(f"accuracy ({ours.verdict or 'not measured'})")
    versus = over.get(OURS)
    if versus is None or versus.drop is None or versus.drop_ci95 is None:
        found.append("the peer's metric (not compared)")
    elif versus.drop > 0:
        undecided = "" if versus.drop_ci95[0] > 0 else " (undecided)"
        found.append(f"the peer's metric, by {versus.drop:.4f}{undecided}")
    return found


def _lost(model: ModelResult, row: Row) -> str:
    if row.drop is None or row.drop_ci95 is None:
        return "-"
    drop = f"{row.drop:+.4f}{interval(row.drop_ci95, '+.4f')}"
    return f"{drop} of {model.metric}, n = {row.n}: {row.verdict}"


def _lost_to(found: Versus | None) -> str:
    if found is None or found.drop is None:
        return "-"
    return f"{found.drop:+.4f}{interval(found.drop_ci95, '+.4f')}"


def _ratio(ratio: float, ci95: tuple[float, float] | None) -> str:
    return f"{ratio:.2f}x{interval(ci95, '.2f')}"


def _over(found: Versus | None, goal: float | None) -> str:
    if found is None:
        return "-"
    asked = "" if goal is None else f" (goal {goal:g})"
    return f"{_ratio(found.ratio, found.ci95)}{asked}, {found.peer}"


if __name__ == "__main__":
    sys.stdout.write(table(read(RESULTS).models))
