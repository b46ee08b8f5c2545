"""Optimization profiles: the sizes of free axes that an engine is built for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from optkit.data import TensorSpec
from optkit.dims import worked_out
from optkit.errors import UsageError

Range = tuple[int, int, int]

# Smallest, usual and largest size of an axis about which nothing is known: a batch, a height or width, a length.
_BATCH, _IMAGE, _LENGTH = (1, 8, 32), (32, 224, 512), (1, 128, 512)


def free_axes(inputs: Sequence[TensorSpec]) -> Iterator[tuple[str, TensorSpec, int]]:
    """``(name, input, axis)`` of every free axis; the name is its symbol, or ``<input>.<axis>``.

    Raises:
        UsageError: An input has no known rank.
    """
    for spec in inputs:
        if spec.shape is None:
            raise UsageError(
                f"input {spec.name!r} has no known rank, and TensorRT needs one",
                hint="export it with a shape",
            )
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, int):
                yield size or f"{spec.name}.{axis}", spec, axis


def ranges(inputs: Sequence[TensorSpec], given: Mapping[str, Range]) -> dict[str, Range]:
    """Smallest, usual and largest size of every free axis by name; ``given`` overrides what is assumed.

    Raises:
        UsageError: A name is not a free axis, a range is not in order, or an input has no known rank.
    """
    found: dict[str, Range] = {}
    for name, spec, axis in free_axes(inputs):
        assert spec.shape is not None
        known = _BATCH if axis == 0 else _IMAGE if len(spec.shape) > 3 else _LENGTH
        found.setdefault(name, known)
    unknown = sorted(set(given) - set(found))
    if unknown:
        raise UsageError(
            f"options.sizes: {unknown[0]} is not a free axis of the model",
            hint=f"free axes: {', '.join(found) or 'none'}",
        )
    for name, (low, usual, high) in given.items():
        if not 1 <= low <= usual <= high:
            raise UsageError(
                f"options.sizes.{name}: {low}, {usual}, {high} are not in order",
                hint="smallest, usual, largest",
            )
        found[name] = (low, usual, high)
    return found | {
        name: (sizes[0], sizes[1], sizes[2])
        for name in found.keys() - given.keys()
        if (sizes := _sum(name, found)) is not None
    }


def _sum(name: str, known: Mapping[str, Range]) -> list[int] | None:
    """The sizes of an axis that is a sum of others, such as ``past + 1``; None for one that stands for itself."""
    others = {n: r for n, r in known.items() if n != name}
    sizes = [worked_out(name, {n: r[which] for n, r in others.items()}) for which in range(3)]
    return None if None in sizes else sorted(size for size in sizes if size is not None)


def seen(
    inputs: Sequence[TensorSpec], sizes: Mapping[str, Sequence[Range]], given: Mapping[str, Range]
) -> dict[str, Range]:
    """``given``, and for the other free axes what was seen in the data: batches from 1 on, else nothing beyond it."""
    found = dict(given)
    for name, spec, axis in free_axes(inputs):
        if name not in given and spec.name in sizes:
            low, usual, high = sizes[spec.name][axis]
            if axis == 0:
                low, high = 1, max(high, _BATCH[2])
            before = found.get(name, (low, usual, high))
            found[name] = (min(low, before[0]), usual, max(high, before[2]))
    return found


def profile(inputs: Sequence[TensorSpec], sizes: Mapping[str, Range]) -> dict[str, list[list[int]]]:
    """Smallest, usual and largest shape of every input with free axes."""
    free: dict[str, dict[int, str]] = {}
    for name, spec, axis in free_axes(inputs):
        free.setdefault(spec.name, {})[axis] = name
    return {
        spec.name: [
            [
                sizes[axes[i]][which] if i in axes else int(size or 0)
                for i, size in enumerate(spec.shape or ())
            ]
            for which in range(3)
        ]
        for spec in inputs
        if (axes := free.get(spec.name))
    }
