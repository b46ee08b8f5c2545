"""Static quantization: ranges from calibration data, Q/DQ pairs where the placement's rows put them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.errors import PassError, UnknownNameError
from optkit.formats import FORMATS
from optkit.graph import describe, drop_unused_initializers, rank, walk
from optkit.passes.base import Context, GraphPass
from optkit.passes.quantization.calibrate import observe, observe_channels
from optkit.passes.quantization.integers import Weights
from optkit.passes.quantization.observers import Method
from optkit.passes.quantization.plan import Plan, make_plan
from optkit.passes.quantization.rounding import second_moments
from optkit.passes.quantization.through import Function, through
from optkit.qdq import centred, insert_pair, scale_zero
from optkit.rewrite import Change, Names, label
from optkit.saturation import narrowed, saturated

if TYPE_CHECKING:
    from optkit.placement import Placement

logger = logging.getLogger(__name__)


class QuantizeStatic(GraphPass):
    """Quantize weights and activations to integers with scales fixed before the model runs.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
    arXiv:1712.05877: affine activations per tensor, symmetric weights per output channel, bias in int32 with
    ``scale = scale_x * scale_w``. Bodies of If and Loop are left in float: calibration can't look into them.

    Where all that reads a value is one activation, its grid ends where that is flat, and MSE counts errors behind it
    (``through.py``): integer convolutions store before a float kernel applies HardSwish.

    On a target whose u8 x s8 products saturate in 16 bits, layers that do so on the calibration data get weights in 7 bits
    (-63 to 63), in those output channels that could: then they cannot any more.

    Attributes:
        placement: Name of the backend's rows.
        method: How ranges follow from what was seen.
        percentile: Share of the values kept, for ``percentile``.
        targets: Globs, or ``re:`` expressions, of node names, operators or module paths to quantize; ``=name`` is the one
            node of that name.
        ignore: The same, for what stays in float.
        bias_correction: Whether what rounded weights add to the mean of a channel is taken out of its bias; layers without
            a bias get one, except MatMul.
        rounding: ``nearest``, or ``adaptive``: weights are rounded so that the layer's outputs come out close.
    """

    name: ClassVar[str] = "quantize-static"
    needs_data: ClassVar[bool] = True

    exact: ClassVar[bool] = False

    placement: str = "default"
    method: Method = "min-max"
    percentile: float = Field(default=99.99, gt=50, le=100)
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    bias_correction: bool = False
    rounding: Literal["nearest", "adaptive"] = "nearest"

    def needs_format(self, context: Context) -> str | None:
        """Of activations, by the placement."""
        placement = context.placements.get(self.placement)
        return None if placement is None else FORMATS[placement.activation].precision

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Observe, then insert the pairs."""
        if self.placement not in context.placements:
            raise UnknownNameError("placement", self.placement, context.placements, where=self.name)
        placement = context.placements[self.placement]
        weights = Weights(placement, Names(model), self._saturating(model, placement, context))
        fmt = FORMATS[placement.activation]
        self.refuse(context)
        if self.method == "entropy" and not fmt.integer:
            raise PassError(f"entropy counts even steps, which {fmt.name} does not have", hint="method: mse")
        stored = FORMATS[placement.weight]
        if self.rounding == "adaptive" and not stored.integer:
            raise PassError(
                f"adaptive rounding chooses between integers, which {stored.name} is not",
                hint="rounding: nearest",
            )
        plan, limits = self._plan(model, placement, weights, context)
        for name, reason in plan.left:
            logger.debug("%s stays in float: %s", name, reason)
        scales = {
            origin: scale_zero(*centred(*found, fmt, placement.centred), fmt)
            for origin, found in limits.items()
        }
        compute = [node for node, row in plan.nodes.items() if row.role == "compute"]
        if self.bias_correction and compute:
            weights.means = _means(model, compute, context)
        if self.rounding == "adaptive" and compute:
            weights.moments = second_moments(model, compute, context)
        changes = []
        for node, row in plan.nodes.items():
            if row.role == "compute":
                x = node.inputs[0]
                assert x is not None
                weights.quantize(node, scales[plan.pairs[x]][0])
            detail = f"{node.op_type} to {placement.weight} x {placement.activation}"
            if label(node) in weights.narrow:
                detail += f", {narrowed(node)} channels in 7 bits"
            changes.append(Change(rule=self.name, node=str(node.name), detail=detail))
        for value, origin in plan.pairs.items():
            if value in plan.carried:
                continue
            owned = value in plan.owners
            readers = [(u.node, u.idx) for u in value.uses() if owned or u.node in plan.nodes]
            insert_pair(value, readers, *scales[origin], fmt, outputs=owned, names=weights.names)
        if changes:
            drop_unused_initializers(model)
        return changes

    def _saturating(
        self, model: ir.Model, placement: Placement, context: Context
    ) -> Mapping[str, np.ndarray]:
        """Nodes that saturate on the calibration data once quantized, with the output channels that can; 8 bits in all others."""
        if not context.target.saturates or context.data is None:
            return {}
        trial = model.clone()
        for node, twin in zip(walk(model), walk(trial), strict=True):
            twin.name = label(node)
        self.run(trial, replace(context, target=replace(context.target, saturates=False)))
        return saturated(trial, context.data, placement.library)

    def _plan(
        self, model: ir.Model, placement: Placement, weights: Weights, context: Context
    ) -> tuple[Plan, dict[ir.Value, tuple[float, float]]]:
        """What to quantize, and the range of every grid; nodes around infinite or NaN numbers stay in float."""
        fmt = FORMATS[placement.activation]
        unfit: dict[ir.Node, str] = {}
        while True:
            plan = make_plan(model.graph, placement, self.targets, self.ignore, unfit)
            if not plan.nodes:
                return plan, {}
            compute = [node for node, row in plan.nodes.items() if row.role == "compute"]
            found = {n: "its weights are infinite or NaN" for n in compute if not weights.finite(n)}
            if not found:
                origins = list(dict.fromkeys(plan.pairs.values()))
                names = [str(v.name) for v in origins]
                seen = observe(model, names, self.method, self.percentile, context)
                bad = {v for v in origins if not seen[str(v.name)].finite}
                if not bad:
                    limits = {v: seen[str(v.name)].limits(fmt, _through(v, plan)) for v in origins}
                    for group in plan.shared:
                        lows, highs = zip(*(limits[v] for v in group), strict=True)
                        limits |= dict.fromkeys(group, (min(lows), max(highs)))
                    return plan, limits
                for node in plan.nodes:
                    if wrong := [v for v in plan.around(node) if plan.pairs[v] in bad]:
                        found[node] = f"{wrong[0].name} is infinite or NaN on the calibration data"
            for node, reason in found.items():
                logger.warning("%s stays in float: %s", describe(node), reason)
            unfit |= found


def _through(origin: ir.Value, plan: Plan) -> Function | None:
    """What is applied to all that lies on the grid of ``origin``."""
    on_grid = [v for v, start in plan.pairs.items() if start is origin]
    return through(origin) if on_grid == [origin] and origin in plan.owners else None


def _means(model: ir.Model, nodes: Sequence[ir.Node], context: Context) -> Mapping[str, np.ndarray]:
    """The mean of every channel that ``nodes`` read; what an earlier run on the same graph has observed is kept."""
    known: dict[str, np.ndarray] = context.memo.setdefault("observed means", {})
    axes = {}
    for node in nodes:
        x = node.inputs[0]
        count = rank(x)
        assert x is not None
        assert count is not None
        axes[str(x.name)] = 1 if node.op_type == "Conv" else count - 1
    if missing := {name: axis for name, axis in axes.items() if name not in known}:
        known |= observe_channels(model, missing, "ReduceMean", context)
    return known
