"""Zeros in the weights of a graph, without torch: single ones, or N:M patterns."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import AfterValidator, Field

from optkit.errors import PassError
from optkit.graph import attribute
from optkit.passes.base import Context, GraphPass
from optkit.passes.pruning.weights import FEWEST, checked_pattern
from optkit.rewrite import Change


class ZeroWeights(GraphPass):
    """Set the smallest weights of convolutions and matrix products to 0, by magnitude, without training.

    Runtimes are faster for zeros on few targets: ``optkit prune --sparsity`` measures it. Layers with fewer than 16 weights
    an output stay whole.

    Attributes:
        sparsity: Share of the weights of each layer that become 0; N:M patterns bring their own.
        pattern: ``any``, or ``2:4``: of each four weights along the inputs, two stay.
        targets: Globs, or ``re:`` expressions, of weights.
        ignore: The same, for what stays.
    """

    name: ClassVar[str] = "zero-weights"
    exact: ClassVar[bool] = False

    sparsity: float = Field(default=0.8, gt=0, lt=1)
    pattern: Annotated[str, AfterValidator(checked_pattern)] = "any"
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Zeros are the smallest there are: a second run finds the same ones."""
        changes, seen = [], 0
        for weight, axis in _weights(model.graph):
            name = str(weight.name)
            if not _named(name, self.targets) or _named(name, self.ignore):
                continue
            seen += 1
            assert weight.const_value is not None
            array = weight.const_value.numpy()
            # Kernels take their pattern along the input channels, at each position of a convolution.
            ins = 1 if len(array.shape) > 2 else 1 - axis
            last = np.moveaxis(array, ins, -1)
            keep = self._keep(np.abs(last))
            if keep is None or not np.any(last[~keep]):
                continue
            new = np.moveaxis(np.where(keep, last, 0), -1, ins).astype(array.dtype)
            weight.const_value = ir.tensor(np.ascontiguousarray(new), name=weight.name)
            detail = f"{np.count_nonzero(new == 0)} of {new.size} weights are 0 ({self.pattern})"
            changes.append(Change(rule=self.name, node=name, detail=detail))
        if not seen:
            raise PassError(
                "pruned 0 weights: none is named by targets and not by ignore, or all are small",
                hint="see targets and ignore of the recipe",
            )
        return changes

    def _keep(self, size: np.ndarray) -> np.ndarray | None:
        """Which of ``[..., inputs]`` stay; None where the pattern does not fit."""
        keep = np.zeros(size.shape, bool)
        if self.pattern != "any":
            n, m = (int(x) for x in self.pattern.split(":"))
            if size.shape[-1] % m:
                return None
            first = np.argsort(-size.reshape(-1, m), axis=1, kind="stable")[:, :n]
            np.put_along_axis(keep.reshape(-1, m), first, True, 1)
            return keep
        stay = max(1, size.size - int(size.size * self.sparsity))
        keep.reshape(-1)[np.argsort(-size, axis=None, kind="stable")[:stay]] = True
        return keep


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(
        re.search(p[3:], name) is not None if p.startswith("re:") else fnmatch.fnmatchcase(name, p)
        for p in patterns
    )


def _weights(graph: ir.Graph) -> Iterator[tuple[ir.Value, int]]:
    """Weights of layers with the axis of their outputs, each once."""
    seen: set[ir.Value] = set()
    for node in graph:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain != "" or len(node.inputs) < 2:
            continue
        weight = node.inputs[1]
        if weight is None or weight in seen or weight.const_value is None or not weight.is_initializer():
            continue
        rank = len(weight.const_value.shape)
        matrix = rank == 2 or (node.op_type == "Conv" and rank > 2)
        if weight.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or not matrix:
            continue
        seen.add(weight)
        axis = 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else rank - 1
        if weight.const_value.size // weight.const_value.shape.numpy()[axis] >= FEWEST:
            yield weight, axis
