"""Half-precision floats, with what would lose its meaning kept in float32."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from optkit.graph import constant, drop_unused_initializers, graphs, initializer
from optkit.kernels import KERNELS
from optkit.kernels.base import DOMAIN
from optkit.ops import spec
from optkit.passes.base import Context, GraphPass
from optkit.passes.quantization.calibrate import observe
from optkit.passes.quantization.plan import selects
from optkit.reference import trial_batches
from optkit.rewrite import Change

logger = logging.getLogger(__name__)

# Largest finite float16 (IEEE 754-2019, binary16); bfloat16 has the range of float32.
_FP16_MAX = 65504.0

# Operators that PyTorch's autocast runs in float32 ("CUDA Ops that can autocast to float32"), by their ONNX names.
SENSITIVE = (
    "CumSum", "Exp", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax", "LpNormalization",
    "MeanVarianceNormalization", "Pow", "RMSNormalization", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMean",
    "ReduceProd", "ReduceSum", "ReduceSumSquare", "Softmax", "Softplus",
)  # fmt: skip

# What computes angles out of places, and takes no part in what layers compute.
_MOVES = frozenset(
    {
        "Add", "Cast", "Concat", "Div", "Einsum", "Expand", "Gather", "Identity", "MatMul", "Mul", "Neg", "Pow", "Range",
        "Reshape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze",
    }
)  # fmt: skip

# What gives numbers as it got them.
_CHOICES = frozenset({"Where", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})

# What masks go through on their way to the scores that they are added to.
_MASKING = _CHOICES | {"Add", "Cast", "Concat", "Max", "Min", "Tile"}

# From powers to their logarithms there are sums, scales and filters.
_SPANNING = frozenset(
    {
        "Abs", "Add", "Clip", "Div", "Gemm", "MatMul", "Max", "Mul", "Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Reshape",
        "Sqrt", "Squeeze", "Transpose", "Unsqueeze",
    }
)  # fmt: skip

# Inputs that the standard fixes at float32 whatever the data's type is.
_FIXED = {"Resize": frozenset({1, 2})}
# Their type is an attribute or follows from nothing that is cast.
_APART = frozenset(
    {
        "Cast",
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "LSTM",
        "GRU",
        "RNN",
    }
)


class CastFloats(GraphPass):
    """Compute in float16 or bfloat16 where that is safe; inputs and outputs of the model stay float32.

    A node stays in float32 when its operator is in ``keep``, or when one of its constants or, on the calibration data,
    one of its values exceeds the largest float16 divided by ``margin``. Without data the values are those on inputs
    drawn from the input specification, in sizes that the model runs with. A call of a kernel reads and writes the format where the kernel has it, whatever it
    computes in: norms that kernels compute are called before. Sines and cosines of places, with all that leads to them, stay
    in float32 as well: float16 has no whole numbers beyond 2048, and an angle of so many turns is then any angle. So does what
    logarithms are taken of: a power of sound spans more than float16 does, and what is below its smallest number would be 0.

    Masks hide keys with float32's lowest number, which bfloat16 rounds to minus infinity: a query with no key left would get NaN
    instead of the mean of all. What is added to the input of a Softmax is halved there before it is rounded; minus infinity stays.

    Attributes:
        to: The format.
        keep: Globs, or ``re:`` expressions, of node names, operators or module paths that stay in float32.
        margin: How far below the largest float16 the observed values must stay.
    """

    name: ClassVar[str] = "cast"
    exact: ClassVar[bool] = False
    floats: ClassVar[bool] = True

    to: Literal["fp16", "bf16"] = "fp16"
    keep: tuple[str, ...] = SENSITIVE
    margin: float = 2.0

    def needs_format(self, context: Context) -> str:
        """What is computed in."""
        return self.to

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Cast every node that may be."""
        self.refuse(context)
        dtype = ir.DataType.FLOAT16 if self.to == "fp16" else ir.DataType.BFLOAT16
        apart = {n for g in graphs(model) for n in g if n.op_type in ("Cos", "Sin") for n in _of_places(n)}
        if self.to == "fp16":
            apart |= _logged(n for g in graphs(model) for n in g if n.op_type == "Log")
        chosen = [n for g in graphs(model) for n in g if n not in apart and self._suits(n)]
        if self.to == "fp16" and chosen:
            chosen = self._in_range(model, chosen, context)
        taken = dict.fromkeys(chosen)
        changes = []
        masks = (
            {v for n in chosen for v in n.inputs if v is not None and _masks(v, model.graph)}
            if self.to == "bf16"
            else set()
        )
        lowered: dict[ir.Value, ir.Value] = {}
        for node in chosen:
            for index, value in enumerate(node.inputs):
                if value is None or value.dtype != ir.DataType.FLOAT or index in _FIXED.get(node.op_type, ()):
                    continue
                producer = value.producer()
                if producer is None or producer not in taken:
                    if value not in lowered:
                        _lower(value, node, dtype, lowered, value in masks)
                    node.replace_input_with(index, lowered[value])
            changes.append(Change(rule=self.name, node=str(node.name), detail=self.to))
        for node in chosen:
            for output in node.outputs:
                if output.dtype == ir.DataType.FLOAT:
                    _raise_output(output, taken, dtype)
        drop_unused_initializers(model)
        return changes

    def _suits(self, node: ir.Node) -> bool:
        known = _has_kernel(node, self.to) if node.domain == DOMAIN else spec(node) is not None
        if not known or node.op_type in _APART or selects(self.keep, node):
            return False
        floats = [
            v
            for v in (*node.inputs, *node.outputs)
            if v is not None and v.dtype is not None and v.dtype.is_floating_point()
        ]
        return (
            bool(floats)
            and all(v.dtype == ir.DataType.FLOAT for v in floats)
            and any(v.dtype == ir.DataType.FLOAT for v in node.outputs)
        )

    def _in_range(self, model: ir.Model, chosen: list[ir.Node], context: Context) -> list[ir.Node]:
        limit = _FP16_MAX / self.margin
        here = [n for n in chosen if n.graph is model.graph]
        values = list(
            dict.fromkeys(
                v
                for n in here
                for v in (*n.inputs, *n.outputs)
                if v is not None and v.dtype == ir.DataType.FLOAT
            )
        )
        wild = {
            v
            for n in chosen
            for v in n.inputs
            if (c := constant(v)) is not None
            and c.dtype == np.float32
            and c.size
            and not np.abs(c).max() <= limit
        }
        live = [v for v in values if constant(v) is None and not v.is_initializer() and v.name]
        if live:
            data = trial_batches(model, 4, seed=context.seed) if context.data is None else context.data
            seen = observe(model, [str(v.name) for v in live], "min-max", 100.0, replace(context, data=data))
            wild |= {v for v in live if not max(-seen[str(v.name)].low, seen[str(v.name)].high) <= limit}
        # A choice that the data never makes may be made later: of a mask in float16, what is left of -1e38 is infinite.
        for node in here:
            if node.op_type in _CHOICES and any(v in wild for v in node.inputs):
                wild.update(node.outputs)
        kept = [n for n in chosen if any(v in wild for v in (*n.inputs, *n.outputs))]
        for node in kept:
            logger.info("%s stays in float32: a value beyond %.0f", node.name, limit)
        return [n for n in chosen if n not in set(kept)]


def _of_places(root: ir.Node) -> set[ir.Node]:
    """``root`` and all that leads to it, where that starts with numbers of places: integers, constants, inputs; else nothing."""
    found, open_ = set[ir.Node](), [root]
    while open_:
        node = open_.pop()
        if node in found:
            continue
        if node is not root and (node.op_type not in _MOVES or node.domain != ""):
            return set()
        found.add(node)
        integers = [v for v in node.inputs if v is not None and v.dtype is not None and v.dtype.is_integer()]
        ahead = [v for v in node.inputs if v is not None and v not in integers and constant(v) is None]
        open_ += [p for v in ahead if (p := v.producer()) is not None]
    return found


def _logged(logarithms: Iterable[ir.Node]) -> set[ir.Node]:
    """What gives the values that logarithms are taken of, as far as small values stay small on the way there."""
    found, open_ = set[ir.Node](), list(logarithms)
    while open_:
        for value in open_.pop().inputs:
            before = value.producer() if value is not None else None
            if before is not None and before not in found:
                found.add(before)
                if before.op_type in _SPANNING and before.domain == "":
                    open_.append(before)
    return found


def _has_kernel(node: ir.Node, fmt: str) -> bool:
    """Whether the kernel that ``node`` calls has a program for ``fmt``."""
    return any(k.op == node.op_type and fmt in k.formats for k in (KERNELS[name] for name in KERNELS))


def _rounded(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """``array`` in ``dtype``; finite numbers stay finite: float32's lowest, with which masks hide keys, is next to -inf in bfloat16."""
    found = array.astype(dtype.numpy())
    over = np.isinf(found) & np.isfinite(array)
    return (
        np.where(over, np.copysign(np.asarray(dtype.max, found.dtype), found), found) if over.any() else found
    )


def _masks(value: ir.Value, outermost: ir.Graph) -> bool:
    """Whether ``value`` may be added to the input of a Softmax, or hide keys in a kernel; what leaves a body may do anything."""
    found, open_ = set[ir.Node](), [value] if value.dtype == ir.DataType.FLOAT else []
    while open_:
        for node, index in open_.pop().uses():
            # Behind queries, keys and values.
            kernel = node.domain == DOMAIN and node.op_type.endswith("Attention") and index == 3
            if kernel or node.op_type == "Softmax":
                return True
            if node in found or node.domain != "" or node.op_type not in _MASKING:
                continue
            found.add(node)
            if node.outputs[0].is_graph_output() and node.graph is not outermost:
                return True
            open_.append(node.outputs[0])
    return False


def _lower(
    value: ir.Value, reader: ir.Node, dtype: ir.DataType, lowered: dict[ir.Value, ir.Value], mask: bool
) -> None:
    """Add ``value`` in ``dtype``: constants are converted, others cast once, right behind where they are made."""
    kind = dtype.name.lower()
    if (
        value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is not None
        and value.graph is not None
    ):
        source = value.const_value
        tensor = ir.LazyTensor(
            lambda: ir.Tensor(_rounded(source.numpy(), dtype), dtype=dtype),
            dtype=dtype,
            shape=ir.Shape(source.shape.numpy()),
            name=value.name,
        )
        assert isinstance(value.graph, ir.Graph)
        lowered[value] = initializer(value.graph, f"{value.name}/{kind}", tensor)
        return
    graph = value.graph if value.graph is not None else reader.graph
    assert isinstance(graph, ir.Graph)
    nodes = _halved(value, dtype, graph) if mask else []
    finite = nodes[-1].outputs[0] if nodes else value
    cast = ir.node("Cast", [finite], attributes={"to": int(dtype)}, name=f"{value.name}/to_{kind}")
    nodes.append(_typed(cast, f"{value.name}/{kind}", dtype, value))
    producer = value.producer()
    if producer is not None:
        producer.append(nodes)
    else:
        graph.insert_before(graph[0], nodes)
    lowered[value] = cast.outputs[0]


def _halved(value: ir.Value, dtype: ir.DataType, graph: ir.Graph) -> list[ir.Node]:
    """What halves ``value`` where it is below the lowest of ``dtype``: finite numbers stay finite there, and infinite ones infinite."""

    def held(name: str, number: float) -> ir.Value:
        return initializer(graph, f"{value.name}/{name}", np.array(number, np.float32))

    found, name = list[ir.Node](), str(value.name)
    for op, inputs, result, kind in (
        ("Less", [value, held("lowest", float(dtype.min))], f"{name}/below", ir.DataType.BOOL),
        ("Where", [held("half", 0.5), held("one", 1.0)], f"{name}/factor", ir.DataType.FLOAT),
        ("Mul", [value], f"{name}/finite", ir.DataType.FLOAT),
    ):
        before = [n.outputs[0] for n in found[-1:]]
        found.append(_typed(ir.node(op, [*before, *inputs], name=result), result, kind, value))
    return found


def _typed(node: ir.Node, name: str, dtype: ir.DataType, like: ir.Value) -> ir.Node:
    """``node``, whose one output has the shape of ``like``."""
    out = node.outputs[0]
    out.name, out.type, out.shape = name, ir.TensorType(dtype), like.shape
    return node


def _raise_output(value: ir.Value, taken: dict[ir.Node, None], dtype: ir.DataType) -> None:
    """Type ``value`` as ``dtype``, and let float32 readers and outputs of the graph read it through a cast."""
    readers = [
        (u.node, u.idx)
        for u in value.uses()
        if u.node not in taken or u.idx in _FIXED.get(u.node.op_type, ())
    ]
    value.type = ir.TensorType(dtype)
    producer = value.producer()
    if not readers and not value.is_graph_output():
        return
    assert producer is not None
    name, is_output = str(value.name), value.is_graph_output()
    graph = producer.graph
    assert isinstance(graph, ir.Graph)
    if is_output:
        value.name = f"{name}/{dtype.name.lower()}"
    cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{name}/to_float")
    _typed(cast, name if is_output else f"{name}/float", ir.DataType.FLOAT, value)
    producer.append(cast)
    for node, index in readers:
        node.replace_input_with(index, cast.outputs[0])
    if is_output:
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = cast.outputs[0]
