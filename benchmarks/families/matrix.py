"""The matrix of families and stages as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optkit.benchmarks.families.stages import STAGES

_TITLES = {
    "export": "torch.export", "onnx": "ONNX, every size", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO",
    "coreml": "Core ML", "litert": "LiteRT", "int8": "int8",
}  # fmt: skip


def written(found: Mapping[str, Any]) -> str:
    """The page, from what the run found."""
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items()))
    machines: dict[str, list[str]] = {}
    for stage, name in found["processors"].items():
        machines.setdefault(name, []).append(_TITLES[stage])
    where = "; ".join(f"{name} ({', '.join(stages)})" for name, stages in machines.items())
    lines = [
        "# Model families", "",
        "Written by `python -m optkit.benchmarks.families`. Each family is built from its configuration with seeded random weights at "
        "reduced size, exported with every axis that was asked for free, cleaned up, compiled for the CPU with both runtimes in float32 and "
        "with ONNX Runtime in int8, for Core ML and for LiteRT, and run at the example and at two other sizes of every free axis, batch 1 among them where the batch is free. Float stages "
        "pass when every output has eager's shape and differs by at most 1e-4 of its largest value, or by what rounding alone explains "
        "(eager in float32 against float64); the number is the largest difference. Core ML's is that of the reference evaluator on the saved "
        "package, with free axes as ranges, or with fixed sizes, a package for each, where the row says so; nothing ran on Apple hardware. LiteRT's has one file for all the sizes, which are fixed in it. int8 passes when the cosine to float, averaged over the "
        "outputs, is at least 0.99, as `optkit compile` gets it: the layers that hurt most return to float until it is. Calibration had two batches of random inputs. Weights are random, so it says that int8 works, not "
        "what it costs a trained network.", "",
        f"Last run on: {where}. {versions}.", "",
        "| stage | pass |", "|---|---|",
        *(f"| {_TITLES[s]} | {sum(s in r['passed'] for r in rows)} of {len(rows)} |" for s in STAGES), "",
        "| family | kind | way | nodes | " + " | ".join(_TITLES[s] for s in STAGES[1:]) + " | CPU s |",
        "|---" * (5 + len(STAGES)) + "|",
        *(_line(r) for r in rows), "",
    ]  # fmt: skip
    broken = [(r["name"], stage, reason) for r in rows for stage, reason in r["failed"].items()]
    if broken:
        lines += ["## What fails, and where", ""]
        lines += [f"* **{name}**, {_TITLES[stage]}: {_safe(reason)}" for name, stage, reason in broken]
        lines.append("")
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    before, after = row["nodes"]
    cells = [row["name"], row["kind"], row["rung"] or "fails", f"{before} → {after}" if after else "–"]
    for stage in STAGES[1:]:
        if stage in row["passed"]:
            error = row["errors"].get(stage)
            kept, layers = row["in_float"]
            mixed = f" ({kept} of {layers} in float)" if kept else ""
            sizes = " (fixed sizes)" if stage == "coreml" and row["fixed"] else ""
            cells.append(f"{error:.4f}{mixed}" if stage == "int8" else f"{error:.0e}{sizes}")
        else:
            cells.append("fails" if stage in row["failed"] else "–")
    return "| " + " | ".join([*cells, str(row["seconds"])]) + " |"


def _safe(text: str) -> str:
    return text.replace("|", "/").replace("<", "‹").replace(">", "›")
