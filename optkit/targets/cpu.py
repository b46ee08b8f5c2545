"""Processors."""

from __future__ import annotations

from optkit.targets.spec import Target

ROWS = (
    Target(
        name="cpu",
        vendor="any",
        arch="this machine",
        backends=("onnxruntime", "openvino"),
        formats=frozenset({"fp32", "int8"}),
        runs_here=True,
        source="measured where it runs",
    ),
)
