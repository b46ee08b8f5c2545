"""What a fused kernel computes becomes one call of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from optkit.graph import walk
from optkit.kernels import KERNELS
from optkit.kernels.base import DOMAIN, Kernel
from optkit.kernels.rules import legal
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, apply, remove_unused


class CallKernels(GraphPass):
    """Replace what kernels compute by calls of their ONNX functions in the domain ``optkit``, for NVIDIA's GPUs from sm_80 on and AMD's gfx942.

    Before: ``t = Add(x, r)``; ``y = LayerNormalization(t, scale, bias)``, with ``t`` read elsewhere too.
    After: ``y, t = optkit.AddLayerNorm(x, r, scale, bias)``; the function's body computes the same in any ONNX runtime.
    Other targets have no kernels: nothing changes for them.
    """

    name: ClassVar[str] = "call-kernels"

    kernels: tuple[str, ...] | None = None
    """Names of those that may be called, the first that fits wins; None for all."""

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        capability = context.target.capability
        if capability is None or capability < (8, 0):
            return []
        names = KERNELS if self.kernels is None else self.kernels
        kernels: list[Kernel] = [KERNELS[name]() for name in names]
        # Larger ones first: what is left over is one too.
        changes: list[Change] = []
        for kernel in sorted(kernels, key=lambda k: -k.size):
            made = apply([legal(rule, capability) for rule in kernel.rules()], model)
            if made:
                # What a kernel reads in another order leaves its old order behind.
                remove_unused(tuple(model.graph))
            changes += made
        called = {node.op_type for node in walk(model) if node.domain == DOMAIN}
        for kernel in kernels:
            if kernel.op in called:
                function = kernel.function()
                model.functions.setdefault(function.identifier(), function)
                model.opset_imports[DOMAIN] = 1
        return changes
