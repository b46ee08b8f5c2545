"""What emitters share: the tensors that values have become, layouts, integers, and the table that they enter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from ai_edge_litert.schema_py_generated import ActivationFunctionType, TensorType

from optkit.backends.litert.emit.grids import floats_of, halved, stored
from optkit.backends.litert.flat import File, Graph, Grid, Settings, Tensor
from optkit.backends.litert.kernels import NotTakenError, wider
from optkit.errors import ModelError
from optkit.graph import constant, describe, is_float, rank, users

Refuse = Callable[[ir.Node], str | None]
Emit = Callable[["Context", ir.Node], None]
# ``last``: channels come last, as convolutions of LiteRT want them; of a value with three axes, in a picture of one row.
Layout = Literal["plain", "last"]

# Elements from which on a constant in 16 bits is worth the operator that widens it.
_HALVED = 1 << 10

TO_LAST, TO_PLAIN = (0, 2, 3, 1), (0, 3, 1, 2)
# Where an axis of a plain value is in one with channels last.
MOVED = {0: 0, 1: 3, 2: 1, 3: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One ONNX operator.

    Attributes:
        emit: Adds its operators to the subgraph and gives its outputs.
        refuse: Why LiteRT cannot express this node, or None.
    """

    emit: Emit
    refuse: Refuse | None = None


ROWS: dict[str, Row] = {}


def emits(*names: str, refuse: Refuse | None = None) -> Callable[[Emit], Emit]:
    """Enter a function into the table of emitters for the ONNX operators ``names``."""

    def enter(function: Emit) -> Emit:
        for name in names:
            assert name not in ROWS, name
            ROWS[name] = Row(emit=function, refuse=refuse)
        return function

    return enter


def size(value: ir.Value) -> tuple[int, ...]:
    """The shape of a value; all sizes are known by the time that emitters run.

    Raises:
        ModelError: It depends on data.
    """
    if value.shape is None or not value.shape.is_static():
        producer = value.producer()
        where = f"{describe(producer)}: " if producer is not None else ""
        raise ModelError(f"{where}the shape of {value.name!r} depends on data, and LiteRT needs it fixed")
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Where the kernel of a node ends.

    Attributes:
        value: What it stores, behind the activation that it applies.
        activation: This one, by the schema's number.
        quantizer: The node that puts ``value`` on a grid, where no other reads it.
    """

    value: ir.Value
    activation: int
    quantizer: ir.Node | None


class Context:
    """A subgraph being made from a graph whose shapes are all known.

    Attributes:
        graph: What is added to.
        done: Nodes that the kernels of others compute.
        at: Name of the node that is being written: what its kernels give between is named after it.
    """

    def __init__(self, file: File, name: str) -> None:
        self.graph = Graph(file, name)
        self.done: set[ir.Node] = set()
        self.at = ""
        self._floats: dict[tuple[ir.Value, Layout], Tensor] = {}
        self._integers: dict[tuple[ir.Value, Layout], Tensor] = {}
        # Floats of constants that are stored in 16 bits, by the index of these.
        self._widened: dict[int, Tensor] = {}

    # What is there.

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """The elements of a constant."""
        return constant(value)

    def layout(self, *values: ir.Value | None, rows: bool = False) -> Layout:
        """In which layout values that belong together are at hand; ``last`` of three axes only where ``rows``."""
        if not rows and any(v is not None and rank(v) == 3 for v in values):
            return "plain"
        forms = (self._floats, self._integers)
        last = any((v, "last") in form for form in forms for v in values if v is not None)
        plain = any((v, "plain") in form for form in forms for v in values if v is not None)
        return "last" if last and not plain else "plain"

    def get(self, value: ir.Value, layout: Layout = "plain") -> Tensor:
        """A value as floats (or whatever type it has that is no grid), in a layout.

        Raises:
            ModelError: It was not computed, which is a mistake in the emitter of its node.
            NotTakenError: It is a constant without elements.
        """
        found = self._floats.get((value, layout))
        if found is not None:
            return found
        array = constant(value)
        if array is not None:
            if not array.size:
                raise NotTakenError(f"{value.name!r} is constant and empty, and LiteRT stores nothing empty")
            if layout == "last":
                array = np.transpose(array, TO_LAST) if array.ndim == 4 else np.swapaxes(array, 1, 2)[:, None]
            return self.put(value, self.graph.constant(array, str(value.name)), layout)
        kept = stored(value)
        if kept is not None:
            array, grid = kept
            name = str(value.name)
            if array.dtype == np.int8:
                self._floats[value, "plain"] = self._dequantized(
                    self.graph.constant(array, name, grid), value
                )
            else:
                self._floats[value, "plain"] = self.graph.constant(floats_of(value), name)
            return self.get(value, layout)
        other: Layout = "plain" if layout == "last" else "last"
        if (value, other) in self._floats:
            moved = self.moved(self._floats[value, other], layout)
            return self.put(value, self.reshaped(moved, size(value)) if layout == "plain" else moved, layout)
        for form in (layout, other):
            if (value, form) in self._integers:
                q = self._integers[value, form]
                self.put(value, self._dequantized(q, value) if is_float(value) else self._raw(q, value), form)
                return self.get(value, layout)
        raise ModelError(f"{value.name!r} was not computed")

    def _dequantized(self, q: Tensor, value: ir.Value) -> Tensor:
        return self.op(
            "DEQUANTIZE", [q], q.shape, np.float32, ("DequantizeOptions", {}), name=str(value.name)
        )

    def _raw(self, q: Tensor, value: ir.Value) -> Tensor:
        """Integers as they are, for who reads them as numbers: those of a grid are signed, and kernels would scale them."""
        if value.dtype != ir.DataType.UINT8:
            return self.op(
                "RESHAPE",
                [q, self.vector(q.shape)],
                q.shape,
                settings=("ReshapeOptions", {"newShape": list(q.shape)}),
            )
        wide = self.op(
            "ADD", [self.cast(q, np.int32), self.number(128, np.int32)], q.shape, settings=("AddOptions", {})
        )
        return self.cast(wide, np.uint8)

    def result(self, value: ir.Value) -> Tensor:
        """An output of the subgraph, which must be computed: neither a constant nor an input."""
        tensor = self.get(value)
        stored = self.graph.table.tensors[tensor.index].buffer != 0
        return self.copied(tensor) if stored or value.is_graph_input() else tensor

    def copied(self, x: Tensor) -> Tensor:
        """A copy."""
        return self.op(
            "RESHAPE",
            [x, self.vector(x.shape)],
            x.shape,
            settings=("ReshapeOptions", {"newShape": list(x.shape)}),
        )

    def integers(self, value: ir.Value | None, layout: Layout = "plain") -> Tensor | None:
        """A value as integers on its grid, where it has one."""
        if value is None:
            return None
        other: Layout = "plain" if layout == "last" else "last"
        if (value, layout) not in self._integers and (value, other) in self._integers:
            moved = self.moved(self._integers[value, other], layout)
            self._integers[value, layout] = self.reshaped(moved, size(value)) if layout == "plain" else moved
        return self._integers.get((value, layout))

    def moved(self, x: Tensor, layout: Layout) -> Tensor:
        """A tensor in the other layout; one of three axes becomes a picture of one row, which ``get`` makes flat again."""
        if len(x.shape) == 3:
            x = self.reshaped(x, (x.shape[0], x.shape[1], 1, x.shape[2]))
        order = TO_LAST if layout == "last" else TO_PLAIN
        shape = tuple(x.shape[i] for i in order)
        # Where only one of the axes that change places has more than one element, nothing moves.
        if sorted((x.shape[1:]), reverse=True)[1] == 1:
            return self.reshaped(x, shape)
        return self.transposed(x, order)

    # What is made.

    def put(self, value: ir.Value, tensor: Tensor, layout: Layout = "plain") -> Tensor:
        """Say which tensor a value has become."""
        self._floats[value, layout] = tensor
        return tensor

    def skip(self, node: ir.Node) -> None:
        """Stand-ins for what a node gives that was refused, so that those that read it can be looked at too."""
        absorbed = [u for o in node.outputs for u in users(o) if u in self.done]
        for output in (o for n in (node, *absorbed) for o in n.outputs):
            kind = np.float32 if output.dtype is None else output.dtype.numpy()
            self.put(output, self.graph.tensor(str(output.name), size(output), kind))

    def put_integers(self, value: ir.Value, tensor: Tensor, layout: Layout = "plain") -> None:
        """The same of integers on a grid."""
        self._integers[value, layout] = tensor

    def op(
        self, code: str, inputs: Sequence[Tensor], shape: Sequence[int], dtype: Any = None,
        settings: Settings | None = None, *, grid: Grid | None = None, name: str = "",
    ) -> Tensor:  # fmt: skip
        """An operator with one output, of the type of its first input unless said otherwise."""
        between = f"{self.at}/{code.lower()}" if self.at else code.lower()
        return self.ops(code, inputs, [(name or between, shape)], dtype, settings, grid=grid)[0]

    def ops(
        self, code: str, inputs: Sequence[Tensor], outputs: Sequence[tuple[str, Sequence[int]]], dtype: Any = None,
        settings: Settings | None = None, *, grid: Grid | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """An operator with ``outputs``, each a name and a shape; its kernel may compute in a wider type, which wraps around alike."""
        own = inputs[0].dtype
        kind, wide = np.dtype(own if dtype is None else dtype), wider(code, inputs)
        back = wide is not None and kind == own
        if wide is not None:
            inputs = [self.cast(t, wide) if t.dtype == own else t for t in inputs]
        made = [self.graph.tensor(name, shape, wide if back else kind, grid) for name, shape in outputs]
        self.graph.op(code, inputs, made, settings)
        return [self.cast(t, kind) for t in made] if back else made

    def number(self, value: float, dtype: Any = np.float32) -> Tensor:
        """A constant of one element."""
        return self.graph.constant(np.asarray(value, dtype))

    def weights(self, array: np.ndarray, name: str = "weights") -> Tensor:
        """A constant of floats that a product or a table lookup reads: in 16 bits where these hold all its elements exactly.

        Runtimes widen it while they open the file (TensorFlow Lite's float16 quantization), or compute in float16 (its GPU delegate).
        """
        array = np.ascontiguousarray(array, np.float32)
        narrow = halved(array) if array.size >= _HALVED else None
        if narrow is None:
            return self.graph.constant(array, name)
        held = self.graph.constant(narrow, name)
        if held.index not in self._widened:
            self._widened[held.index] = self.op(
                "DEQUANTIZE", [held], held.shape, np.float32, ("DequantizeOptions", {}), name=name
            )
        return self._widened[held.index]

    def vector(self, values: Sequence[int]) -> Tensor:
        """Sizes or axes, as LiteRT takes them."""
        return self.graph.constant(np.asarray(values, np.int32))

    def reshaped(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The same elements in another shape."""
        if tuple(shape) == x.shape:
            return x
        return self.op(
            "RESHAPE",
            [x, self.vector(shape)],
            shape,
            settings=("ReshapeOptions", {"newShape": list(shape)}),
            grid=x.grid,
        )

    def spread(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Broadcast to ``shape``."""
        whole = self.reshaped(x, (1,) * (len(shape) - len(x.shape)) + x.shape)
        return self.op(
            "BROADCAST_TO", [whole, self.vector(shape)], shape, settings=("BroadcastToOptions", {})
        )

    def transposed(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """Axes in another order."""
        if list(order) == list(range(len(order))):
            return x
        shape = [x.shape[i] for i in order]
        return self.op(
            "TRANSPOSE", [x, self.vector(order)], shape, settings=("TransposeOptions", {}), grid=x.grid
        )

    def cast(self, x: Tensor, dtype: Any) -> Tensor:
        """Another type."""
        kind = np.dtype(dtype)
        if kind == x.dtype:
            return x
        settings = {"inDataType": KINDS[x.dtype.name], "outDataType": KINDS[kind.name]}
        return self.op("CAST", [x], x.shape, kind, ("CastOptions", settings))

    # Ends of kernels.

    def end(self, node: ir.Node, *, activations: bool = True) -> End:
        """Where a kernel with one output ends: behind a ReLU and on the grid of what reads it alone."""
        value, activation = node.outputs[0], ActivationFunctionType.NONE
        reader = _reader(value)
        # Integers wrap around before an activation cuts them off.
        if (
            activations
            and is_float(value)
            and reader is not None
            and (kind := _activation(reader)) is not None
        ):
            self.done.add(reader)
            value, activation = reader.outputs[0], kind
            reader = _reader(value)
        quantizer = reader if reader is not None and reader.op_type == "QuantizeLinear" else None
        return End(value=value, activation=activation, quantizer=quantizer)


KINDS = {
    "float32": TensorType.FLOAT32, "float16": TensorType.FLOAT16, "int32": TensorType.INT32, "int64": TensorType.INT64,
    "bool": TensorType.BOOL, "int8": TensorType.INT8, "uint8": TensorType.UINT8,
}  # fmt: skip


def _reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, where nothing else does."""
    found = users(value)
    return found[0] if len(found) == 1 and not value.is_graph_output() else None


def _activation(node: ir.Node) -> int | None:
    """The number of an activation that kernels apply for free."""
    if node.op_type == "Relu":
        return int(ActivationFunctionType.RELU)
    if node.op_type == "Clip":
        low, high = (bound(node, i) for i in (1, 2))
        if (low, high) == (0.0, 6.0):
            return int(ActivationFunctionType.RELU6)
        if (low, high) == (0.0, None):
            return int(ActivationFunctionType.RELU)
    return None


def bound(node: ir.Node, index: int) -> float | None:
    """A bound of a Clip that is constant."""
    value = node.inputs[index] if len(node.inputs) > index else None
    found = constant(value)
    return None if found is None else float(found.reshape(-1)[0])


def operand(c: Context, value: ir.Value, rank: int, layout: Layout) -> Tensor:
    """An operand of something with ``rank`` axes that is broadcast, in a layout."""
    if layout == "plain":
        return c.get(value)
    shape = size(value)
    if len(shape) == rank:
        return c.get(value, "last")
    array = constant(value)
    full = (1,) * (rank - len(shape)) + shape
    if array is not None:
        return c.graph.constant(
            np.ascontiguousarray(np.transpose(array.reshape(full), TO_LAST)), str(value.name)
        )
    return c.moved(c.reshaped(c.get(value), full), "last")


def together(c: Context, values: list[ir.Value], rank: int) -> Layout:
    """The layout for operands that meet: channels last where a large one is so."""
    if rank != 4:
        return "plain"
    whole = [v for v in values if constant(v) is None and len(size(v)) == rank]
    last = [v for v in whole if c.layout(v) == "last"]
    plain = [v for v in whole if v not in last]
    return "last" if last and _volume(last) >= _volume(plain) else "plain"


def _volume(values: Sequence[ir.Value]) -> int:
    """Elements of the largest."""
    return max((int(np.prod(size(v))) for v in values), default=0)
