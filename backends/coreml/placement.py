"""Where Q/DQ pairs go for Core ML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from optkit.placement import Placement, Row, rows

_ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "HardSwish", "Swish", "Sigmoid", "HardSigmoid"})
_COMPUTE = rows(
    Row(op="Conv", output=False, absorbs=_ACTIVATIONS),
    Row(op="MatMul", output=False),
    Row(op="Gemm", output=False, absorbs=_ACTIVATIONS),
)

DEFAULT = Placement(
    name="default",
    rows=_COMPUTE,
    activation="s8",
    weight="s8",
    source=(
        "coremltools guide, 'Quantization Overview': int8 per-tensor activations with per-channel symmetric int8 weights "
        "run in the int8-int8 mode of the Neural Engine from A17 Pro and M4 on"
    ),
)
# As the placements of the same names for processors, so that their recipes do the same here.
ALL = replace(DEFAULT, name="all")
LINEAR = replace(DEFAULT, name="linear", rows={op: row for op, row in _COMPUTE.items() if op != "Conv"})
CONV = replace(DEFAULT, name="conv", rows={"Conv": _COMPUTE["Conv"]})

PLACEMENTS: Mapping[str, Placement] = {p.name: p for p in (DEFAULT, ALL, LINEAR, CONV)}
