"""Runs a program: resolves names, calls operations, rounds to the declared types, checks the declared shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from threading import RLock
from types import MappingProxyType
from typing import Any

import numpy as np

from optkit.backends.coreml.reference.halves import halves, is_finite, wide, widened
from optkit.backends.coreml.reference.ops import OPERATIONS, OVERWRITING, ROOMY
from optkit.backends.coreml.reference.order import late
from optkit.backends.coreml.reference.program import Block, Function, Lazy, Name, Operation, Output
from optkit.errors import DataError, ModelError

# Parameters that take several values, even where there is one.
_SEVERAL = {
    ("concat", "values"), ("stack", "values"), ("einsum", "values"), ("while_loop", "loop_vars"), ("classify", "classes"),
    ("reshape_like", "ref_tensors"), ("reshape_like", "begins"), ("reshape_like", "ends"), ("reshape_like", "end_masks"),
}  # fmt: skip
_CONTROL = ("cond", "while_loop", "read_state", "write_state", "classify")
# They move values and compute nothing: floats keep their type.
_MOVES = frozenset({
    "concat", "depth_to_space", "expand_dims", "flatten2d", "gather", "gather_along_axis", "gather_nd", "identity",
    "pixel_shuffle", "pixel_unshuffle", "reshape", "reverse", "slice_by_index", "slice_by_size", "space_to_depth", "split",
    "squeeze", "stack", "tile", "transpose",
})  # fmt: skip
# They give back values that they were given: what is on float16's grid stays on it.
_PICKS = _MOVES | {
    "abs", "clip", "max_pool", "maximum", "minimum", "reduce_max", "reduce_min", "relu", "relu6", "select", "threshold", "topk",
}  # fmt: skip
# Their results may be beyond the integers that they are given.
_GROWS = frozenset({
    "add", "cumsum", "mul", "pow", "reduce_l1_norm", "reduce_prod", "reduce_sum", "reduce_sum_square", "square", "sub",
})  # fmt: skip
_INT32 = np.iinfo(np.int32)
# Elements of weights in float16 from which on they are not kept in float32 beside.
_SMALL = 1 << 10
# Of an element of float32, which values are held in.
_BYTES = 4
# Elements of NumPy's buffers: of its usual ones three take 0.1 MB, and are no faster.
_BUFFER = 1 << 10
# Weights that operations themselves widen, some rows at a time.
_ROWS = {("conv", "weight"), ("linear", "weight"), ("matmul", "y")} | {
    (kind, f"weight_{which}") for kind in ("lstm", "gru", "rnn") for which in ("ih", "hh", "ih_back", "hh_back")
}  # fmt: skip
# They take values between two numbers of the type: rounded before or after, these are the same.
_CLIPS = frozenset({"clip", "relu", "relu6"})
_BOUNDS = {"relu": (0.0, np.inf), "relu6": (0.0, 6.0)}
# Of operations that may write over one of them: the result has their common shape.
_OPERANDS = {"x", "y"}
# What is nearer to 0 rounds to no infinity.
_FAR = 2.0**15
_NOTHING: Mapping[str, Any] = MappingProxyType({})
# An end for loops whose condition never fails.
_ROUNDS = 1_000_000

Watch = Callable[[Operation, Mapping[str, Any], list[Any]], None]


def _kinds(block: Block) -> set[str]:
    found = {o.kind for o in block.operations}
    return found.union(*(_kinds(b) for o in block.operations for b in o.blocks))


def unknown(function: Function) -> list[str]:
    """Kinds of operations that the evaluator does not have."""
    return sorted(k for k in _kinds(function.block) if k not in OPERATIONS and k not in (*_CONTROL, "const"))


@dataclass(slots=True, kw_only=True)
class _Step:
    """An operation with what is known of it before it runs.

    Attributes:
        fixed: Arguments that are the same in every run.
        heavy: Weights in float16, and finite, too large to be kept in float32 as well.
        moving: Parameter, names, whether it takes several values.
        wide: Whether floats arrive in float32.
        gone: Values that nobody reads afterwards.
        over: Parameters whose values are among those, and that the result may be written over.
        after: What clips the result, which nobody else reads: it is clipped piece by piece while it is rounded.
    """

    op: Operation
    fixed: Mapping[str, Any]
    heavy: tuple[tuple[str, np.ndarray], ...]
    moving: tuple[tuple[str, tuple[str, ...], bool], ...]
    wide: bool
    gone: tuple[str, ...]
    over: tuple[tuple[str, str], ...]
    after: _Step | None = None


@dataclass(slots=True, kw_only=True)
class _Body:
    """A block as it runs.

    Attributes:
        block: Until it is prepared: of a small program, what it says of its constants is more than they are.
        gone: For each of its operations the values that nobody reads afterwards.
        steps: Once it is prepared.
    """

    block: Block | None
    outputs: list[str]
    gone: list[tuple[str, ...]]
    steps: list[_Step] | None = None


@dataclass(slots=True, kw_only=True)
class _Run:
    """What one run knows, and no other: the same inputs give the same numbers, to the last bit, whatever ran before.

    Attributes:
        largest: Bytes of the largest value that an operation gave, or that the program and the inputs say it will.
    """

    watch: Watch | None
    largest: int

    def room(self, values: Mapping[str, Any]) -> int:
        """Elements that a step may hold beside ``values`` until they are twice the largest of all; less than 0 beyond."""
        wholes = [self._whole(v) for v in values.values() if isinstance(v, np.ndarray)]
        held = sum({id(w): w.nbytes for w in wholes}.values())
        return (2 * self.largest - held) // _BYTES

    def _whole(self, array: np.ndarray) -> np.ndarray:
        """What ``array`` is a part of, and keeps in memory: what an operation gave, which weights and inputs may be larger than."""
        base = array.base
        return base if isinstance(base, np.ndarray) and base.nbytes <= self.largest else array


class Machine:
    """One function of a program, ready to run.

    Constants are read once, compressed ones decompressed, and kept in the type that the program declares. Values are
    forgotten after their last use, which writes over them where it can.

    Attributes:
        inputs: The function's.
        kinds: Of the operations.
        state: What is kept between runs.

    Raises:
        ModelError: It has operations that the evaluator does not know; lists them.
    """

    def __init__(self, function: Function) -> None:
        if missing := unknown(function):
            raise ModelError(f"the reference evaluator does not know the operations {', '.join(missing)}")
        self.inputs = tuple(function.inputs)
        self.kinds = frozenset(_kinds(function.block))
        self._constants: dict[str, Any] = {}
        self._inner: dict[int, _Body] = {}
        self._main, _ = self._plan(function.block, function.inputs)
        self._fixed, self._each = _declared(function.block)
        self._lock = RLock()
        self.state: dict[str, np.ndarray] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what was kept between runs."""
        self.state = {v.name: np.zeros(v.type.shape or (), v.type.dtype) for v in self.inputs if v.type.state}

    def _plan(self, block: Block, inputs: Sequence[Output]) -> tuple[_Body, set[str]]:
        """The block with when each of its values is read for the last time, and the names that it reads from outside."""
        block = replace(block, operations=late(block))
        # Of the block: what it is given, and what its operations give.
        own = {i.name for i in inputs} | {o.name for op in block.operations for o in op.outputs}
        last: dict[str, int] = {}
        outside: set[str] = set()
        for index, op in enumerate(block.operations):
            names = set(op.names)
            for inner in op.blocks:
                self._inner[id(inner)], read = self._plan(inner, inner.inputs)
                names |= read
            for output in op.outputs:
                last.setdefault(output.name, index)
            for name in names:
                if name in own:
                    last[name] = index
                else:
                    outside.add(name)
        gone: list[list[str]] = [[] for _ in block.operations]
        for name, index in last.items():
            if name not in block.outputs:
                gone[index].append(name)
        body = _Body(block=block, outputs=block.outputs, gone=[tuple(names) for names in gone])
        return body, outside | {o for o in block.outputs if o not in own}

    def run(self, feeds: Mapping[str, np.ndarray], watch: Watch | None = None) -> dict[str, Any]:
        """All outputs by name.

        Args:
            feeds: By the names of the function's inputs.
            watch: Called after each operation with its arguments and results.

        Raises:
            DataError: An input is missing, or does not have the declared shape.
            ModelError: An operation fails, or computes another shape than the program declares.
        """
        values: dict[str, Any] = {}
        for port in self.inputs:
            if port.type.state:
                continue
            if port.name not in feeds:
                raise DataError(f"the input {port.name!r} is missing")
            array = np.asarray(feeds[port.name])
            if not port.type.takes(array.shape):
                raise DataError(
                    f"the input {port.name!r} is {list(array.shape)}, the program takes {port.type}"
                )
            values[port.name] = array.astype(port.type.dtype, copy=False)
        run = _Run(watch=watch, largest=self._foreseen(values))
        with np.errstate(all="ignore"), _small_buffers():
            return self._run(self._main, values, run)

    def _foreseen(self, values: Mapping[str, np.ndarray]) -> int:
        """Bytes of the largest value as far as the program and the inputs tell: a free first axis is taken for that of an input."""
        free = [i.name for i in self.inputs if i.type.shape and i.type.shape[0] == -1 and i.name in values]
        several = max((len(values[name]) for name in free), default=1)
        return max(self._fixed, several * self._each, *(v.nbytes for v in values.values()), 0)

    def _block(self, block: Block, values: dict[str, Any], run: _Run) -> dict[str, Any]:
        return self._run(self._inner[id(block)], values, run)

    def _run(self, body: _Body, values: dict[str, Any], run: _Run) -> dict[str, Any]:
        steps = body.steps or self._steps(body)
        # Values whose memory nobody else knows.
        own: set[str] = set()
        rest = iter(steps)
        for step in rest:
            self._operation(step, values, own, run)
            for name in step.gone:
                values.pop(name, None)
            if step.after is not None and run.watch is None:
                next(rest)
        return {name: self._value(name, values) for name in body.outputs}

    def _steps(self, body: _Body) -> list[_Step]:
        """What is prepared by the first run, and waited for by others at that time."""
        with self._lock:
            if body.steps is None:
                steps = self._prepared(body)
                if not self._inner:
                    self._forget(steps, body.outputs)
                body.steps, body.block, body.gone = steps, None, []
            return body.steps

    def _forget(self, steps: Sequence[_Step], outputs: Sequence[str]) -> None:
        """Constants that steps have in their hands, and nobody asks for by name."""
        asked = {name for step in steps for _, names, _ in step.moving for name in names}.union(outputs)
        for step in steps:
            asked.update(step.op.names)
        self._constants = {name: value for name, value in self._constants.items() if name in asked}

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        return values[name] if name in values else self._constants[name]

    def _prepared(self, body: _Body) -> list[_Step]:
        """Read the constants of a block; what is left to do in each run."""
        assert body.block is not None
        steps = []
        for op, gone in zip(body.block.operations, body.gone, strict=True):
            if op.kind == "const":
                self._constants[op.outputs[0].name] = _held(_read(op.attributes["val"]))
            elif op.kind.startswith("constexpr_"):
                arguments = dict(self._step(op, ()).fixed)
                for parameter, value in op.attributes.items():
                    arguments[parameter] = _argument(_read(value))
                for output, value in zip(op.outputs, self._call(op, arguments), strict=True):
                    rounded = _rounded(op, output, _checked(op, output, value), place=False, room=0)
                    # Decompressed it is no larger than the program declares it.
                    narrow = rounded.astype(output.type.dtype, copy=False)
                    self._constants[output.name] = _held(narrow)
            else:
                steps.append(self._step(op, gone))
        for step, after in pairwise(steps):
            clips = after.op.kind in _CLIPS and len(after.moving) == 1 and _is_rounded(step.op)
            if clips and after.over == (("x", step.op.outputs[0].name),):
                step.after = after
        return steps

    def _step(self, op: Operation, gone: tuple[str, ...]) -> _Step:
        wide = op.kind not in _MOVES
        fixed: dict[str, Any] = {}
        heavy, moving, over = [], [], []
        for parameter, bindings in op.inputs.items():
            names = tuple(b.name for b in bindings if isinstance(b, Name))
            several = (op.kind, parameter) in _SEVERAL or len(bindings) != 1
            if all(n in self._constants for n in names):
                found = [
                    self._constants[b.name] if isinstance(b, Name) else _held(_read(b)) for b in bindings
                ]
                if wide and not several and _heavy(found[0]) and not op.kind.startswith("constexpr_"):
                    heavy.append((parameter, found[0]))
                    continue
                given = [_argument(v, wide=wide) for v in found]
                fixed[parameter] = given if several else given[0]
            elif len(names) == len(bindings):
                moving.append((parameter, names, several))
                if op.kind in OVERWRITING and names[0] in gone:
                    over.append((parameter, names[0]))
            else:
                raise ModelError(f"{op}: {parameter!r} mixes names and values")
        gone = tuple(n for n in gone if n not in self._constants)
        # What the program says of arguments is said here.
        told = replace(op, inputs=_NOTHING, attributes=_NOTHING) if op.kind in OPERATIONS else op
        return _Step(
            op=told, fixed=fixed or _NOTHING, heavy=tuple(heavy), moving=tuple(moving), wide=wide, gone=gone,
            over=tuple(over),
        )  # fmt: skip

    def _arguments(self, step: _Step, values: Mapping[str, Any]) -> dict[str, Any]:
        arguments = dict(step.fixed)
        for parameter, array in step.heavy:
            by_rows = (step.op.kind, parameter) in _ROWS
            arguments[parameter] = array if by_rows else wide(array)
        for parameter, names, several in step.moving:
            found = [_argument(self._value(n, values), wide=step.wide) for n in names]
            arguments[parameter] = found if several else found[0]
        if step.op.kind in _GROWS and step.op.outputs[0].type.dtype == np.int32:
            # So that it shows where the result does not fit.
            arguments |= {k: v.astype(np.int64) for k, v in arguments.items() if isinstance(v, np.ndarray)}
        return arguments

    def _call(self, op: Operation, arguments: dict[str, Any]) -> list[Any]:
        with _named(op):
            results = OPERATIONS[op.kind](**arguments)
        return results if isinstance(results, list) else [results]

    def _compute(self, step: _Step, values: dict[str, Any], own: set[str], run: _Run) -> None:
        """An operation of the table, and what clips its result."""
        op, watch = step.op, run.watch
        arguments = self._arguments(step, values)
        # Who watches sees every operation, and arguments as they were.
        over, after = (_over(step, arguments, own), step.after) if watch is None else ({}, None)
        room = run.room(values)
        results = self._call(op, arguments | over | ({"room": room} if op.kind in ROOMY else {}))
        given = [a for v in arguments.values() for a in (v if isinstance(v, list) else [v])]
        arrays = [a for a in given if isinstance(a, np.ndarray)]
        found = []
        for output, result in zip(op.outputs, results, strict=False):
            array = _checked(op, output, result)
            fresh = array.flags.writeable and not any(np.may_share_memory(array, a) for a in arrays)
            fresh = fresh or (bool(over) and array is over["out"])
            run.largest = max(run.largest, array.nbytes)
            room -= 0 if over else array.size
            if after is not None:
                output = after.op.outputs[0]
                found.append(_clipped(after, _checked(after.op, output, array), place=fresh, room=room))
                fresh = True
            else:
                found.append(_rounded(op, output, array, place=fresh, room=room))
            if not fresh:
                names = {n for _, several, _ in step.moving for n in several}
                seen = {n for n in names if _shares(array, self._value(n, values))}
                # A view of what dies now, and of nothing that stays, takes over its memory.
                dies = bool(seen) and seen <= own.intersection(step.gone)
                fresh = (
                    dies and array.flags.writeable and not any(_shares(array, v) for v in step.fixed.values())
                )
                own -= seen
            if fresh and len(results) == 1:
                own.add(output.name)
        if watch is not None:
            watch(op, arguments, found)
        for output, value in zip(op.outputs if after is None else after.op.outputs, found, strict=True):
            values[output.name] = value

    def _operation(self, step: _Step, values: dict[str, Any], own: set[str], run: _Run) -> None:
        op = step.op
        if op.blocks:
            # They may give back what they read.
            own.clear()
        if op.kind in OPERATIONS:
            self._compute(step, values, own, run)
            return
        if op.kind == "read_state":
            found = [self.state[op.inputs["input"][0].name].copy()]
        elif op.kind == "write_state":
            name = op.inputs["input"][0].name
            written = self._value(op.inputs["data"][0].name, values)
            self.state[name] = np.array(written, self.state[name].dtype)
            return
        elif op.kind == "cond":
            chosen = op.blocks[0 if bool(self._value(op.inputs["pred"][0].name, values)) else 1]
            results = self._block(chosen, dict(values), run)
            found = [results[name] for name in chosen.outputs]
        elif op.kind == "while_loop":
            found = self._loop(op, values, run)
        else:
            found = self._classify(op, values)
        for output, value in zip(op.outputs, found, strict=True):
            values[output.name] = value

    def _loop(self, op: Operation, values: dict[str, Any], run: _Run) -> list[Any]:
        condition, body = op.blocks
        carried = [self._value(b.name, values) for b in op.inputs["loop_vars"]]
        for _ in range(_ROUNDS):
            inner = dict(values) | {i.name: v for i, v in zip(condition.inputs, carried, strict=True)}
            if not bool(next(iter(self._block(condition, inner, run).values()))):
                return carried
            inner = dict(values) | {i.name: v for i, v in zip(body.inputs, carried, strict=True)}
            results = self._block(body, inner, run)
            carried = [results[name] for name in body.outputs]
        raise ModelError(f"{op} goes on after {_ROUNDS} rounds")

    def _classify(self, op: Operation, values: dict[str, Any]) -> list[Any]:
        scores = np.asarray(self._value(op.inputs["probabilities"][0].name, values)).reshape(-1)
        bound = op.inputs["classes"][0]
        classes = self._value(bound.name, values) if isinstance(bound, Name) else _read(bound)
        names = [v if isinstance(v, str) else np.asarray(v).item() for v in classes]
        return [names[int(np.argmax(scores))], dict(zip(names, scores.tolist(), strict=True))]


def _declared(block: Block) -> tuple[int, int]:
    """Bytes in float32 of the largest value of fixed sizes, and of the largest with a free first axis for each of its elements."""
    shapes = [o.type.shape or () for op in block.operations if not op.is_constant for o in op.outputs]
    fixed = [_BYTES * math.prod(s) for s in shapes if -1 not in s]
    each = [_BYTES * math.prod(s[1:]) for s in shapes if s and s[0] == -1 and -1 not in s[1:]]
    return max(fixed, default=0), max(each, default=0)


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, Lazy) else value


def _heavy(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.float16 and value.size > _SMALL


def _held(value: Any) -> Any:
    """A constant as it is kept: in float32 at once where it is small, or not finite, which those who widen it count on."""
    return _argument(value, wide=not (_heavy(value) and is_finite(value)))


def _argument(value: Any, *, wide: bool = True) -> Any:
    """As operations take it: floats in float32 unless ``wide`` is off, single values as Python's."""
    if not isinstance(value, np.ndarray):
        if not isinstance(value, np.generic):
            return value
        value = np.asarray(value)
    if wide and value.dtype == np.float16:
        value = widened(value)
    return value.item() if value.ndim == 0 else value


def _over(step: _Step, arguments: Mapping[str, Any], own: set[str]) -> dict[str, np.ndarray]:
    """The argument that the result is written over, as ``out``; nothing where there is none of its type and size."""
    for parameter, name in step.over:
        array = arguments[parameter]
        if (
            name in own
            and isinstance(array, np.ndarray)
            and array.dtype == np.float32
            and step.op.outputs[0].type.dtype in (np.float16, np.float32)
            and array.shape
            == np.broadcast_shapes(*(np.shape(arguments[k]) for k in _OPERANDS & arguments.keys()))
        ):
            return {"out": array}
    return {}


def _shares(array: np.ndarray, other: Any) -> bool:
    return isinstance(other, np.ndarray) and np.may_share_memory(array, other)


def _is_rounded(op: Operation) -> bool:
    """Whether it has one result, which is rounded to float16."""
    rounds = op.kind in OPERATIONS and op.kind not in _PICKS and not op.blocks
    return rounds and len(op.outputs) == 1 and op.outputs[0].type.dtype == np.float16


def _clipped(step: _Step, array: np.ndarray, *, place: bool, room: int) -> np.ndarray:
    """``array`` clipped and rounded to float16, in its place where that may be."""
    clip = partial(OPERATIONS[step.op.kind], **step.fixed)
    low, high = _BOUNDS.get(step.op.kind) or (
        step.fixed.get(k, end) for k, end in (("alpha", -np.inf), ("beta", np.inf))
    )
    with _named(step.op):
        return halves(
            array,
            place=place,
            clip=clip,
            positive=bool(low >= 0),
            small=bool(low > -_FAR and high < _FAR),
            room=room,
        )


@contextmanager
def _small_buffers() -> Iterator[None]:
    """NumPy's own, which it makes for arrays that do not lie in one piece, whether it then uses them or not."""
    before = np.setbufsize(_BUFFER)
    try:
        yield
    finally:
        np.setbufsize(before)


@contextmanager
def _named(op: Operation) -> Iterator[None]:
    """Mistakes of a program become errors that name the operation."""
    try:
        yield
    except TypeError as error:
        raise ModelError(f"{op}: {error}") from error
    except (ValueError, IndexError, AssertionError, KeyError) as error:
        raise ModelError(f"{op} cannot be computed: {type(error).__name__}: {error}") from error


def _checked(op: Operation, output: Output, value: Any) -> np.ndarray:
    """``value``, whose shape must be the declared one."""
    array = np.asarray(value)
    if not array.size:
        raise ModelError(
            f"{op}: {output.name!r} comes out as {list(array.shape)}, and Core ML has no tensors without elements",
            hint="the inputs may be too small for the model: give --calib, or the sizes as options.shapes",
        )
    if not output.type.takes(array.shape):
        raise ModelError(
            f"{op}: {output.name!r} comes out as {list(array.shape)}, the program declares {output.type}"
        )
    if op.kind in _GROWS and output.type.dtype == np.int32:
        low, high = array.min(), array.max()
        if low < _INT32.min or high > _INT32.max:
            raise ModelError(
                f"{op} gives integers beyond 32 bits ({low} to {high}), and Core ML has none",
                hint="it is called after its value in the model: compute that in float32, or keep it smaller",
            )
    return array


def _rounded(op: Operation, output: Output, array: np.ndarray, *, place: bool, room: int) -> np.ndarray:
    """``array`` in the declared type.

    Args:
        place: Whether the result may take its place.
        room: Elements that may be held beside.
    """
    if output.type.dtype != np.float16:
        return array.astype(output.type.dtype, copy=False)
    return array if op.kind in _PICKS else halves(array, place=place, room=room)
