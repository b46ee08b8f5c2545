"""Control flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import Context, emits, like, refused, static, through_ints, unchecked
from optkit.backends.coreml.quiet import mb, types
from optkit.dims import shape_of
from optkit.graph import constant, ints, rank, scalar, subgraphs


def _refuse_if(node: ir.Node) -> str | None:
    for place, (then, other) in enumerate(_outputs(node)):
        if then.dtype != other.dtype:
            return f"its branches give {then.name!r} as {then.dtype} and {other.name!r} as {other.dtype}"
        before, after = rank(then), rank(other)
        if before is None or after is None or before == after:
            continue
        # A condition of sizes is known once the inputs have theirs, and one branch is left.
        if not _of_sizes(node.inputs[0]) and _one_rank(node, place) is None:
            return _RANKS
    return None


_RANKS = "its branches give tensors of different rank"


def _of_sizes(value: ir.Value | None) -> bool:
    """Whether a value depends on nothing but the sizes of others."""
    node = None if value is None else value.producer()
    if node is None or any(True for _ in subgraphs(node)):
        return value is None or constant(value) is not None
    return node.op_type in ("Shape", "Size") or all(_of_sizes(v) for v in node.inputs)


# Of whose inputs the one with most axes says how many the output has.
_BROADCASTING = frozenset({
    "Add", "And", "Cast", "Div", "Equal", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mul", "Neg",
    "Not", "Or", "Sub", "Where", "Xor",
})  # fmt: skip


def _one_rank(node: ir.Node, place: int) -> int | None:
    """The rank that both results of an If may have: of single elements, where those who read them have as many axes anyway."""
    shapes = [shape_of(v) for v in _outputs(node)[place]]
    if any(s is None or any(d != 1 for d in s) for s in shapes):
        return None
    axes = max(len(s or ()) for s in shapes)
    return axes if _is_spread(node.outputs[place], axes) else None


def _is_spread(value: ir.Value, axes: int) -> bool:
    """Whether, wherever a value is read, another one has as many axes, so that nobody sees how many it has itself."""
    return not value.is_graph_output() and all(
        use.node.op_type in _BROADCASTING
        and (
            any(v is not None and v is not value and (rank(v) or 0) >= axes for v in use.node.inputs)
            or _is_spread(use.node.outputs[0], axes)
        )
        for use in value.uses()
    )


def _outputs(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """Of both branches, side by side."""
    then, other = _branches(node)
    return list(zip(then.outputs, other.outputs, strict=True))


def _branches(node: ir.Node) -> tuple[ir.Graph, ir.Graph]:
    return node.attributes["then_branch"].as_graph(), node.attributes["else_branch"].as_graph()


def _single(c: Context, x: Any, axes: int) -> Any:
    """An element with so many axes."""
    if x.rank == axes:
        return mb.identity(x=x)
    return c.reshape(x, [1] * axes) if axes else through_ints(x, lambda v: mb.squeeze(x=v))


@emits("If", refuse=_refuse_if)
def _if(c: Context, node: ir.Node) -> Any:
    then, other = _branches(node)
    known = c.known(node, 0)
    if known is not None:
        return c.body(c, then if bool(np.asarray(known).reshape(-1)[0]) else other)
    axes = {i: _one_rank(node, i) for i, (a, b) in enumerate(_outputs(node)) if rank(a) != rank(b)}
    if None in axes.values():
        raise refused(node, f"{_RANKS}, and the sizes leave open which it is")
    condition = c.input(node, 0)
    if condition.rank:
        condition = mb.squeeze(x=condition)

    def branch(graph: ir.Graph) -> Any:
        def emit() -> Any:
            found = [
                mb.identity(x=v) if (n := axes.get(i)) is None else _single(c, v, n)
                for i, v in enumerate(c.call(graph))
            ]
            return tuple(found) if len(found) > 1 else found[0]

        return emit

    return mb.cond(pred=condition, _true_fn=branch(then), _false_fn=branch(other))


def _refuse_loop(node: ir.Node) -> str | None:
    body = node.attributes["body"].as_graph()
    if _collects(node) and not (node.inputs[0] is not None and _of_sizes(node.inputs[0])):
        return "its scan outputs: Core ML has no tensors that grow, and how many steps it has depends on data"
    for value, given, made in zip(body.inputs[2:], node.inputs[2:], body.outputs[1:], strict=False):
        before, after = rank(given), rank(made)
        if before is None or after is None or before == after or (_unread(value) and _begins(node)):
            continue
        return f"it carries {value.name!r} with {before} axes into its first step and {after} into the next"
    if node.inputs[0] is None and _stays_true(body):
        return "it has neither a count nor a condition that changes, and never ends"
    return None


def _collects(node: ir.Node) -> bool:
    """Whether a Loop has outputs with what each of its steps gives."""
    return len(node.attributes["body"].as_graph().outputs) - 1 > len(node.inputs) - 2


def _unread(value: ir.Value) -> bool:
    return not value.is_graph_output() and not any(True for _ in value.uses())


def _begins(node: ir.Node) -> bool:
    """Whether the first step of a Loop is made for certain."""
    times, condition = (constant(v) for v in node.inputs[:2])
    return (node.inputs[0] is None or (times is not None and bool((times > 0).all()))) and (
        node.inputs[1] is None or (condition is not None and bool(condition.all()))
    )


def _stays_true(body: ir.Graph) -> bool:
    """Whether the condition of a Loop comes out as it went in, or as a constant that holds."""
    condition = body.outputs[0]
    while (node := condition.producer()) is not None and node.op_type == "Identity":
        assert node.inputs[0] is not None
        condition = node.inputs[0]
    held = constant(condition)
    return condition is body.inputs[1] or (held is not None and bool(held.all()))


@emits("Loop", refuse=_refuse_loop)
def _loop(c: Context, node: ir.Node) -> Any:
    """A while loop over the count, the condition and the carried values that change.

    Where a value is carried that no step reads, what the first begins with need not be of the type that it leaves: that step is
    written out before the loop.
    """
    if _collects(node):
        return _written_out(c, node)
    body = node.attributes["body"].as_graph()
    start = c.input(node, 1)
    if start is None:
        start = mb.const(val=np.bool_(True))
    start = mb.squeeze(x=start) if start.rank else start
    given = [c.input(node, i) for i in range(2, len(node.inputs))]
    changing = [
        i
        for i, (value, made) in enumerate(zip(body.inputs[2:], body.outputs[1:], strict=True))
        if value is not made
    ]
    if not changing:
        raise refused(node, "it carries no values that change")
    bound = _most_steps(c, node)

    def goes_on(step: Any, alive: Any, *_: Any) -> Any:
        return mb.logical_and(x=alive, y=mb.less(x=step, y=bound))

    def once(step: Any, alive: Any, *values: Any) -> Any:
        carried = list(given)
        for i, variable in zip(changing, values, strict=True):
            carried[i] = variable
        again, *after = c.call(body, (step, alive, *carried))
        again = mb.squeeze(x=again) if again.rank else again
        after = [_as_before(c, node, i, after[i], carried[i]) for i in changing]
        return (mb.add(x=step, y=np.int32(1)), mb.identity(x=again), *after)

    first: Any = (
        mb.const(val=np.int32(0)),
        mb.identity(x=start) if start.dtype == types.bool else start,
        *(given[i] for i in changing),
    )
    if any(_unread(body.inputs[2 + i]) for i in changing) and _begins(node):
        first = once(*first)
    results = mb.while_loop(_cond=goes_on, _body=once, loop_vars=first)
    found = list(given)
    for i, variable in zip(changing, results[2:], strict=True):
        found[i] = variable
    return found


def _most_steps(c: Context, node: ir.Node) -> Any:
    """How many steps the count of a Loop allows: a number, or a variable."""
    largest = np.iinfo(np.int32).max
    if node.inputs[0] is None:
        return np.int32(largest)
    if (limit := scalar(node.inputs[0])) is not None:
        return np.int32(min(limit, largest))
    count = c.input(node, 0)
    return mb.squeeze(x=count) if count.rank else count


def _as_before(c: Context, node: ir.Node, i: int, variable: Any, before: Any) -> Any:
    """What a step of a Loop leaves of its carried value ``i``, with as many axes as it began with."""
    value = node.attributes["body"].as_graph().inputs[2 + i]
    if variable.rank == before.rank or _unread(value):
        variable = mb.identity(x=variable) if variable.op is None else variable
        if variable.val is None:
            # The builder gives symbols to what it concatenates, others in each step, and takes them for another constant.
            variable._sym_val = None
        return variable
    axes = max(variable.rank, before.rank)
    single = static(variable) in ([], [1] * variable.rank)
    if not single or not all(_is_spread(v, axes) for v in (value, node.outputs[i])):
        raise refused(
            node,
            f"it carries {value.name!r} with {before.rank} axes into a step and {variable.rank} into the next",
        )
    return _single(c, variable, before.rank)


# Beyond, the program has more operations than anything gains from.
_LONGEST = 1024


def _written_out(c: Context, node: ir.Node) -> Any:
    """A Loop step after step, where the sizes tell how many it has: what they give is put together at its end."""
    body = node.attributes["body"].as_graph()
    limit = c.known(node, 0)
    alive: Any = True if node.inputs[1] is None else c.input(node, 1).val
    carried = [c.input(node, i) for i in range(2, len(node.inputs))]
    found: list[list[Any]] = [[] for _ in body.outputs[1 + len(carried) :]]
    step = 0
    while alive is not None and limit is not None and alive and step < int(limit.reshape(-1)[0]):
        if step == _LONGEST:
            raise refused(node, f"it has more than {_LONGEST} steps, and each is written out")
        given = (mb.const(val=np.int32(step)), mb.const(val=np.bool_(True)), *carried)
        again, *results = c.call(body, given)
        carried, made = results[: len(carried)], results[len(carried) :]
        for some, one in zip(found, made, strict=True):
            some.append(one)
        alive, step = again.val, step + 1
    if alive is None or limit is None:
        raise refused(node, "how many steps it has depends on data, and Core ML has no tensors that grow")
    if not step:
        raise refused(node, "it has no steps")
    return [*carried, *(_stack(some, 0) for some in found)]


@emits("Scan")
def _scan(c: Context, node: ir.Node) -> Any:
    """Written out step after step where these are few, and else a loop: Core ML has no tensors that grow, but sizes tell how long they get."""
    body = node.attributes["body"].as_graph()
    count = node.attributes.get_int("num_scan_inputs", 1)
    carried, scanned = c.inputs(node)[:-count], c.inputs(node)[-count:]
    kept = len(body.outputs) - len(carried)
    zeros = [0] * max(count, kept)
    axes, ways = (ints(node, f"scan_input_{what}", zeros[:count]) for what in ("axes", "directions"))
    ends, turns = (ints(node, f"scan_output_{what}", zeros[:kept]) for what in ("axes", "directions"))
    assert axes is not None and ways is not None and ends is not None and turns is not None
    steps = scanned[0].shape[axes[0]]
    if not isinstance(steps, int | np.integer) or steps > _LONGEST:
        return _scan_in_a_loop(c, node, body, list(carried), scanned, (axes, ways, ends, turns))
    found: list[list[Any]] = [[] for _ in range(kept)]
    for step in range(int(steps)):
        parts = [
            _part(x, axis, int(steps) - 1 - step if way else step)
            for x, axis, way in zip(scanned, axes, ways, strict=True)
        ]
        results = c.call(body, (*carried, *parts))
        carried, made = results[: len(carried)], results[len(carried) :]
        for some, one in zip(found, made, strict=True):
            some.append(one)
    stacked = [
        _stack(some[::-1] if turn else some, axis)
        for some, axis, turn in zip(found, ends, turns, strict=True)
    ]
    return [*carried, *stacked]


def _scan_in_a_loop(
    c: Context, node: ir.Node, body: ir.Graph, carried: list[Any], scanned: Sequence[Any],
    along: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]],
) -> Any:  # fmt: skip
    """The first step, which tells the shapes of what the steps give, and a loop that writes that of the others into zeros."""
    axes, ways, ends, turns = along
    size = c.sizes(scanned[0])[axes[0]]
    count = np.int32(size) if isinstance(size, int) else mb.squeeze(x=size, axes=[0])
    final = mb.sub(x=count, y=np.int32(1))

    def step(t: Any, states: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        back = mb.sub(x=final, y=t)
        parts = [
            _row(c, x, axis, back if way else t) for x, axis, way in zip(scanned, axes, ways, strict=True)
        ]
        results = c.call(body, (*states, *parts))
        return results[: len(states)], results[len(states) :]

    def written(t: Any, found: Sequence[Any], made: Sequence[Any]) -> list[Any]:
        places = [mb.expand_dims(x=mb.sub(x=final, y=t) if turn else t, axes=[0]) for turn in turns]
        return [
            mb.scatter(data=f, indices=p, updates=mb.expand_dims(x=m, axes=[0]), axis=0, mode="update", **unchecked(c))
            for f, p, m in zip(found, places, made, strict=True)
        ]  # fmt: skip

    begin = mb.const(val=np.int32(0))
    states, made = step(begin, carried)
    if odd := [v for v in (*states, *made) if v.dtype == types.bool]:
        raise refused(
            node, f"how many steps it has is not fixed, and {len(odd)} of what they give are booleans"
        )
    zeros = [mb.fill(shape=c.shape([size, *c.sizes(m)]), value=like(m, 0)) for m in made]
    found = written(begin, zeros, made)

    def goes_on(t: Any, *_: Any) -> Any:
        return mb.less(x=t, y=count)

    def once(t: Any, *values: Any) -> Any:
        states, made = step(t, values[: len(carried)])
        return mb.add(x=t, y=np.int32(1)), *states, *written(t, values[len(carried) :], made)

    first = (mb.const(val=np.int32(1)), *(mb.identity(x=s) for s in states), *found)
    _, *results = mb.while_loop(_cond=goes_on, _body=once, loop_vars=first)
    sequences = [
        mb.transpose(x=s, perm=[*range(1, end % s.rank + 1), 0, *range(end % s.rank + 1, s.rank)]) if end % s.rank else s
        for s, end in zip(results[len(carried) :], ends, strict=True)
    ]  # fmt: skip
    return [*results[: len(carried)], *sequences]


def _row(c: Context, x: Any, axis: int, place: Any) -> Any:
    """What lies at a computed place of an axis, without the axis."""
    return through_ints(x, lambda v: mb.gather(x=v, indices=place, axis=axis, **unchecked(c)))


def _stack(values: list[Any], axis: int) -> Any:
    if values[0].rank:
        return mb.stack(values=values, axis=axis)
    # A pass of coremltools (rank0_expand_dims_swap) stops at a stack of numbers that also are outputs.
    return mb.concat(values=[mb.expand_dims(x=v, axes=[0]) for v in values], axis=0)


def _part(x: Any, axis: int, place: int) -> Any:
    """What lies at one place of an axis, without the axis."""
    axis %= x.rank
    begin = [place if i == axis else 0 for i in range(x.rank)]
    others = [i != axis for i in range(x.rank)]
    return through_ints(
        x,
        lambda v: mb.slice_by_index(
            x=v, begin=begin, end=[b + 1 for b in begin], begin_mask=others, end_mask=others,
            squeeze_mask=[not o for o in others],
        ),
    )  # fmt: skip
