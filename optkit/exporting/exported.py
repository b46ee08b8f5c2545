"""What export hands on: a graph, and the module that it must compute the same as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from optkit.exporting.axes import Axes
from optkit.exporting.eager import run_eager
from optkit.exporting.signature import Signature


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A graph and the module that it must compute the same as.

    Attributes:
        model: As exported: at the exporter's opset, every node with its module and line.
        module: In evaluation mode; takes ``signature.arguments(tensors)``.
        tensors: The example inputs, in the order of the graph's inputs.
        rung: Of the ladder.
        outputs: Names.
    """

    model: ir.Model
    name: str
    module: Any
    signature: Signature
    tensors: tuple[torch.Tensor, ...]
    axes: Axes
    rung: str
    outputs: tuple[str, ...]
    notes: tuple[str, ...]

    def eager(self, tensors: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
        """What the module itself computes, by output name."""
        return run_eager(self.module, self.signature, tensors, self.outputs)

    def feeds(self, tensors: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
        """The tensors as a batch for the graph."""
        names = [str(v.name) for v in self.model.graph.inputs]
        given = dict(zip(self.signature.names, tensors, strict=True))
        return {n: given[n].numpy(force=True) for n in names}
