"""Weights that float16 holds, computed with in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.passes.base import Context, GraphPass
from optkit.passes.quantization.stored import sites
from optkit.rewrite import Change


class RoundWeights(GraphPass):
    """Round weights of products, convolutions and looked-up tables to float16's numbers (IEEE 754-2019, binary16); they stay float32.

    LiteRT files store constants that float16 holds in 16 bits, so that theirs have half the size: TensorFlow Lite's float16
    quantization. Rounding is to nearest; weights of which one is beyond float16's largest, 65504, stay as they are.

    Attributes:
        targets: Globs, or ``re:`` expressions, of node names, operators or module paths to round; ``=name`` is the one node of
            that name.
        ignore: The same, for what stays.
        smallest: Weights with fewer elements stay.
    """

    name: ClassVar[str] = "round-weights"
    exact: ClassVar[bool] = False

    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    smallest: int = 1024

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """What is rounded already is left alone."""
        changes = []
        for site in sites(model, self.targets, self.ignore, self.smallest):
            before = site.array
            with np.errstate(over="ignore"):
                after = before.astype(np.float16).astype(np.float32)
            if np.isinf(after).any() or np.array_equal(before, after):
                continue
            site.value.const_value = ir.tensor(after, name=site.value.name)
            detail = f"{site.node.op_type} weights to float16"
            changes.append(Change(rule=self.name, node=str(site.node.name), detail=detail))
        return changes
