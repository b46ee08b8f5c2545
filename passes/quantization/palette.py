"""Weights as places in a small table of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.graph import drop_unused_initializers
from optkit.passes.base import Context, GraphPass
from optkit.passes.quantization.stored import Site, sites
from optkit.rewrite import Change, Names, register

_ROUNDS = 50
# Share of a cluster's weights that are 0 from which on its entry is 0.
_ZEROS = 0.5
# Entries of all tables of a weight; more cost more than the places in them save.
_MOST = 1 << 16


class PalettizeWeights(GraphPass):
    """Store weights as indices of ``bits`` bits into tables of floats, found by k-means.

    Before: ``MatMul(x, w)``. After: ``MatMul(x, Gather(table, indices))``. Lloyd, "Least squares quantization in PCM",
    IEEE Trans. Inf. Theory 28, 1982, in one dimension; it starts from quantiles and from a uniform grid, and the better
    end is taken. An entry that stands for zeros mostly, as in pruned weights, is 0. Han et al., "Deep Compression", 2016,
    arXiv:1510.00149, section 3.

    Attributes:
        bits: Of each index.
        group: Output channels that share a table; one table for all of a weight when left out.
        targets: Globs, or ``re:`` expressions, of node names, operators or module paths; ``=name`` is the one node of
            that name.
        ignore: The same, for what stays in float.
        smallest: Weights with fewer elements stay in float.
    """

    name: ClassVar[str] = "palettize-weights"
    exact: ClassVar[bool] = False

    bits: Literal[1, 2, 3, 4, 6, 8] = 4
    group: int | None = Field(default=None, ge=1)
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    smallest: int = 2048

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Store every suitable constant."""
        changes: list[Change] = []
        names = Names(model)
        for site in tuple(sites(model, self.targets, self.ignore, self.smallest)):
            count = self._tables(site)
            indices, table = palettes(site.array, site.outputs, count, self.bits)
            name = str(site.value.name)
            t, i = (
                register(site.graph, names.new(f"{name}/{end}"), part)
                for end, part in (("palette", table), ("indices", indices))
            )
            node = ir.node("Gather", [t, i], attributes={"axis": 0}, name=names.new(f"{name}/Gather"))
            site.replace(node, names.new(f"{name}/palettized"))
            detail = f"weights to {count} table(s) of {1 << self.bits}"
            changes.append(Change(rule=self.name, node=str(site.node.name), detail=detail))
        if changes:
            drop_unused_initializers(model)
        return changes

    def _tables(self, site: Site) -> int:
        """How many tables a weight gets: one where groups do not divide its channels, or would hold too many entries."""
        channels = site.array.shape[site.outputs]
        if self.group is None or channels % self.group:
            return 1
        count = channels // self.group
        return count if count << self.bits <= _MOST and site.array.size // count >= 4 << self.bits else 1


def palettes(weight: np.ndarray, axis: int, count: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices shaped like ``weight`` and ``count`` tables one after the other, for runs of channels along ``axis``."""
    moved = np.moveaxis(weight, axis, 0)
    groups = moved.reshape(count, -1)
    size = 1 << bits
    tables = np.empty((count, size), np.float32)
    places = np.empty(groups.shape, np.int32)
    for g, values in enumerate(groups):
        tables[g] = cluster(values, size)
        middles = (tables[g, 1:].astype(np.float64) + tables[g, :-1]) / 2
        places[g] = np.searchsorted(middles, values) + g * size
    indices = np.moveaxis(places.reshape(moved.shape), 0, axis)
    return np.ascontiguousarray(indices), tables.reshape(-1)


def cluster(values: np.ndarray, size: int) -> np.ndarray:
    """``size`` values in order, near all of ``values``: the better of two runs of k-means."""
    ordered = np.sort(values.reshape(-1).astype(np.float64))
    sums, squares = (np.concatenate([[0.0], np.cumsum(v)]) for v in (ordered, ordered**2))
    places = (np.arange(size) + 0.5) / size
    starts = (
        np.quantile(ordered, places), ordered[0] + (ordered[-1] - ordered[0]) * places
    )  # fmt: skip
    found = [_lloyd(ordered, sums, squares, start) for start in starts]
    centres = min(found, key=lambda f: f[0])[1]
    # Pruned weights stay pruned: a mean near their many zeros would fill them up.
    nearest = int(np.abs(centres).argmin())
    middles = (centres[1:] + centres[:-1]) / 2
    members = ordered[np.searchsorted(middles, ordered) == nearest]
    if members.size and (members == 0).mean() > _ZEROS:
        centres[nearest] = 0
    return centres.astype(np.float32)


def _lloyd(
    ordered: np.ndarray, sums: np.ndarray, squares: np.ndarray, centres: np.ndarray
) -> tuple[float, np.ndarray]:
    """The squared error and the centres, after as many rounds as change something, at most ``_ROUNDS``."""
    for _ in range(_ROUNDS):
        bounds = np.concatenate(
            [[0], np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2), [len(ordered)]]
        )
        counts = np.diff(bounds)
        means = np.diff(sums[bounds]) / np.maximum(counts, 1)
        moved = np.where(counts > 0, means, centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    error = np.diff(squares[bounds]) - 2 * centres * np.diff(sums[bounds]) + counts * centres**2
    return float(error.sum()), centres
