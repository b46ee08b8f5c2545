"""Operators that move values about without computing with them."""

from __future__ import annotations

from optkit.graph import attribute
from optkit.ops.spec import OpSpec

ROWS = (
    *(
        OpSpec(name=name, family="shape", same_grid=True)
        for name in (
            "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Expand", "Tile", "Identity",
            "DepthToSpace", "SpaceToDepth", "Gather", "GatherElements", "GatherND", "Split", "Pad",
        )
    ),
    OpSpec(name="Resize", family="shape", same_grid=lambda node: attribute(node, "mode", "nearest") == "nearest"),
    OpSpec(name="Concat", family="shape", activations=None),
    OpSpec(name="Shape", family="shape"),
    OpSpec(name="ScatterND", family="shape"),
    OpSpec(name="ScatterElements", family="shape"),
)  # fmt: skip
