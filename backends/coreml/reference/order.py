"""In which order the operations of a block run: a value that waits for another branch is computed when that is done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from optkit.backends.coreml.reference.program import Block, Operation, Output

# They read or change what is kept between runs, draw numbers, or have operations inside.
_STAYS = ("const", "read_state", "write_state", "random_", "cond", "while_loop", "classify")


def late(block: Block) -> list[Operation]:
    """The operations of ``block``, those later that hold less by that; as they are where that takes as much at most.

    One that moves right in front of the first that reads it holds what it reads for longer, and what it gives for less
    long; it moves where the latter is at least as large. A free size counts as 1, since it is mostly that of all.
    """
    computed = _outputs(op for op in block.operations if not op.is_constant)
    sizes = {value.name: _size(value) for value in (*block.inputs, *computed)}
    readers: dict[str, list[Operation]] = {}
    for op in block.operations:
        for name in dict.fromkeys(_read(op)):
            readers.setdefault(name, []).append(op)
    # From the last on: what an operation gives is read by those that have their place already.
    found: list[Operation] = []
    place: dict[int, int] = {}
    for op in reversed(block.operations):
        ahead = len(found)
        reading = [place[id(r)] for o in op.outputs for r in readers.get(o.name, ())]
        if reading and _moves(op, block):
            target = max(reading) + 1
            longer = _longer(op, readers, sizes, place, block, target)
            if target < ahead and longer <= sum(sizes[o.name] for o in op.outputs):
                ahead = target
        found.insert(ahead, op)
        for index in range(ahead, len(found)):
            place[id(found[index])] = index
    found.reverse()
    return found if _most(found, block, sizes) < _most(block.operations, block, sizes) else block.operations


def _most(operations: Sequence[Operation], block: Block, sizes: Mapping[str, int]) -> int:
    """Elements that are held at most while one of ``operations`` runs."""
    last = {name: index for index, op in enumerate(operations) for name in _read(op)}
    last |= dict.fromkeys(block.outputs, len(operations))
    held = sum(sizes[v.name] for v in block.inputs if v.name in last)
    most = held
    for index, op in enumerate(operations):
        held += sum(sizes.get(o.name, 0) for o in op.outputs)
        most = max(most, held)
        done = {n for n in (*_read(op), *(o.name for o in op.outputs)) if last.get(n, index) == index}
        held -= sum(sizes.get(n, 0) for n in done)
    return most


def _moves(op: Operation, block: Block) -> bool:
    if op.blocks or op.kind.startswith(_STAYS):
        return False
    return not any(o.name in block.outputs for o in op.outputs)


def _longer(
    op: Operation,
    readers: Mapping[str, Sequence[Operation]],
    sizes: Mapping[str, int],
    place: Mapping[int, int],
    block: Block,
    target: int,
) -> int:
    """Elements of what ``op`` reads and nobody does behind it once it is ``target`` from the end."""
    total = 0
    for name in set(_read(op)):
        after = [place[id(r)] for r in readers[name] if r is not op and id(r) in place]
        if name in sizes and name not in block.outputs and min(after, default=target) >= target:
            total += sizes[name]
    return total


def _read(op: Operation) -> Iterable[str]:
    """Names that it reads, also inside."""
    yield from op.names
    for inner in op.blocks:
        own = {i.name for i in inner.inputs} | {o.name for o in _outputs(inner.operations)}
        yield from (n for o in inner.operations for n in _read(o) if n not in own)
        yield from (n for n in inner.outputs if n not in own)


def _outputs(operations: Iterable[Operation]) -> Iterable[Output]:
    return (o for op in operations for o in op.outputs)


def _size(value: Output) -> int:
    return math.prod(abs(d) for d in value.type.shape or ())
