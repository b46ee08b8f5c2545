"""Static quantization: ranges from calibration data, Q/DQ pairs where the placement's rows put them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from optkit.errors import PassError, UnknownNameError
from optkit.formats import FORMATS, Format
from optkit.graph import constant, describe, drop_unused_initializers
from optkit.ops import spec
from optkit.passes.base import Context, GraphPass
from optkit.passes.quantization.calibrate import observe
from optkit.passes.quantization.observers import Method, observer
from optkit.passes.quantization.plan import Plan, make_plan
from optkit.qdq import dequantize_constant, insert_pair, quantized_tensor, scale_zero, weight_range
from optkit.rewrite import Change

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.placement import Placement

logger = logging.getLogger(__name__)


class QuantizeStatic(GraphPass):
    """Quantize weights and activations to integers with scales fixed before the model runs.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
    arXiv:1712.05877: affine activations per tensor, symmetric weights per output channel, bias in int32 with
    ``scale = scale_x * scale_w``. Bodies of If and Loop are left in float: calibration can't look into them.

    Attributes:
        placement: Name of the backend's rows.
        method: How ranges follow from what was seen.
        percentile: Share of the values kept, for ``percentile``.
        targets: Globs, or ``re:`` expressions, of node names, operators or module paths to quantize.
        ignore: The same, for what stays in float.
    """

    name: ClassVar[str] = "quantize-static"
    needs_data: ClassVar[bool] = True

    exact: ClassVar[bool] = False

    placement: str = "default"
    method: Method = "min-max"
    percentile: float = Field(default=99.99, gt=50, le=100)
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Observe, then insert the pairs."""
        if self.placement not in context.placements:
            raise UnknownNameError("placement", self.placement, context.placements, where=self.name)
        placement = context.placements[self.placement]
        plan = make_plan(model.graph, placement, self.targets, self.ignore)
        for node, reason in plan.left:
            logger.debug("%s stays in float: %s", node, reason)
        if not plan.nodes:
            return []
        fmt = FORMATS[placement.activation]
        limits = self._limits(model, plan, placement, context)
        changes = []
        scales: dict[ir.Value, tuple[np.ndarray, np.ndarray]] = {
            v: scale_zero(*limits[v], fmt) for v in dict.fromkeys(plan.pairs.values())
        }
        weights: dict[tuple[ir.Value, int | None], tuple[ir.TensorProtocol, np.ndarray, np.ndarray]] = {}
        for node in plan.nodes:
            if plan.nodes[node].role == "compute":
                x_scale = scales[plan.pairs[_first_input(node)]][0]
                _quantize_weights(node, placement, x_scale, weights)
            changes.append(
                Change(
                    rule=self.name,
                    node=str(node.name),
                    detail=f"{node.op_type} to {placement.weight} x {placement.activation}",
                )
            )
        taken = set(plan.nodes)
        for value, origin in plan.pairs.items():
            owned = value in plan.owners
            readers = [(u.node, u.idx) for u in value.uses() if owned or u.node in taken]
            insert_pair(value, readers, *scales[origin], fmt, outputs=owned)
        drop_unused_initializers(model)
        return changes

    def _limits(
        self, model: ir.Model, plan: Plan, placement: Placement, context: Context
    ) -> dict[ir.Value, tuple[float, float]]:
        """The range of every grid; nodes around a value that is not finite go back to float."""
        fmt = FORMATS[placement.activation]
        key = "min-max" if self.method == "min-max" else f"histogram {self.method} {self.percentile}"
        while True:
            origins = list(dict.fromkeys(plan.pairs.values()))
            seen = observe(
                model,
                [str(v.name) for v in origins],
                lambda: observer(self.method, self.percentile),
                context,
                key=key,
            )
            bad = [v for v in origins if not seen[str(v.name)].finite]
            if not bad:
                return {v: seen[str(v.name)].limits(fmt) for v in origins}
            ignored = sorted(
                {
                    str(n.name)
                    for n in plan.nodes
                    if any(plan.pairs.get(v) in bad for v in (*n.inputs, *n.outputs) if v)
                }
            )
            for name in ignored:
                logger.warning("%s stays in float: infinite or NaN on the calibration data", name)
            again = make_plan(
                model.graph,
                placement,
                self.targets,
                (*self.ignore, *(f"re:^{_escaped(n)}$" for n in ignored)),
            )
            if len(again.nodes) >= len(plan.nodes):
                raise PassError(f"{self.name}: {bad[0].name} is infinite or NaN on the calibration data")
            plan.nodes, plan.pairs, plan.owners, plan.left = (
                again.nodes,
                again.pairs,
                again.owners,
                again.left,
            )
            if not plan.nodes:
                return {}


def _escaped(name: str) -> str:
    import re

    return re.escape(name)


def _first_input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None, describe(node)
    return value


def _quantize_weights(
    node: ir.Node,
    placement: Placement,
    x_scale: np.ndarray,
    done: dict[tuple[ir.Value, int | None], tuple[ir.TensorProtocol, np.ndarray, np.ndarray]],
) -> None:
    """Weights to integers, and the bias to int32 on the grid of the products."""
    known = spec(node)
    assert known is not None and known.weight is not None and known.channel_axis is not None
    fmt: Format = FORMATS[placement.weight]
    weight = node.inputs[known.weight]
    assert weight is not None and weight.const_value is not None
    axis = known.channel_axis(node) if placement.per_channel else None
    bias = node.inputs[known.bias] if known.bias is not None and len(node.inputs) > known.bias else None
    vector = None if bias is None else constant(bias)
    top = weight_range(weight.const_value.numpy(), axis)
    if vector is not None:
        # The bias must fit into int32 on the grid scale_x * scale_w: channels whose weights are nearly 0 get a coarser grid.
        need = np.abs(vector.astype(np.float64)) / (float(x_scale) * 2.0**30) * fmt.high
        top = np.maximum(top, need if top.ndim else need.max(initial=0.0))
    scale, zero = scale_zero(-top, top, fmt)
    tensor = quantized_tensor(weight.const_value, scale, zero, fmt, axis, f"{weight.name}/q")
    dequantize_constant(node, known.weight, tensor, scale, zero, axis, f"{node.name}/weight")
    if vector is not None:
        import onnx_ir as ir

        b_scale = (x_scale.astype(np.float32) * scale).astype(np.float32)
        q = np.round(vector.astype(np.float64) / b_scale).astype(np.int32)
        b_scale = np.broadcast_to(b_scale, q.shape).copy() if axis is not None else b_scale
        assert known.bias is not None
        dequantize_constant(
            node,
            known.bias,
            ir.Tensor(q),
            b_scale,
            np.zeros(b_scale.shape, np.int32),
            0 if b_scale.ndim else None,
            f"{node.name}/bias",
        )
