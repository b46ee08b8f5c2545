"""What a run of a graph takes, by node and by family of operators, before anything is compiled.

Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009: arithmetic intensity is operations over bytes; below
``peak / bandwidth`` of the hardware, memory is what limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import onnx_ir as ir

from optkit.arithmetic import product_format
from optkit.graph import constant, elements, subgraphs, walk
from optkit.multiplies import macs, multiplies
from optkit.ops import spec
from optkit.passes import PASSES
from optkit.passes.base import Context
from optkit.pipeline import run_passes
from optkit.seen import seen
from optkit.targets import target

# What products with weights compute in, and bytes of a weight, by the name of a precision.
WEIGHTS = {
    "fp32": ("fp32", 4.0), "fp16": ("fp16", 2.0), "bf16": ("bf16", 2.0), "fp8": ("fp8", 1.0), "int8": ("int8", 1.0),
    "w8a16": ("fp16", 1.0), "w4a16": ("fp16", 0.5), "nvfp4": ("nvfp4", 0.5), "mxfp4": ("mxfp4", 0.5), "mxfp8": ("mxfp8", 1.0),
}  # fmt: skip
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
# Of what these are given, only what others read of their outputs has to be read.
_PASSING = _PARTIAL | frozenset(
    {
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Identity",
        "Cast",
        "Transpose",
        "Split",
        "Concat",
        "Expand",
    }
)
# Of their first operand these change some elements, which can be done where it lies.
_WRITING = frozenset({"ScatterND", "ScatterElements"})


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
        operations: By format, two for each multiply-accumulate but for those of keys that no query sees, and of pads; None
            where some depend on free axes.
        seen: The share of multiply-accumulates that is of keys that are seen, or of elements and not pads, where that is not all.
        weights: Bytes of constants that products read, by the constant.
        outside: Bytes that are read of inputs and written of outputs, by name; None where they depend on free axes.
    """

    nodes: Mapping[str, Cost]
    operations: Mapping[str, int] | None
    seen: Mapping[ir.Node, Fraction]
    weights: Mapping[ir.Value, float]
    outside: Mapping[str, float] | None


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
    """The least time that a run can take on some hardware: operations at its peak, or bytes at its bandwidth, whichever is longer.

    True for whatever runs the operations that the graph states: engines that fuse all of it too. Convolutions by fewer
    multiplications, such as Winograd's, could be faster.

    Attributes:
        compute: Seconds of all operations.
        memory: Seconds of the bytes that no cache keeps.
        bytes: Of weights that products read, what is read of inputs and written of outputs, each once: as if everything were
            fused, and caches that grow or are written to stayed where they are.
        intensity: Operations for each of those bytes.
    """

    compute: float
    memory: float
    bytes: int
    intensity: float

    @property
    def seconds(self) -> float:
        """The longer of the two: one can go on while the other does."""
        return max(self.compute, self.memory)

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """Which it is."""
        return "compute" if self.compute >= self.memory else "memory"


def costs(model: ir.Model, precision: str | None = None) -> Costs:
    """What a run takes, bodies included; a body counts once, of an If in the sum the branch that multiplies less.

    Args:
        precision: What products with weights will be computed in, all else in half precision; as the graph is where None.
    """
    nodes = {str(node.name): _cost(node, precision) for node in walk(model)}
    outside, settled = _outside(model, precision), model
    if outside is None or any(None in (c.macs, c.bytes) for c in nodes.values()):
        # Shapes that the graph computes for itself are numbers once its arithmetic on shapes is folded, and those of its
        # outputs once they need not be what was declared.
        settled = folded(model)
        later = {str(node.name): _cost(node, precision) for node in walk(settled)}
        gone = Cost(macs=0, bytes=0)
        for name, cost in nodes.items():
            if None in (cost.macs, cost.bytes):
                nodes[name] = later.get(name, gone)
        outside = _outside(settled, precision)
    executed, shares = list(once(settled.graph)), seen(settled)
    return Costs(
        nodes=nodes,
        operations=_operations(executed, precision, shares),
        seen=shares,
        weights=weights(executed, precision),
        outside=outside,
    )


def folded(model: ir.Model) -> ir.Model:
    """A copy whose arithmetic on shapes is done, and whose outputs have the sizes that follow."""
    copy = model.clone()
    for value in copy.graph.outputs:
        value.shape = None
    steps = [PASSES[name]() for name in ("lift-constants", "fold-constants", "fold-shapes")]
    run_passes(copy, steps, Context(target=target("cpu")))
    return copy


def once(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes that a run goes through at least: bodies of loops once, of an If the branch that multiplies less."""
    for node in graph:
        yield node
        bodies = [list(once(body)) for body in subgraphs(node)]
        if node.op_type == "If":
            bodies = [min(bodies, key=lambda body: sum(macs(n) or 0 for n in body))]
        for body in bodies:
            yield from body


def _operations(
    nodes: Iterable[ir.Node], precision: str | None, shares: Mapping[ir.Node, Fraction]
) -> dict[str, int] | None:
    total: dict[str, int] = {}
    for node in nodes:
        if (count := macs(node)) is None:
            return None
        if count:
            fmt = format_in(node, precision)
            needed = math.floor(count * shares.get(node, 1))
            total[fmt] = total.get(fmt, 0) + 2 * needed
    return total


def weights(nodes: Iterable[ir.Node], precision: str | None = None) -> dict[ir.Value, float]:
    """Bytes of the constants that products among ``nodes`` read, each once, no wider than they are multiplied."""
    found: dict[ir.Value, float] = {}
    for node in nodes:
        if not multiplies(node):
            continue
        fmt = format_in(node, precision)
        for value in node.inputs:
            stored, count = source(value), 0 if value is None else elements(value.shape)
            if stored is None or value is None or not count:
                continue
            if precision is None:
                moved = min(count * _width(fmt), float(size(stored) or 0))
            else:
                moved = count * _wide(value, precision, weight=True)
            found[stored] = min(moved, found.get(stored, moved))
    return found


def source(value: ir.Value | None) -> ir.Value | None:
    """The largest constant that ``value`` is computed from, where it is computed from constants alone; scales may come from outside."""
    if value is None or constant_size(value):
        return value
    node = value.producer()
    if node is None or any(True for _ in subgraphs(node)):
        return None
    largest: ir.Value | None = None
    for v in node.inputs[:1] if node.op_type == "DequantizeLinear" else node.inputs:
        found = source(v)
        if found is None and v is not None:
            return None
        if found is not None and (largest is None or constant_size(found) > constant_size(largest)):
            largest = found
    return largest


def format_in(node: ir.Node, precision: str | None) -> str:
    """What ``node`` multiplies in; without weights, as in attention, it stays in half precision."""
    if precision is None:
        return product_format(node)
    weighted = any(source(v) is not None for v in node.inputs)
    return WEIGHTS[precision][0] if weighted or precision in ("fp32", "bf16") else "fp16"


def _outside(model: ir.Model, precision: str | None) -> dict[str, float] | None:
    executed, graph = frozenset(once(model.graph)), model.graph
    shares = {v: _read(v, executed) for v in graph.inputs if not v.is_initializer()} | {
        v: _written(v) for v in graph.outputs
    }
    found: dict[str, float] = {}
    for value, count in shares.items():
        whole, all_ = size(value, precision), elements(value.shape)
        if count is None or (count and (whole is None or all_ is None)):
            return None
        found[str(value.name)] = count * (whole or 0.0) / (all_ or 1)
    return found


def _read(value: ir.Value, executed: frozenset[ir.Node], *, output: bool = True) -> int | None:
    """Elements that have to be read of ``value``; None where that depends on free axes."""
    count, total = elements(value.shape), 0
    if output and value.is_graph_output():
        return count
    for node, index in value.uses():
        if node not in executed or node.op_type in ("Shape", "Size"):
            continue
        part = count
        if (
            node.domain == ""
            and index == 0
            and (node.op_type in _WRITING or _grown(node.outputs[0]) is value)
        ):
            part = _read(node.outputs[0], executed, output=False)
        elif node.domain == "" and node.op_type in _PASSING and (index == 0 or node.op_type == "Concat"):
            parts = [_read(v, executed) for v in node.outputs]
            part = None if None in parts else sum(p for p in parts if p is not None)
        if part is None:
            return None
        total += part
    return total if count is None else min(count, total)


def _written(value: ir.Value) -> int | None:
    """Elements that have to be written of an output; None where that depends on free axes."""
    node, count = value.producer(), elements(value.shape)
    if node is None or count is None:
        return count
    if node.domain == "" and node.op_type in _WRITING and _given(node.inputs[0]):
        return elements(node.inputs[2].shape) if node.inputs[2] is not None else count
    if (past := _grown(value)) is not None:
        before = elements(past.shape)
        return None if before is None else count - before
    if node.op_type == "GroupQueryAttention" and value in node.outputs[1:3] and value.shape is not None:
        # Keys and values are put behind those of before; runtimes have both in one buffer.
        past, q = node.inputs[3] if len(node.inputs) > 3 else None, node.inputs[0]
        if past is not None and _given(past) and q is not None and q.shape is not None:
            whole, new = value.shape[-2], q.shape[1]
            return (
                count // whole * min(whole, new) if isinstance(whole, int) and isinstance(new, int) else None
            )
    return count


def _grown(value: ir.Value) -> ir.Value | None:
    """The input behind whose elements an output puts others, as a cache does; runtimes have both in one buffer."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type != "Concat" or not value.is_graph_output():
        return None
    return node.inputs[0] if _given(node.inputs[0]) else None


def _given(value: ir.Value | None) -> bool:
    return value is not None and value.is_graph_input() and not value.is_initializer()


def _cost(node: ir.Node, precision: str | None) -> Cost:
    return Cost(
        macs=macs(node), bytes=_bytes(node), format=format_in(node, precision) if multiplies(node) else "fp32"
    )


def _bytes(node: ir.Node) -> int | None:
    if node.op_type == "Constant" or node.op_type in _VIEWS or any(True for _ in subgraphs(node)):
        return 0
    read = list(dict.fromkeys(v for v in node.inputs if v is not None))
    written = [v for v in node.outputs if v.uses() or v.is_graph_output()]
    sizes = [size(v) for v in (*read, *written)]
    if node.op_type in _PARTIAL and read:
        sizes[0] = size(node.outputs[0])
    return None if None in sizes else math.ceil(sum(s for s in sizes if s is not None))


def size(value: ir.Value, precision: str | None = None) -> float | None:
    """Bytes, floats as wide as ``precision`` has activations; None where an axis is free."""
    if value.const_value is not None and precision is None:
        return float(value.const_value.nbytes)
    count = elements(value.shape)
    if count is None or value.dtype is None:
        return None
    return 0.0 if value.dtype == ir.DataType.STRING else math.ceil(count * _wide(value, precision))


def _wide(value: ir.Value, precision: str | None, *, weight: bool = False) -> float:
    assert value.dtype is not None
    if precision is None or not value.dtype.is_floating_point():
        return float(value.dtype.itemsize)
    # Vectors, such as biases, stay what activations are.
    if weight and len(value.shape or ()) > 1:
        return WEIGHTS[precision][1]
    return 4.0 if precision == "fp32" else 2.0


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
    found: Costs, peak: Mapping[str, float], reading: Callable[[float], float], kept: float = 0.0
) -> Floor | None:
    """The least time of a run.

    Args:
        peak: Operations a second by format; has all formats that ``found`` has.
        reading: Bytes a second at which so many bytes are read.
        kept: Bytes that a cache may keep from run to run, so that memory is not asked for them.

    Returns:
        None where it depends on free axes.
    """
    if found.operations is None or found.outside is None:
        return None
    moved = int(sum(found.weights.values())) + math.ceil(sum(found.outside.values()))
    beyond = max(0.0, moved - kept)
    return Floor(
        compute=sum(count / peak[fmt] for fmt, count in found.operations.items()),
        memory=beyond / reading(beyond) if beyond else 0.0,
        bytes=moved,
        intensity=sum(found.operations.values()) / moved if moved else 0.0,
    )


def _width(fmt: str) -> float:
    """Bytes of a weight by the arithmetic that reads it; with its share of the scale of a block."""
    widths = {"nvfp4": 9 / 16, "mxfp8": 33 / 32, "int8": 1, "fp8": 1, "fp16": 2, "bf16": 2, "fp64": 8}
    return widths.get(fmt, 4)
