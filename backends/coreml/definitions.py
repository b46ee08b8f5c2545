"""What coremltools' definitions make of a stored operation: its parameters, their types, and the types of its results.

Each version of the language has a class for every operation there, which says what its parameters are and how the types of its
results follow from them. It is asked with what the stored program declares, one operation at a time: nothing that built the
program has a say, and a wrong type is told where it stands and not where it leads to.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from optkit.backends.coreml.quiet import MIL_pb2, ct, input_type, mil, registry, types
from optkit.backends.coreml.reference.program import Lazy, Operation, Type, kind_of

_TARGETS = {
    "CoreML5": "iOS15",
    "CoreML6": "iOS16",
    "CoreML7": "iOS17",
    "CoreML8": "iOS18",
    "CoreML9": "iOS26",
}
# Without a class of their own, or with one that has to build what is inside.
_APART = ("const", "cond", "while_loop", "write_state", "classify")
# Optional in coremltools' signatures; the loader of iOS 17 on refuses programs without (onnxsim, notes on its exporter).
_INDEXED = ("gather", "gather_nd", "gather_along_axis", "scatter", "scatter_nd", "scatter_along_axis")
_PADDED = ("conv", "conv_transpose", "max_pool", "avg_pool")
_GATES = frozenset({
    "tanh", "sigmoid", "relu", "linear", "scaled_tanh", "sigmoid_hard", "hard_sigmoid"
})  # fmt: skip
_UPDATES = frozenset({"update", "add", "sub", "mul", "div", "max", "min"})
_WAYS = frozenset({"forward", "reverse"})
# Words that the definitions document and do not check.
_WORDS: Mapping[tuple[str, str], frozenset[str]] = {
    ("conv_transpose", "pad_type"): frozenset({"valid", "same", "custom"}),
    ("gelu", "mode"): frozenset({"EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"}),
    ("random_categorical", "mode"): frozenset({"logits", "probs"}),
    **{(kind, "mode"): _UPDATES for kind in ("scatter", "scatter_nd", "scatter_along_axis")},
    **{(kind, "direction"): _WAYS for kind in ("gru", "rnn")},
    **{(kind, word): _GATES for kind in ("gru", "rnn") for word in ("activation", "recurrent_activation")},
}
# Parameters with an element for each of: the channels of x, its axes, the axes behind the channels, both ends of those.
_CHANNELS, _AXES, _PLACES, _ENDS = "channels", "axes", "places", "ends"
_LENGTHS: Mapping[tuple[str, str], str] = {
    **{("batch_norm", p): _CHANNELS for p in ("mean", "variance", "gamma", "beta")},
    **{("instance_norm", p): _CHANNELS for p in ("gamma", "beta")},
    ("prelu", "alpha"): _CHANNELS,
    **{("slice_by_index", f"{p}_mask"): _AXES for p in ("begin", "end", "squeeze")},
    ("slice_by_index", "stride"): _AXES,
    **{(kind, p): _PLACES for kind in ("conv", "conv_transpose") for p in ("strides", "dilations")},
    **{(kind, p): _PLACES for kind in ("avg_pool", "max_pool") for p in ("strides", "kernel_sizes")},
    **{(kind, "pad"): _ENDS for kind in ("conv", "conv_transpose", "avg_pool", "max_pool")},
}
# What definitions raise where something does not fit; some find out by stumbling over it.
_REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
)  # fmt: skip
# Elements of a constant up to which its values tell two apart.
_FEW = 64
# Stands for every size that is not known; no size is told from another by it.
_SIZE = mil.get_new_symbol()


@dataclass(frozen=True, slots=True)
class Value:
    """What an operation takes.

    Attributes:
        origin: The kind of operation that makes it where it is a constant; empty where it is computed.
        held: The value of a constant: an array, a string, or what lies in the file of weights.
    """

    type: Type
    origin: str = ""
    held: Any = None

    @classmethod
    def stored(cls, held: Any) -> Value:
        """A constant, by what it holds."""
        return cls(_type_of(held), "const", held)

    def key(self) -> Any:
        """The same for values that nothing tells apart."""
        held = self.held
        if isinstance(held, np.ndarray):
            held = held.tobytes() if held.size <= _FEW else id(held)
        elif isinstance(held, Lazy):
            held = held.offset
        elif isinstance(held, list):
            held = tuple(map(str, held))
        return self.type, self.origin, held


def _type_of(held: Any) -> Type:
    if isinstance(held, Lazy):
        return held.type
    if isinstance(held, np.ndarray):
        return Type(kind=kind_of(held), dtype=held.dtype.type, shape=held.shape)
    shape = (len(held),) if isinstance(held, list) else ()
    return Type(kind="STRING", dtype=np.str_, shape=shape)


def fits(one: Type, other: Type) -> bool:
    """Whether two types can be of the same value: sizes that are not known fit to all."""
    if (one.kind, one.state) != (other.kind, other.state) or one.shape is None or other.shape is None:
        return False
    return len(one.shape) == len(other.shape) and all(
        a == b or a < 0 or b < 0 for a, b in zip(one.shape, other.shape, strict=True)
    )


class Definitions:
    """The operations of one version, ``CoreML5`` and up."""

    def __init__(self, opset: str) -> None:
        self.opset = opset
        self._version = getattr(ct.target, _TARGETS[opset])
        self._found: dict[Any, tuple[str, ...]] = {}

    def problems(self, op: Operation, arguments: Mapping[str, Sequence[Value]]) -> Iterable[str]:
        """What is wrong with one operation.

        Args:
            op: As it is stored.
            arguments: What its parameters are given.
        """
        if op.kind in _APART:
            return ()
        key = (
            op.kind,
            tuple((k, tuple(v.key() for v in values)) for k, values in arguments.items()),
            tuple(o.type for o in op.outputs),
        )
        # Most operations of a network occur over and over.
        found = self._found.get(key)
        if found is None:
            self._found[key] = found = tuple(self._problems(op, arguments))
        return found

    def _problems(self, op: Operation, arguments: Mapping[str, Sequence[Value]]) -> Iterator[str]:
        definition = _definition(op.kind, self._version)
        if definition is None:
            yield f"there is no such operation in {self.opset}"
            return
        found = [*_parameters(self.opset, definition, arguments), *_words(op.kind, arguments)]
        found = found or [*_types(op.kind, definition, arguments)]
        found = found or [*_axes(op.kind, arguments), *_lengths(op.kind, arguments)]
        yield from found or self._results(op, definition, arguments)

    def _results(
        self, op: Operation, definition: Any, arguments: Mapping[str, Sequence[Value]]
    ) -> Iterator[str]:
        every = [*(v.type for values in arguments.values() for v in values), *(o.type for o in op.outputs)]
        # The types of lists say nothing of their elements here.
        if any(t.shape is None for t in every):
            return
        try:
            # Some ask it for the version.
            with mil.Function({}, opset_version=self._version):
                inferred = _reshaped(op.kind, arguments) or _inferred(definition, arguments)
        except _REFUSALS as error:
            yield f"its definition refuses what it takes: {str(error) or type(error).__name__}"
            return
        if len(inferred) != len(op.outputs):
            yield f"has {len(op.outputs)} results, and gives {len(inferred)}"
            return
        for output, follows in zip(op.outputs, inferred, strict=True):
            if not fits(output.type, follows):
                yield f"{output.name!r} is declared as {output.type}, and {follows} follows from what it takes"


@functools.cache
def _definition(kind: str, version: Any) -> Any:
    """The newest one that is no newer than ``version``."""
    versions = registry.core_ops.get(kind, {})
    fit = [v for v in versions if v.value <= version.value]
    return versions[max(fit, key=lambda v: v.value)] if fit else None


def _parameters(opset: str, definition: Any, arguments: Mapping[str, Sequence[Value]]) -> Iterator[str]:
    signature, kind = definition.input_spec.input_types, definition.__name__
    for parameter in sorted(set(arguments) - set(signature)):
        yield f"{opset} has no parameter {parameter!r}"
    for parameter, wanted in signature.items():
        if parameter not in arguments:
            if not wanted.optional:
                yield f"the parameter {parameter!r} is missing"
        elif wanted.const and not all(v.origin for v in arguments[parameter]):
            yield f"the parameter {parameter!r} has to be constant"
    if kind in _INDEXED and "validate_indices" in signature and "validate_indices" not in arguments:
        yield "the parameter 'validate_indices' is missing, and the loader asks for it"
    if kind in _PADDED and "pad_type" not in arguments:
        yield "the parameter 'pad_type' is missing"


def _words(kind: str, arguments: Mapping[str, Sequence[Value]]) -> Iterator[str]:
    for parameter, values in arguments.items():
        allowed = _WORDS.get((kind, parameter))
        for value in values:
            if allowed is not None and isinstance(value.held, str) and value.held not in allowed:
                yield f"{parameter} is {value.held!r}, and may be {', '.join(sorted(allowed))}"


def _types(kind: str, definition: Any, arguments: Mapping[str, Sequence[Value]]) -> Iterator[str]:
    alike: dict[str, tuple[str, Type]] = {}
    for parameter, wanted in definition.input_spec.input_types.items():
        group = getattr(wanted, "type_domain_id", None)
        allowed = definition.type_domains.get(group) or getattr(wanted, "type_domain", ())
        for value in arguments.get(parameter, ()):
            if value.type.state != isinstance(wanted, input_type.StateInputType):
                yield f"{parameter} is {value.type}, and {kind} takes {'tensors' if value.type.state else 'a state'}"
            elif not allowed:
                continue
            elif _primitive(value.type.kind) not in allowed:
                names = ", ".join(_kind(t).lower() for t in allowed)
                yield f"{parameter} is {value.type}, and {kind} takes {names}"
            elif group is not None:
                first, other = alike.setdefault(group, (parameter, value.type))
                if other.kind != value.type.kind:
                    yield f"{first} is {other}, {parameter} is {value.type}, and {kind} takes one type for both"


def _axes(kind: str, arguments: Mapping[str, Sequence[Value]]) -> Iterator[str]:
    if "x" not in arguments or kind == "expand_dims":
        return
    shape = arguments["x"][0].type.shape
    for parameter in ("axis", "axes"):
        for value in arguments.get(parameter, ()):
            if shape is not None and isinstance(value.held, np.ndarray):
                axes = value.held.reshape(-1).tolist()
                for axis in axes:
                    if not -len(shape) <= axis < len(shape):
                        yield f"{parameter} is {axis}, and x has {len(shape)} axes"
                if len({a % len(shape) for a in axes if shape}) < len(axes):
                    yield f"{parameter} is {axes}, and names an axis twice"


def _lengths(kind: str, arguments: Mapping[str, Sequence[Value]]) -> Iterator[str]:
    shape = arguments["x"][0].type.shape if "x" in arguments else None
    if shape is None or len(shape) < 2:
        return
    counts = {_CHANNELS: shape[1], _AXES: len(shape), _PLACES: len(shape) - 2, _ENDS: 2 * len(shape) - 4}
    for parameter, (value, *_) in arguments.items():
        count = counts.get(_LENGTHS.get((kind, parameter), ""), -1)
        if count >= 0 and value.type.shape not in ((count,), (-1,)):
            yield f"{parameter} is {value.type}, and x has {count} {_LENGTHS[kind, parameter]}"


def _reshaped(kind: str, arguments: Mapping[str, Sequence[Value]]) -> list[Type]:
    """What a reshape of a free size gives, which the definition solves equations for; nothing where it need not."""
    if kind != "reshape":
        return []
    x, wanted = arguments["x"][0].type, arguments["shape"][0].held
    if not isinstance(wanted, np.ndarray) or x.shape is None or min(x.shape, default=0) >= 0:
        return []
    return [replace(x, shape=tuple(int(d) if d > 0 else -1 for d in wanted))]


def _inferred(definition: Any, arguments: Mapping[str, Sequence[Value]]) -> list[Type]:
    """The types of the results."""
    op, signature = definition.__new__(definition), definition.input_spec.input_types
    op.name, op.blocks, op._input_types = definition.__name__, [], signature
    op._input_vars = dict.fromkeys(signature)

    def give(parameter: str, values: Sequence[Value]) -> None:
        variables = [_variable(parameter, v) for v in values]
        op._input_vars[parameter] = (
            tuple(variables) if isinstance(signature[parameter], input_type.TupleInputType) else variables[0]
        )

    for parameter, values in arguments.items():
        give(parameter, values)
    op.__dict__.update(op._input_vars)
    for parameter, default in op.default_inputs().items():
        if default is None:
            continue
        if parameter not in arguments:
            give(parameter, [Value.stored(_plain(default))])
        elif np.ndim(default) != len(arguments[parameter][0].type.shape or ()):
            raise ValueError(
                f"{parameter} is {arguments[parameter][0].type}, and has {np.ndim(default)} axes"
            )
    op.__dict__.update(op._input_vars)
    found = op.type_inference()
    return [_read(t) for t in (found if isinstance(found, tuple) else (found,))]


def _plain(default: Any) -> Any:
    """A default as a program holds it."""
    if isinstance(default, str):
        return default
    array = np.asarray(default)
    narrow = {np.dtype(np.int64): np.int32, np.dtype(np.float64): np.float32}
    return array.astype(narrow.get(array.dtype, array.dtype))


def _variable(name: str, value: Value) -> Any:
    made, held = _made(value.type), value.held
    if isinstance(held, Lazy):
        held = None if held.type.short else held.read()
    known = None
    # Of less than a byte are weights alone, whose values no type follows from.
    if held is not None and not value.type.short:
        known = made()
        known.val = held[()] if isinstance(held, np.ndarray) and not held.shape else held
    variable = mil.Var(name, made, known)
    if value.origin:
        variable._op, variable.is_descendant_of_const = SimpleNamespace(op_type=value.origin), True
    return variable


@functools.cache
def _primitive(kind: str) -> Any:
    return types.PROTO_TO_BUILTIN_TYPE.get(MIL_pb2.DataType.Value(kind)) if kind.isupper() else None


def _kind(primitive: Any) -> str:
    return str(MIL_pb2.DataType.Name(types.BUILTIN_TO_PROTO_TYPES[primitive]))


@functools.cache
def _made(type_: Type) -> Any:
    """A type as coremltools has it: what has no axes is no tensor there."""
    found = _primitive(type_.kind)
    if type_.shape:
        found = types.tensor(found, [_SIZE if d < 0 else d for d in type_.shape])
    return types.state(found) if type_.state else found


def _read(made: Any) -> Type:
    primitive, shape = (made.get_primitive(), made.get_shape()) if types.is_tensor(made) else (made, ())
    sizes = tuple(int(d) if isinstance(d, int | np.integer) else -1 for d in shape)
    return Type(kind=_kind(primitive), dtype=None, shape=sizes)
