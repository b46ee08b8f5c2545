"""What a run of a graph takes, by node and by family of operators, before anything is compiled.

Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009: arithmetic intensity is operations over bytes; below
``peak / bandwidth`` of the hardware, memory is what limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from optkit.arithmetic import product_format
from optkit.graph import constant, elements, subgraphs, walk
from optkit.ops import spec
from optkit.ops.spec import conv_macs, matmul_macs
from optkit.passes import PASSES
from optkit.passes.base import Context
from optkit.pipeline import run_passes
from optkit.roofline import weights_read
from optkit.targets import target

# Otherwise, or not at all, in the table of operators, which is about what can be quantized.
_FAMILIES = {
    "MatMulInteger": "matmul",
    "QLinearMatMul": "matmul",
    "ConvInteger": "conv",
    "QLinearConv": "conv",
    "LSTM": "recurrent",
    "GRU": "recurrent",
    "RNN": "recurrent",
}
# These give another name or shape to what lies where it was.
_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Dropout"})
# These read some elements of what they are given: as many as they give.
_PARTIAL = frozenset({"Gather", "GatherElements", "GatherND", "Slice"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one run takes.

    Attributes:
        macs: Multiply-accumulates of products; None where they depend on free axes.
        bytes: Read and written, each operand once, if nothing were fused; None as before.
        format: What the products are computed in.
    """

    macs: int | None
    bytes: int | None
    format: str = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one run of a graph takes.

    Attributes:
        nodes: By name.
        outside: Bytes of inputs and outputs; None where they depend on free axes.
    """

    nodes: Mapping[str, Cost]
    outside: int | None

    @property
    def operations(self) -> dict[str, int] | None:
        """By format, two for each multiply-accumulate; None where some depend on free axes."""
        total: dict[str, int] = {}
        for cost in self.nodes.values():
            if cost.macs is None:
                return None
            if cost.macs:
                total[cost.format] = total.get(cost.format, 0) + 2 * cost.macs
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The operators of one family together."""

    nodes: int
    parameters: int
    macs: int | None
    bytes: int | None

    @property
    def intensity(self) -> float | None:
        """Operations, two for each multiply-accumulate, for each byte."""
        return None if self.macs is None or not self.bytes else 2 * self.macs / self.bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The least time that a run can take on some hardware: operations at its peak, or bytes at its bandwidth.

    Attributes:
        bytes: Of weights that products read, inputs and outputs, each once: as if everything were fused.
        intensity: Operations for each of those bytes.
    """

    seconds: float
    bound: Literal["compute", "memory"]
    bytes: int
    intensity: float


def costs(model: ir.Model) -> Costs:
    """What a run takes, bodies included; a body counts once."""
    nodes = {str(node.name): _cost(node) for node in walk(model)}
    outside = _outside(model)
    if outside is None or any(None in (c.macs, c.bytes) for c in nodes.values()):
        # Shapes that the graph computes for itself are numbers once its arithmetic on shapes is folded, and those of its
        # outputs once they need not be what was declared.
        folded = model.clone()
        for value in folded.graph.outputs:
            value.shape = None
        steps = [PASSES[name]() for name in ("lift-constants", "fold-constants", "fold-shapes")]
        run_passes(folded, steps, Context(target=target("cpu")))
        later, gone = {str(node.name): _cost(node) for node in walk(folded)}, Cost(macs=0, bytes=0)
        for name, cost in nodes.items():
            if None in (cost.macs, cost.bytes):
                nodes[name] = later.get(name, gone)
        outside = _outside(folded)
    return Costs(nodes=nodes, outside=outside)


def _outside(model: ir.Model) -> int | None:
    sizes = [_size(v) for v in (*model.graph.inputs, *model.graph.outputs)]
    return None if None in sizes else sum(s for s in sizes if s is not None)


def _cost(node: ir.Node) -> Cost:
    return Cost(macs=_macs(node), bytes=_bytes(node), format=product_format(node))


def _macs(node: ir.Node) -> int | None:
    known = spec(node)
    if known is not None and known.macs is not None:
        return known.macs(node)
    if node.domain != "":
        return 0
    if node.op_type in ("MatMulInteger", "QLinearMatMul"):
        return matmul_macs(node)
    if node.op_type == "ConvInteger":
        return conv_macs(node)
    return 0


def _bytes(node: ir.Node) -> int | None:
    if node.op_type == "Constant" or node.op_type in _VIEWS or any(True for _ in subgraphs(node)):
        return 0
    read = list(dict.fromkeys(v for v in node.inputs if v is not None))
    written = [v for v in node.outputs if v.uses() or v.is_graph_output()]
    sizes = [_size(v) for v in (*read, *written)]
    if node.op_type in _PARTIAL and read:
        sizes[0] = _size(node.outputs[0])
    return None if None in sizes else sum(s for s in sizes if s is not None)


def _size(value: ir.Value) -> int | None:
    if value.const_value is not None:
        return int(value.const_value.nbytes)
    count = elements(value.shape)
    if count is None or value.dtype is None:
        return None
    return 0 if value.dtype == ir.DataType.STRING else math.ceil(count * value.dtype.itemsize)


def is_integer(node: ir.Node) -> bool:
    """Whether the products of ``node`` are between integers."""
    return product_format(node) == "int8"


def family(node: ir.Node) -> str:
    """Of the operator: as in the table of operators, ``control`` for what holds bodies, ``other`` for what is in none."""
    if node.domain != "":
        return "other"
    if any(True for _ in subgraphs(node)):
        return "control"
    known = spec(node)
    return _FAMILIES.get(node.op_type) or ("other" if known is None else known.family)


def by_family(model: ir.Model, found: Costs) -> dict[str, Family]:
    """The costs added up, the largest family first. Weights that several nodes read count once."""
    groups: dict[str, list[ir.Node]] = {}
    for node in walk(model):
        if node.op_type != "Constant":
            groups.setdefault(family(node), []).append(node)
    counted: set[ir.Value] = set()
    families = {name: _sum(nodes, found.nodes, counted) for name, nodes in groups.items()}
    return dict(sorted(families.items(), key=lambda kv: (-(kv[1].macs or 0), -(kv[1].bytes or 0), kv[0])))


def _sum(nodes: Sequence[ir.Node], found: Mapping[str, Cost], counted: set[ir.Value]) -> Family:
    parameters = 0
    for value in dict.fromkeys(v for node in nodes for v in node.inputs if v is not None):
        if value not in counted and constant_size(value):
            counted.add(value)
            parameters += constant_size(value)
    own = [found[str(node.name)] for node in nodes]
    macs, moved = [c.macs for c in own], [c.bytes for c in own]
    return Family(
        nodes=len(nodes),
        parameters=parameters,
        macs=None if None in macs else sum(m for m in macs if m is not None),
        bytes=None if None in moved else sum(b for b in moved if b is not None),
    )


def constant_size(value: ir.Value) -> int:
    """Elements of a constant; 0 for everything else."""
    if value.const_value is not None:
        return int(value.const_value.size)
    array = constant(value)
    return 0 if array is None else int(array.size)


def floor(
    model: ir.Model, found: Costs, peak: Mapping[str, float], reading: Callable[[float], float]
) -> Floor | None:
    """The least time of a run.

    Args:
        found: As ``costs`` gives them.
        peak: Operations a second by format; has all formats that ``found`` has.
        reading: Bytes a second at which so many bytes are read.

    Returns:
        None where it depends on free axes.
    """
    needed = found.operations
    if needed is None or found.outside is None:
        return None
    total = sum(needed.values())
    stored = sum(_width(fmt) * count / total for fmt, count in needed.items()) if total else 4.0
    moved = int(weights_read(model) * stored) + found.outside
    compute, memory = sum(count / peak[fmt] for fmt, count in needed.items()), moved / reading(moved)
    return Floor(
        seconds=max(compute, memory),
        bound="compute" if compute >= memory else "memory",
        bytes=moved,
        intensity=total / moved if moved else 0.0,
    )


def _width(fmt: str) -> float:
    """Bytes of a weight by the arithmetic that reads it; with its share of the scale of a block."""
    widths = {"nvfp4": 9 / 16, "mxfp8": 33 / 32, "int8": 1, "fp8": 1, "fp16": 2, "bf16": 2, "fp64": 8}
    return widths.get(fmt, 4)
