"""The table of the README, from the results that are kept.

python -m optkit.benchmarks.readme >> table.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from optkit.benchmarks.results import ModelResult, Row, read

RESULTS = Path(__file__).parent / "results" / "cpu.json"

_HEAD = (
    "| model | metric: original → optkit (drop at most) | speed-up | size | on ONNX Runtime alone |"
    " fastest stock int8 within 1 %, or undecided | stock int8 beyond 1 % |"
)


def table(models: tuple[ModelResult, ...]) -> str:
    """A row a model: what optkit shipped, and what the quantizers of ONNX Runtime and OpenVINO (NNCF) gave."""
    lines = [_HEAD, "|---|---|---|---|---|---|---|"]
    for model in models:
        reference, rows = model.rows[0], {r.name: r for r in model.rows}
        ours, alone = rows["optkit"], rows["optkit, ONNX Runtime alone"]
        peers = [
            r
            for r in model.rows
            if r.name.startswith(("ORT ", "NNCF")) and r is not reference and r.speedup is not None
        ]
        kept = [r for r in peers if not model.accurate or r.verdict != "missed"]
        lost = [r for r in peers if r not in kept]
        best = max(kept, key=lambda r: r.speedup or 0, default=None)
        assert ours.bytes is not None
        assert reference.bytes is not None
        cells = (
            f"{model.name}, {model.kind}",
            _accuracy(reference, ours) if model.accurate else "random weights: speed alone",
            f"**{ours.speedup:.2f}x**",
            f"{ours.bytes / reference.bytes * 100:.0f} %",
            f"{alone.speedup:.2f}x" + (f", {alone.metric:.4f}" if model.accurate else ""),
            "none" if best is None else _peer(best, model.accurate),
            "; ".join(_peer(r, True) for r in lost) or "–",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _accuracy(reference: Row, ours: Row) -> str:
    assert ours.drop_ci95 is not None
    return f"{reference.metric:.4f} → {ours.metric:.4f} ({ours.drop_ci95[1]:+.4f}, {ours.verdict})"


def _peer(row: Row, accurate: bool) -> str:
    metric = f", {row.metric:.4f}" if accurate and row.metric is not None else ""
    return f"{row.name} {row.speedup:.2f}x{metric}"


if __name__ == "__main__":
    sys.stdout.write(table(read(RESULTS).models) + "\n")
