"""Floats that float16 does not hold well enough: what is rounded to whole numbers, and angles that these make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optkit.backends.coreml.quiet import types

# Whose outputs are as large as these inputs say.
_BY_NUMBERS = {
    "fill": ("shape",), "one_hot": ("one_hot_vector_size",), "pad": ("pad",), "range_1d": ("start", "end", "step"),
    "reshape": ("shape",), "resize": ("shape",), "slice_by_index": ("begin", "end"), "slice_by_size": ("size",), "tile": ("reps",),
}  # fmt: skip


def counted(function: Any) -> set[Any]:
    """The operations of a program's function that such floats come from, all the way.

    Those are, say, how many frames a syllable lasts. In float16 they would not blur the outputs, they would make them longer or
    shorter. What is compared and then counted is left out, such as scores of boxes: each is a decision of its own, and few are
    close.
    """
    ops = list(_all(function))
    # By what the bodies of a loop read, what it begins with.
    begins = {
        inner: value
        for op in ops
        if op.op_type == "while_loop"
        for block in op.blocks
        for inner, value in zip(block.inputs, op.loop_vars, strict=True)
    }
    # Numbers, and whether they are floats that are rounded later.
    open_ = [
        (v, False)
        for op in ops
        for name in _BY_NUMBERS.get(op.op_type, ())
        for v in _values(op.inputs.get(name))
    ]
    found, seen = set[Any](), set(open_)
    while open_:
        value, rounded = open_.pop()
        op = value.op
        if op is not None and op.op_type == "shape":
            continue
        if rounded and op is not None:
            found.add(op)
        rounded = rounded or (op is not None and op.op_type == "cast" and types.is_float(op.x.dtype))
        before = [
            (v, rounded)
            for v in _before(value, begins)
            if v.val is None and (rounded or types.is_int(v.dtype))
        ]
        open_ += [v for v in dict.fromkeys(before) if v not in seen]
        seen.update(before)
    return found


# What lies between floats and the whole numbers that they are rounded to, and between those and floats again.
_TO_WHOLE = frozenset({"ceil", "floor", "mul", "real_div", "round"})
_WHOLE = frozenset({"expand_dims", "reshape", "squeeze"})


def regained(function: Any) -> set[Any]:
    """The operations between floats and the whole numbers that they are rounded to, where those become floats again.

    Such are biases of sums of integers, with scales that are computed in each run. Floats of 16 bits miss whole numbers from 2049 on
    and end at 65504, while a product of two scales is soon below the least of them. What whole numbers are multiplied by, as floats
    again, belongs to it.
    """
    found = set[Any]()
    for op in _all(function):
        if op.op_type != "cast" or not types.is_float(op.x.dtype) or not types.is_int(op.outputs[0].dtype):
            continue
        casts = [c for c in _after(op, _WHOLE) if c.op_type == "cast" and types.is_float(c.outputs[0].dtype)]
        if casts:
            found.update(_made_of(op))
            found.update(casts)
            found.update(c for cast in casts for c in cast.outputs[0].child_ops if c.op_type == "mul")
    return found


# What lies between positions or steps of time and the angles that frequencies make of them.
_TO_ANGLE = frozenset({
    "add", "concat", "expand_dims", "matmul", "mul", "real_div", "reshape", "squeeze", "sub", "tile", "transpose",
})  # fmt: skip
_CIRCULAR = ("cos", "sin", "tan")


def angles(function: Any) -> set[Any]:
    """Sines and cosines of multiples of whole numbers or of inputs, with the operations that make these multiples.

    Position 1000 times a frequency of 1 is off by up to a quarter of a radian in float16: of a rotary embedding or the embedding of a
    step of diffusion nothing is left. What a network computed itself is left out, such as the argument of a periodic activation.
    """
    found = set[Any]()
    for op in _all(function):
        if op.op_type not in _CIRCULAR:
            continue
        way, told = [op], False
        for one in way:
            for value in (v for given in one.inputs.values() for v in _values(given) if v.val is None):
                before = value.op
                told = told or before is None or (before.op_type == "cast" and types.is_int(before.x.dtype))
                if before is not None and before.op_type in _TO_ANGLE and before not in way:
                    way.append(before)
        if told:
            found.update(way)
    return found


def _after(op: Any, kinds: frozenset[str]) -> list[Any]:
    """What reads the outputs of an operation, also through operations of ``kinds``."""
    found = [op]
    for one in found:
        if one is op or one.op_type in kinds:
            found += [child for output in one.outputs for child in output.child_ops]
    return found[1:]


def _made_of(op: Any) -> list[Any]:
    """An operation and what it is computed from, as far as that leads to whole numbers."""
    found = [op]
    for one in found:
        inputs = [v for given in one.inputs.values() for v in _values(given)]
        found += [
            v.op
            for v in inputs
            if v.val is None and v.op is not None and v.op.op_type in _TO_WHOLE and v.op not in found
        ]
    return found


def _before(value: Any, begins: Mapping[Any, Any]) -> list[Any]:
    """What a value is computed from."""
    op = value.op
    if op is None:
        return [begins[value]] if value in begins else []
    if op.op_type in ("cond", "while_loop"):
        place = op.outputs.index(value)
        bodies = [b.outputs[place] for b in op.blocks[op.op_type == "while_loop" :]]
        return bodies if op.op_type == "cond" else [op.loop_vars[place], *bodies]
    return [v for given in op.inputs.values() for v in _values(given)]


def _values(given: Any) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def _all(block: Any) -> Iterator[Any]:
    """The operations of a block, with those of the blocks inside."""
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _all(inner)
