"""Runs a program: resolves names, calls operations, rounds to the declared types, checks the declared shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from optkit.backends.coreml.reference.ops import OPERATIONS
from optkit.backends.coreml.reference.program import Block, Function, Lazy, Name, Operation, Output, Type
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
# An end for loops whose condition never fails.
_ROUNDS = 1_000_000

Watch = Callable[[Operation, Mapping[str, Any], list[Any]], None]


def unknown(function: Function) -> list[str]:
    """Kinds of operations that the evaluator does not have."""

    def kinds(block: Block) -> set[str]:
        found = {o.kind for o in block.operations}
        return found.union(*(kinds(b) for o in block.operations for b in o.blocks))

    return sorted(k for k in kinds(function.block) if k not in OPERATIONS and k not in (*_CONTROL, "const"))


class Machine:
    """One function of a program, ready to run.

    Constants are read once; compressed ones are kept as they are computed with. Values are forgotten after their last use.

    Raises:
        ModelError: It has operations that the evaluator does not know; lists them.
    """

    def __init__(self, function: Function) -> None:
        if missing := unknown(function):
            raise ModelError(f"the reference evaluator does not know the operations {', '.join(missing)}")
        self.function = function
        self._constants: dict[str, Any] = {}
        self._last: dict[int, list[list[str]]] = {}
        self._plan(function.block, keep=set(function.block.outputs))
        self.state: dict[str, np.ndarray] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what was kept between runs."""
        self.state = {
            v.name: np.zeros(v.type.shape or (), v.type.dtype) for v in self.function.inputs if v.type.state
        }

    def _plan(self, block: Block, keep: set[str]) -> set[str]:
        """After which operation each value of the block was read for the last time; the names that it reads from outside."""
        own = {o.name for op in block.operations for o in op.outputs}
        last: dict[str, int] = {}
        outside: set[str] = set()
        for index, op in enumerate(block.operations):
            names = {b.name for values in op.inputs.values() for b in values if isinstance(b, Name)}
            for inner in op.blocks:
                bound = {i.name for i in inner.inputs}
                names |= self._plan(inner, set(inner.outputs)) - bound
            for output in op.outputs:
                last.setdefault(output.name, index)
            for name in names:
                if name in own:
                    last[name] = index
                else:
                    outside.add(name)
        gone: list[list[str]] = [[] for _ in block.operations]
        for name, index in last.items():
            if name not in keep:
                gone[index].append(name)
        self._last[id(block)] = gone
        return outside | {o for o in block.outputs if o not in own}

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
        for port in self.function.inputs:
            if port.type.state:
                continue
            if port.name not in feeds:
                raise DataError(f"the input {port.name!r} is missing")
            array = np.asarray(feeds[port.name])
            if not _fits(array.shape, port.type.shape):
                raise DataError(
                    f"the input {port.name!r} is {list(array.shape)}, the program takes {port.type}"
                )
            values[port.name] = array.astype(port.type.dtype, copy=False)
        with np.errstate(all="ignore"):
            return self._block(self.function.block, values, watch)

    def _block(self, block: Block, values: dict[str, Any], watch: Watch | None) -> dict[str, Any]:
        gone = self._last[id(block)]
        for index, op in enumerate(block.operations):
            if op.kind == "const" or op.kind.startswith("constexpr_"):
                self._constant(op, values)
            else:
                self._operation(op, values, watch)
            for name in gone[index]:
                values.pop(name, None)
        return {name: values[name] for name in block.outputs}

    def _constant(self, op: Operation, values: dict[str, Any]) -> None:
        if op.outputs[0].name not in self._constants:
            if op.kind == "const":
                found = [_read(op.attributes["val"])]
            else:
                found = self._call(op, self._arguments(op, values))
            for output, value in zip(op.outputs, found, strict=True):
                self._constants[output.name] = value
        for output in op.outputs:
            values[output.name] = self._constants[output.name]

    def _arguments(self, op: Operation, values: dict[str, Any]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for parameter, bindings in op.inputs.items():
            found = [values[b.name] if isinstance(b, Name) else _read(b) for b in bindings]
            several = (op.kind, parameter) in _SEVERAL or len(found) != 1
            wide = op.kind not in _MOVES
            arguments[parameter] = (
                [_argument(v, wide=wide) for v in found] if several else _argument(found[0], wide=wide)
            )
            if wide and not several and isinstance(bindings[0], Name) and bindings[0].name in self._constants:
                # Weights are computed with again in the next run.
                self._constants[bindings[0].name] = values[bindings[0].name] = arguments[parameter]
        if op.kind.startswith("constexpr_"):
            for parameter, value in op.attributes.items():
                if parameter != "name":
                    arguments[parameter] = _argument(_read(value))
        return arguments

    def _call(self, op: Operation, arguments: dict[str, Any]) -> list[Any]:
        try:
            results = OPERATIONS[op.kind](**arguments)
        except TypeError as error:
            raise ModelError(f"{op}: {error}") from error
        except (ValueError, IndexError, AssertionError, KeyError) as error:
            raise ModelError(f"{op} cannot be computed: {type(error).__name__}: {error}") from error
        found = results if isinstance(results, list) else [results]
        return [_rounded(op, o, v) for o, v in zip(op.outputs, found, strict=False)]

    def _operation(self, op: Operation, values: dict[str, Any], watch: Watch | None) -> None:
        if op.kind == "read_state":
            name = op.inputs["input"][0].name
            found: list[Any] = [self.state[name].copy()]
        elif op.kind == "write_state":
            name = op.inputs["input"][0].name
            written = values[op.inputs["data"][0].name]
            self.state[name] = np.array(written, self.state[name].dtype)
            return
        elif op.kind == "cond":
            chosen = op.blocks[0 if bool(values[op.inputs["pred"][0].name]) else 1]
            found = list(self._block(chosen, dict(values), watch).values())
        elif op.kind == "while_loop":
            found = self._loop(op, values, watch)
        elif op.kind == "classify":
            found = self._classify(op, values)
        else:
            arguments = self._arguments(op, values)
            found = self._call(op, arguments)
            if watch is not None:
                watch(op, arguments, found)
        for output, value in zip(op.outputs, found, strict=True):
            values[output.name] = value

    def _loop(self, op: Operation, values: dict[str, Any], watch: Watch | None) -> list[Any]:
        condition, body = op.blocks
        carried = [values[b.name] for b in op.inputs["loop_vars"]]
        for _ in range(_ROUNDS):
            inner = dict(values) | {i.name: v for i, v in zip(condition.inputs, carried, strict=True)}
            if not bool(next(iter(self._block(condition, inner, watch).values()))):
                return carried
            inner = dict(values) | {i.name: v for i, v in zip(body.inputs, carried, strict=True)}
            results = self._block(body, inner, watch)
            carried = [results[name] for name in body.outputs]
        raise ModelError(f"{op} goes on after {_ROUNDS} rounds")

    def _classify(self, op: Operation, values: dict[str, Any]) -> list[Any]:
        scores = np.asarray(values[op.inputs["probabilities"][0].name]).reshape(-1)
        classes = _read(op.inputs["classes"][0])
        names = [v if isinstance(v, str) else np.asarray(v).item() for v in classes]
        return [names[int(np.argmax(scores))], dict(zip(names, scores.tolist(), strict=True))]


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, Lazy) else value


def _argument(value: Any, *, wide: bool = True) -> Any:
    """As operations take it: floats in float32 unless ``wide`` is off, single values as Python's."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    array = np.asarray(value)
    if wide and array.dtype == np.float16:
        array = array.astype(np.float32)
    return array.item() if array.ndim == 0 else array


def _fits(shape: tuple[int, ...], declared: tuple[int, ...] | None) -> bool:
    return declared is None or (
        len(shape) == len(declared) and all(d in (-1, n) for n, d in zip(shape, declared, strict=True))
    )


def _rounded(op: Operation, output: Output, value: Any) -> Any:
    """``value`` in the declared type; the declared shape must be its own."""
    kind: Type = output.type
    array = np.asarray(value)
    if not array.size:
        raise ModelError(
            f"{op}: {output.name!r} comes out as {list(array.shape)}, and Core ML has no tensors without elements",
            hint="the inputs may be too small for the model: give --calib, or the sizes as options.shapes",
        )
    if not _fits(array.shape, kind.shape):
        raise ModelError(
            f"{op}: {output.name!r} comes out as {list(array.shape)}, the program declares {kind}"
        )
    if kind.dtype != np.float16:
        return array.astype(kind.dtype, copy=False)
    return array if op.kind in _PICKS else halves(array)


# In float32: the bits that float16 has no room for, the smallest of its numbers with all bits, and the first that is infinite.
_DROPPED, _NORMAL, _INFINITE = np.uint32(0x1FFF), np.uint32(0x38800000), np.uint32(0x477FF000)


def halves(array: np.ndarray) -> np.ndarray:
    """Rounded to float16's numbers, to nearest with ties to even, and kept in float32, which is what is computed with.

    Converting there and back one element at a time took more than the arithmetic; here the bits of all are rounded at once.
    """
    wide = np.ascontiguousarray(array, np.float32)
    bits = wide.view(np.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    if size.max(initial=0) >= _INFINITE:
        return wide.astype(np.float16).astype(np.float32)
    found = bits >> np.uint32(13)
    found &= np.uint32(1)
    found += _DROPPED >> np.uint32(1)
    found += bits
    found &= ~_DROPPED
    result = found.view(np.float32)
    # 0 becomes the largest integer, and is no small number.
    size -= np.uint32(1)
    small = size < _NORMAL - np.uint32(1)
    if small.any():
        result[small] = wide[small].astype(np.float16)
    return result
