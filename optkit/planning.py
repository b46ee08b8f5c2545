"""What a model would take on hardware that is not at hand, layer by layer, before anything is compiled; nothing here is a measurement.

A layer is a product, a norm or another operator that needs a launch of its own, with what is computed from its result alone, element
by element, fused behind it. Each has the roofline's floor and the range of ``optkit.estimate``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from optkit.arithmetic import product_format
from optkit.errors import BackendUnavailableError, UsageError
from optkit.estimate import of_kernel
from optkit.formats import Precision
from optkit.graph import constant, elements, read_once, walk
from optkit.ops import spec

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.targets import Target

Bound = Literal["compute", "memory"]

# What products with weights compute in, and bytes of a weight, by the name of a precision.
_WEIGHTS = {
    "fp32": ("fp32", 4.0), "fp16": ("fp16", 2.0), "bf16": ("bf16", 2.0), "fp8": ("fp8", 1.0), "int8": ("int8", 1.0),
    "w8a16": ("fp16", 1.0), "w4a16": ("fp16", 0.5), "nvfp4": ("nvfp4", 0.5), "mxfp4": ("mxfp4", 0.5), "mxfp8": ("mxfp8", 1.0),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One launch.

    Attributes:
        name: Of its first node.
        nodes: How many are fused into it.
        macs: Of its product; 0 where it has none.
        bytes: Read and written, each value once.
        floor: Seconds that no kernel beats.
        low: Seconds, the optimistic end of what is expected.
        high: Seconds, the pessimistic end.
    """

    name: str
    op: str
    nodes: int
    macs: int
    bytes: int
    format: str
    floor: float
    low: float
    high: float
    bound: Bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All layers of a model, in order."""

    layers: tuple[Layer, ...]

    @property
    def floor(self) -> float:
        """Seconds of all floors, one layer after the other."""
        return sum(layer.floor for layer in self.layers)

    @property
    def low(self) -> float:
        """Seconds, the optimistic end."""
        return sum(layer.low for layer in self.layers)

    @property
    def high(self) -> float:
        """Seconds, the pessimistic end."""
        return sum(layer.high for layer in self.layers)

    def share(self, bound: Bound) -> float:
        """Of the floor that is bound by so."""
        return (
            sum(layer.floor for layer in self.layers if layer.bound == bound) / self.floor
            if self.floor
            else 0.0
        )


def dollars(seconds: float, price: float, samples: int = 1) -> float:
    """For a million samples, where a run of ``samples`` takes so long and an hour costs ``price``."""
    return seconds / samples * 1e6 * price / 3600


def plan(model: ir.Model, target: Target, precision: str | None = None) -> Plan:
    """The layers of a model whose shapes are all fixed.

    Args:
        precision: What products with weights will be computed in, all else in half precision; as the graph is where None.

    Raises:
        UsageError: A size depends on free axes or data, or the target's peaks are not known.
        BackendUnavailableError: The target does not have the precision.
    """
    if target.bandwidth is None or not target.peak:
        raise UsageError(
            f"nothing is known of how fast {target.name} is", hint="optkit targets lists what is known"
        )
    asked = None if precision is None else Precision.parse(precision).base
    if asked is not None and asked not in _WEIGHTS:
        raise UsageError(f"no plan is made for {asked}", hint=f"one of {', '.join(_WEIGHTS)}")
    if asked is not None and (why := target.lacks.get(asked)) is not None:
        raise BackendUnavailableError(why, hint="choose another --precision")
    groups = _groups(model)
    return Plan(
        layers=tuple(
            _layer(nodes, groups, target, asked) for nodes in dict.fromkeys(map(tuple, groups.values()))
        )
    )


def _groups(model: ir.Model) -> dict[ir.Node, list[ir.Node]]:
    """What is launched together, by node."""
    found: dict[ir.Node, list[ir.Node]] = {}
    for node in walk(model):
        known = spec(node)
        floats = any(v.dtype is not None and v.dtype.is_floating_point() for v in node.outputs)
        family = "" if known is None else known.family
        if node.op_type in ("Constant", "Cast") or family in ("shape", "quant") or not floats:
            continue
        group = None
        if family == "elementwise":
            before = [
                found[p]
                for v in node.inputs
                if v is not None and (p := v.producer()) in found and read_once(v)
            ]
            group = before[0] if before else None
        if group is None:
            group = []
        group.append(node)
        found[node] = group
    return found


def _layer(
    nodes: tuple[ir.Node, ...], groups: Mapping[ir.Node, list[ir.Node]], target: Target, precision: str | None
) -> Layer:
    inside, moved, macs, fmt = set(nodes), 0.0, 0, ""
    read = dict.fromkeys(v for n in nodes for v in n.inputs if v is not None and v.producer() not in inside)
    for node in nodes:
        known = spec(node)
        if known is not None and known.macs is not None:
            count = known.macs(node)
            if count is None:
                raise _unknown(node)
            macs, fmt = macs + count, product_format(node)
            weighted = known.weight is not None and constant(node.inputs[known.weight]) is not None
            if precision is not None:
                # What has no weights, such as attention, stays in half precision.
                fmt = _WEIGHTS[precision][0] if weighted or precision in ("fp32", "bf16") else "fp16"
    for value in read:
        matrix = constant(value) is not None and len(value.shape or ()) > 1
        moved += _size(value, precision, matrix=matrix)
    for node in nodes:
        for value in node.outputs:
            if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
                moved += _size(value, precision)
    if macs and fmt not in target.peak:
        raise UsageError(f"{target.name}: no peak of {fmt} is known", hint="choose another --precision")
    found = of_kernel(2.0 * macs, moved, fmt or "fp32", target)
    return Layer(
        name=str(nodes[0].name), op=nodes[0].op_type, nodes=len(nodes), macs=macs, bytes=math.ceil(moved), format=fmt,
        floor=found.floor, low=found.low, high=found.high, bound="compute" if found.bound == "compute" else "memory",
    )  # fmt: skip


def _size(value: ir.Value, precision: str | None, *, matrix: bool = False) -> float:
    count = elements(value.shape)
    if count is None or value.dtype is None:
        producer = value.producer()
        raise (
            _unknown(producer)
            if producer is not None
            else UsageError(f"the size of {value.name} is not known")
        )
    if precision is None or not value.dtype.is_floating_point():
        return count * float(value.dtype.itemsize)
    width = _WEIGHTS[precision][1] if matrix else (4.0 if precision == "fp32" else 2.0)
    return count * width


def _unknown(node: ir.Node) -> UsageError:
    return UsageError(f"the sizes at {node.name} depend on free axes", hint="--shape INPUT=SIZES fixes them")
