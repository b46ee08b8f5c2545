"""Weights as places in a small table of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.graph import drop_unused_initializers
from optkit.passes.base import Context, GraphPass
from optkit.passes.quantization.compensate import compensated, observed, remembered
from optkit.passes.quantization.rounding import as_rows, from_rows
from optkit.passes.quantization.stored import Site, sites
from optkit.rewrite import Change, Names, register

_ROUNDS = 50
# Share of a cluster's weights that are 0 from which on its entry is 0.
_ZEROS = 0.5
# Entries of all tables of a weight; more cost more than the places in them save.
_MOST = 1 << 17


class PalettizeWeights(GraphPass):
    """Store weights as indices of ``bits`` bits into tables of floats, found by k-means.

    Before: ``MatMul(x, w)``. After: ``MatMul(x, Gather(table, indices))``. Lloyd, "Least squares quantization in PCM",
    IEEE Trans. Inf. Theory 28, 1982, in one dimension; it starts from quantiles and from a uniform grid, and the better
    end is taken. An entry that stands for zeros mostly, as in pruned weights, is 0. Han et al., "Deep Compression", 2016,
    arXiv:1510.00149, section 3.

    With ``scaled`` channels of different size share tables: ``Mul(Gather(table, indices), scale)``, with the largest
    magnitude of each output channel as its scale. With ``compensate`` a weight takes up what rounding the ones before it
    did to the outputs on the calibration data (``optkit.passes.quantization.compensate``); without data each takes the
    nearest entry.

    Attributes:
        bits: Of each index.
        group: Output channels that share a table, or the nearest number that divides them; one table for all of a weight
            when left out.
        scaled: Whether each output channel has a factor of its own.
        compensate: Whether weights make up for each other's errors.
        targets: Globs, or ``re:`` expressions, of node names, operators or module paths; ``=name`` is the one node of
            that name.
        ignore: The same, for what stays in float.
        smallest: Weights with fewer elements stay in float.
    """

    name: ClassVar[str] = "palettize-weights"
    exact: ClassVar[bool] = False

    bits: Literal[1, 2, 3, 4, 6, 8] = 4
    group: int | None = Field(default=None, ge=1)
    scaled: bool = False
    compensate: bool = False
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    smallest: int = 2048

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Store every suitable constant."""
        changes: list[Change] = []
        names = Names(model)
        chosen = list(sites(model, self.targets, self.ignore, self.smallest))
        found = self._found(model, chosen, context)
        for site in chosen:
            indices, table, scale = found[str(site.value.name)]
            name = str(site.value.name)
            t, i = (
                register(site.graph, names.new(f"{name}/{end}"), part)
                for end, part in (("palette", table), ("indices", indices.astype(np.int32)))
            )
            node = ir.node("Gather", [t, i], attributes={"axis": 0}, name=names.new(f"{name}/Gather"))
            if self.scaled:
                site.insert(node, names.new(f"{name}/entries"))
                s = register(site.graph, names.new(f"{name}/scale"), scale)
                node = ir.node("Mul", [node.outputs[0], s], name=names.new(f"{name}/Mul"))
            site.replace(node, names.new(f"{name}/palettized"))
            detail = f"{site.node.op_type} weights to {table.size >> self.bits} table(s) of {1 << self.bits}"
            changes.append(Change(rule=self.name, node=str(site.node.name), detail=detail))
        if changes:
            drop_unused_initializers(model)
        return changes

    def _found(
        self, model: ir.Model, chosen: Sequence[Site], context: Context
    ) -> Mapping[str, tuple[np.ndarray, ...]]:
        """Indices, tables and scales by the name of the weight."""
        if not self.compensate:
            return {str(s.value.name): self._palettized(s, None) for s in chosen}
        known = remembered(context, (self.name, self.bits, self.group, self.scaled))
        missing = [s for s in chosen if str(s.value.name) not in known]
        for site, moments in observed(model, missing, context):
            known[str(site.value.name)] = self._palettized(site, moments)
        return known

    def _palettized(self, site: Site, moments: np.ndarray | None) -> tuple[np.ndarray, ...]:
        weight = site.array
        scale = np.ones([1] * weight.ndim, np.float32)
        if self.scaled:
            others = tuple(i for i in range(weight.ndim) if i != site.outputs)
            scale = np.abs(weight).max(axis=others, keepdims=True)
            scale = np.where(scale > 0, scale, np.float32(1))
        count = self._tables(site)
        whole = np.ascontiguousarray(weight / scale)
        tables = tables_for(whole, site.outputs, count, self.bits)
        if moments is not None:
            rows = as_rows(site.node, whole)
            each = np.repeat(tables.astype(np.float64), weight.shape[site.outputs] // count, 0)
            middles, lines = (each[:, 1:] + each[:, :-1]) / 2, np.arange(len(each))

            def nearest(_: int, values: np.ndarray) -> np.ndarray:
                found = (values.reshape(-1, 1) > middles).sum(1)
                return np.asarray(each[lines, found]).reshape(values.shape)

            rounded = compensated(rows, moments, nearest)
            whole = from_rows(site.node, rounded.astype(np.float32), weight.shape)
        indices = places_in(whole, site.outputs, tables)
        kind = np.uint16 if tables.size <= 1 << 16 else np.int32
        return indices.astype(kind), tables.reshape(-1), scale

    def _tables(self, site: Site) -> int:
        """How many tables a weight gets: those of the largest groups up to ``group`` that divide its channels.

        Of larger ones, where so many tables would hold too many entries; one for all where none will do.
        """
        channels = site.array.shape[site.outputs]
        if self.group is None:
            return 1
        sizes = [n for n in range(1, channels + 1) if channels % n == 0]
        fitting = [n for n in sizes if n <= self.group][::-1] + [n for n in sizes if n > self.group]
        counts = (channels // n for n in fitting if n > self.group // 2)
        least = 4 << self.bits
        return next(
            (c for c in counts if c << self.bits <= _MOST and site.array.size // c >= least),
            1,
        )


def tables_for(weight: np.ndarray, axis: int, count: int, bits: int) -> np.ndarray:
    """``[count, 2^bits]`` entries in order, for runs of channels along ``axis``."""
    groups = np.moveaxis(weight, axis, 0).reshape(count, -1)
    return np.stack([cluster(values, 1 << bits) for values in groups])


def places_in(weight: np.ndarray, axis: int, tables: np.ndarray) -> np.ndarray:
    """Where in all tables, one after the other, the entry nearest to each weight is; shaped like ``weight``."""
    moved = np.moveaxis(weight, axis, 0)
    groups = moved.reshape(len(tables), -1)
    places = np.empty(groups.shape, np.int32)
    for g, values in enumerate(groups):
        middles = (tables[g, 1:].astype(np.float64) + tables[g, :-1]) / 2
        places[g] = np.searchsorted(middles, values) + g * tables.shape[1]
    return np.ascontiguousarray(np.moveaxis(places.reshape(moved.shape), 0, axis))


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
