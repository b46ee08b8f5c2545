"""What emitters share: the values known so far, constants in Core ML's types, and the table that they enter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.quiet import mb, types
from optkit.errors import ModelError
from optkit.graph import constant, describe

Refuse = Callable[[ir.Node], str | None]
Emit = Callable[["Context", ir.Node], Any]

INT32 = np.iinfo(np.int32)
_FREE = "where that follows from free axes, give their sizes: --set 'options.shapes={AXIS: SIZE}'; else choose another --backend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One ONNX operator.

    Attributes:
        emit: Adds its operations to the program; the variable of its output, or one for each output.
        refuse: Why Core ML cannot express this node, or None.
        oldest: Major version of the iOS that first has the operations.
    """

    emit: Emit
    refuse: Refuse | None = None
    oldest: int = 16


ROWS: dict[str, Row] = {}


def emits(*names: str, refuse: Refuse | None = None, oldest: int = 16) -> Callable[[Emit], Emit]:
    """Enter a function into the table of emitters for the ONNX operators ``names``."""

    def enter(function: Emit) -> Emit:
        for name in names:
            assert name not in ROWS, name
            ROWS[name] = Row(emit=function, refuse=refuse, oldest=oldest)
        return function

    return enter


def narrow(array: np.ndarray, what: str) -> np.ndarray:
    """``array`` in a type that Core ML has: int64 becomes int32, float64 float32.

    Raises:
        ModelError: An integer does not fit.
    """
    array = np.asarray(array)
    if array.dtype in (np.int64, np.uint64, np.uint32):
        if array.size and (array.min() < INT32.min or array.max() > INT32.max):
            raise ModelError(
                f"{what} holds integers beyond 32 bits ({array.min()} to {array.max()}), and Core ML has none",
                hint="values of this size are mostly sentinels: use the largest int32 in the model instead",
            )
        return array.astype(np.int32)
    if array.dtype in (np.int16, np.uint16):
        return array.astype(np.int32)
    if array.dtype == np.float64:
        return array.astype(np.float32)
    return array


def is_float(x: Any) -> bool:
    """Whether a variable of the program holds floats."""
    return bool(types.is_float(x.dtype))


def like(x: Any, value: float) -> Any:
    """A scalar of the type of ``x``."""
    kind = {types.fp16: np.float16, types.fp32: np.float32, types.int32: np.int32}.get(x.dtype)
    assert kind is not None, x.dtype
    return np.asarray(value).astype(kind)[()]


def static(x: Any) -> list[int] | None:
    """The shape of a variable, where every axis is a number."""
    dims = [int(d) if isinstance(d, int | np.integer) else None for d in x.shape]
    return None if None in dims else dims  # type: ignore[return-value]


def cast(x: Any, to: str) -> Any:
    """``x`` as ``to``: ``fp32``, ``fp16``, ``int32`` or ``bool``."""
    return x if types.builtin_to_string(x.dtype) == to else mb.cast(x=x, dtype=to)


def name_of(x: Any) -> str:
    """The name of the type of ``x``, as ``cast`` takes it."""
    return str(types.builtin_to_string(x.dtype))


def wide(x: Any) -> Any:
    """``x``, where it holds integers of 8 or 16 bits as int32: arithmetic knows no others."""
    return cast(x, "int32") if name_of(x) in ("int8", "uint8", "int16", "uint16") else x


def unchecked(c: Context) -> dict[str, bool]:
    """How operations that read or write at places are told not to look at them.

    Newer versions ask for it: without, the loader refuses the program; True is slower and fails at run time.
    """
    return {"validate_indices": False} if c.version >= 17 else {}


def through_floats(x: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of a variable of 8 bits by way of floats, which hold its numbers, for operations that take no others."""
    kind = name_of(x)
    return function(x) if is_float(x) else cast(function(cast(x, "fp32")), kind)


def through_ints(x: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of a bool variable by way of int32, for operations that take no bool."""
    if x.dtype != types.bool:
        return function(x)
    return mb.cast(x=function(mb.cast(x=x, dtype="int32")), dtype="bool")


def select(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where the condition holds and ``b`` elsewhere, of the shape that all three broadcast to.

    The builder declares the shape that ``a`` and ``b`` broadcast to: where the condition is larger, ``a`` is made as large.
    """
    shapes = [list(reversed(v.shape)) for v in (a, b)]
    for place, size in enumerate(reversed(condition.shape)):
        others = [shape[place] for shape in shapes if place < len(shape)]
        if size not in others and (size != 1 or not others):
            zeros = mb.mul(x=cast(condition, name_of(a)), y=like(a, 0))
            a = mb.add(x=a, y=zeros)
            break
    return mb.select(cond=condition, a=a, b=b)


def _bounds_slices(value: ir.Value) -> bool:
    """Whether it is read as bounds of slices alone, or as parts of such: beyond the ends of an axis, all are the same."""
    return not value.is_graph_output() and all(
        use.idx in (1, 2)
        if use.node.op_type == "Slice"
        else use.node.op_type in ("Concat", "Unsqueeze", "Identity") and _bounds_slices(use.node.outputs[0])
        for use in value.uses()
    )


@dataclass(slots=True, kw_only=True)
class Context:
    """The program as far as it was built.

    Attributes:
        version: Major version of iOS that it is for; 16 and up.
        variables: Of the program, by value of the graph.
        quantized: Nodes that make floats of smaller constants, which a reader may want in another layout.
        weights: Constants in the layout and form in which they are read.
        names: Taken by inputs, outputs and variables; ``named`` are those that have theirs.
        unpack: Gives the variable of one of ``quantized`` in its own layout.
        body: Emits the body of an If or a Loop, and gives the variables of its outputs.
    """

    version: int
    variables: dict[ir.Value, Any] = field(default_factory=dict)
    quantized: dict[ir.Value, ir.Node] = field(default_factory=dict)
    weights: dict[tuple[ir.Value, bool], Any] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    named: set[Any] = field(default_factory=set)
    unpack: Callable[[Context, ir.Value], Any]
    body: Callable[[Context, ir.Graph], list[Any]]

    def __getitem__(self, value: ir.Value | None) -> Any:
        """The variable of ``value``; constants enter the program when they are asked for."""
        assert value is not None
        if value not in self.variables and value in self.quantized:
            self.variables[value] = self.unpack(self, value)
        if value not in self.variables:
            array = constant(value)
            if array is None:
                node = value.producer()
                assert node is not None, value.name
                raise refused(node, f"optkit has no translation of its output {value.name!r}")
            if array.dtype == np.int64 and _bounds_slices(value):
                array = np.clip(array, INT32.min, INT32.max)
            array = narrow(array, f"the constant {value.name!r}")
            # As which those of inputs are passed; iOS 16 computes with no others.
            short = self.version < 17 and array.dtype in (np.int8, np.uint8)
            self.variables[value] = mb.const(val=array.astype(np.int32) if short else array)
        return self.variables[value]

    def call(self, graph: ir.Graph, given: Sequence[Any] = ()) -> list[Any]:
        """The outputs of a body whose inputs are ``given``; constants that it makes are not seen by the graph around it."""
        variables, weights = dict(self.variables), dict(self.weights)
        self.variables.update(zip(graph.inputs, given, strict=True))
        found = self.body(self, graph)
        self.variables, self.weights = variables, weights
        return found

    def inputs(self, node: ir.Node) -> list[Any]:
        """Variables of all inputs; None for those left out."""
        return [None if v is None else self[v] for v in node.inputs]

    def has(self, node: ir.Node, index: int) -> bool:
        """Whether input ``index`` is there."""
        return index < len(node.inputs) and node.inputs[index] is not None

    def input(self, node: ir.Node, index: int) -> Any:
        """The variable of an input, or None where it is left out."""
        return self[node.inputs[index]] if self.has(node, index) else None

    def known(self, node: ir.Node, index: int) -> np.ndarray | None:
        """What an input always holds, as far as the graph or the program knows; None where it depends on the inputs."""
        if not self.has(node, index):
            return None
        value = node.inputs[index]
        array = constant(value)
        if array is None:
            variable = self[value]
            array = None if variable.val is None else np.asarray(variable.val)
        return array

    def known_ints(self, node: ir.Node, index: int) -> list[int] | None:
        """As ``known``, a flat list."""
        array = self.known(node, index)
        return None if array is None else [int(v) for v in array.reshape(-1)]

    def partly(self, node: ir.Node, index: int) -> list[int | None]:
        """A list of integers, each where it is known: of a shape computed at run time often all but one."""
        array = self.known(node, index)
        if array is None:
            array = getattr(self[node.inputs[index]], "sym_val", None)
        if array is None:
            return []
        return [int(v) if isinstance(v, int | np.integer) else None for v in np.asarray(array).reshape(-1)]

    def sizes(self, x: Any) -> list[Any]:
        """The axes of ``x``: numbers, and variables ``[1]`` for those that are free."""
        shape = None
        found: list[Any] = []
        for axis, dim in enumerate(x.shape):
            if isinstance(dim, int | np.integer):
                found.append(int(dim))
                continue
            shape = mb.shape(x=x) if shape is None else shape
            found.append(mb.slice_by_index(x=shape, begin=[axis], end=[axis + 1]))
        return found

    def shape(self, sizes: Sequence[Any]) -> Any:
        """A shape from numbers and variables ``[1]``, as ``sizes`` gives them; an array where all are numbers."""
        if all(isinstance(s, int) for s in sizes):
            return np.asarray(sizes, np.int32)
        parts = [np.asarray([s], np.int32) if isinstance(s, int) else s for s in sizes]
        return mb.concat(values=parts, axis=0)

    def reshape(self, x: Any, sizes: Sequence[Any]) -> Any:
        """Reshape to ``sizes``; one may be -1."""
        return through_ints(x, lambda v: mb.reshape(x=v, shape=self.shape(sizes)))

    def count(self, size: Any) -> Any:
        """0, 1, 2 ... below a size: a number, or a variable ``[1]``."""
        end = np.int32(size) if isinstance(size, int) else mb.squeeze(x=size, axes=[0])
        return mb.range_1d(start=np.int32(0), end=end, step=np.int32(1))

    def product(self, sizes: Sequence[Any]) -> Any:
        """The product of sizes: a number, or a variable ``[1]``."""
        fixed = 1
        free: Any = None
        for size in sizes:
            if isinstance(size, int):
                fixed *= size
            else:
                free = size if free is None else mb.mul(x=free, y=size)
        if free is None:
            return fixed
        return free if fixed == 1 else mb.mul(x=free, y=np.int32(fixed))


class UnfitError(ModelError):
    """Nodes whose shapes or constants turn out not to fit while they are emitted.

    Args:
        problems: ``(node, reason)``, one for each of them.
    """

    def __init__(self, problems: Sequence[tuple[str, str]], *, hint: str | None = None) -> None:
        self.problems = tuple(problems)
        lines = [f"{node}: {reason}" for node, reason in self.problems]
        many = f"Core ML: {len(lines)} nodes do not fit:" + "".join(f"\n  {line}" for line in lines)
        super().__init__(lines[0] if len(lines) == 1 else many, hint=hint or _FREE)


def refused(node: ir.Node, what: str, *, hint: str | None = None) -> UnfitError:
    """The error for one such node."""
    return UnfitError([(describe(node), what)], hint=hint)
