"""Axes that stay free: which were asked for, by name, and what sizes they are tried at."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from optkit.errors import UnknownNameError, UsageError

Dynamic = Sequence[str] | Mapping[str, Any]
"""Names as on the command line, or for each input ``{axis: name}``."""

_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
# What a bare name stands for: ``(ranks of the inputs it applies to, axis)``.
_CONVENTIONS: dict[str, tuple[tuple[int, ...], int]] = {
    "batch": ((1, 2, 3, 4, 5, 6), 0),
    "sequence": ((2, 3), 1),
    "length": ((2, 3), 1),
    "time": ((2, 3), 1),
    "frames": ((5,), 1),
    "height": ((4, 5), -2),
    "width": ((4, 5), -1),
    "past": ((4,), 2),
}


@dataclass(frozen=True, slots=True)
class Axes:
    """The free axes of the inputs.

    Attributes:
        names: For each input, the name at each free axis. A name may be a sum or product of others: ``past+sequence``.
        sizes: Of the example, by plain name.
        bounds: Smallest and largest size by plain name, as far as they are known.
    """

    names: Mapping[str, Mapping[int, str]]
    sizes: Mapping[str, int]
    bounds: dict[str, tuple[int, int | None]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.sizes)

    def shape(self, name: str, example: Sequence[int], sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of an input when the axes have ``sizes``."""
        free = self.names.get(name, {})
        return tuple(evaluate(free[i], sizes) if i in free else n for i, n in enumerate(example))

    def resized(
        self, names: Sequence[str], tensors: Sequence[torch.Tensor], sizes: Mapping[str, int]
    ) -> list[torch.Tensor]:
        """The inputs at other sizes: elements of the example, in another order so that values differ too."""
        found = []
        for name, tensor in zip(names, tensors, strict=True):
            for axis, size in enumerate(self.shape(name, tensor.shape, sizes)):
                old = tensor.shape[axis]
                if axis in self.names.get(name, {}) and old:
                    places = torch.arange(size) % old
                    tensor = tensor.index_select(
                        axis, places if size <= old else (places * 3 + places // old) % old
                    )
            found.append(tensor.clone())
        return found

    def candidates(self, batch: Sequence[str] = ("batch", "n", "b")) -> Iterator[dict[str, int]]:
        """Sizes to try beside those of the example, most telling first; a module may refuse any of them.

        Axes first move apart from each other, so that one taken for another shows; then together.
        """
        rest = {n: i for i, n in enumerate(n for n in self.sizes if n.lower() not in batch)}
        steps: list[Any] = [
            lambda n, k: n + k,
            lambda n, k: max(2, n - k),
            lambda n, k: n * (1 + k),
            lambda n, k: max(1, n // (1 + k)),
        ]
        steps += [lambda n, k, m=m: n + m * k for m in (2, 4, 8, 16, 32, 64, 128, 256)]
        steps += [lambda n, k, m=m: max(m * k, (n // 2) // m * m) for m in (4, 8, 16, 32, 64)]
        for apart in (1, 0) if len(rest) > 1 else (0,):
            yield {n: s + 1 + apart * rest[n] if n in rest else 1 for n, s in self.sizes.items()}
            yield {n: 2 * s + apart * rest[n] if n in rest else s + 1 for n, s in self.sizes.items()}
            yield {n: s + 2 + (2 * apart * rest[n] if n in rest else 0) for n, s in self.sizes.items()}
        for apart in (1, 0) if len(rest) > 1 else (0,):
            for step in steps:
                moved = {n: step(self.sizes[n], 1 + apart * i) for n, i in rest.items()}
                yield {n: moved.get(n, s + 1) for n, s in self.sizes.items()}
                yield {n: moved.get(n, 1) for n in self.sizes}
        for chosen in rest:
            for step in steps:
                yield {n: step(s, 1) if n == chosen else s for n, s in self.sizes.items()}
        yield {n: s if n in rest else 1 for n, s in self.sizes.items()}
        yield {n: s if n in rest else s + 1 for n, s in self.sizes.items()}


def ask(dynamic: Dynamic | None, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> Axes:
    """The axes that a request means for inputs of these names and shapes.

    Args:
        dynamic: Names (``batch``, ``sequence``, or ``NAME=INPUT:AXIS+INPUT:AXIS``), or a mapping from an input to
            ``{axis: name}`` or a sequence with a name or None an axis; ``torch.export.Dim`` counts as its name.

    Raises:
        UsageError: An input or axis does not exist, a name means nothing, or one name has two sizes.
    """
    shapes = {n: tuple(t.shape) for n, t in zip(names, tensors, strict=True)}
    asked: dict[str, dict[int, str]] = {}
    bounds: dict[str, tuple[int, int | None]] = {}
    if isinstance(dynamic, Mapping):
        for name, axes in dynamic.items():
            _known(name, shapes)
            pairs = axes.items() if isinstance(axes, Mapping) else enumerate(axes or ())
            for axis, dim in pairs:
                if dim is None or isinstance(dim, int):
                    continue
                label = dim if isinstance(dim, str) else _dim_name(dim, name, axis)
                if not isinstance(dim, str) and getattr(dim, "max", None) is not None:
                    bounds[label] = (int(dim.min), int(dim.max))
                _set(asked, shapes, name, axis, label)
    else:
        for text in dynamic or ():
            for part in text.split(","):
                if part.strip():
                    _by_name(part.strip(), asked, shapes)
    return Axes(names=asked, sizes=_sizes(asked, shapes), bounds=bounds)


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """The value of a name, or of a sum, difference, product or quotient of names and numbers."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return int(_OPERATIONS[type(node.op)](value(node.left), value(node.right)))
        raise UsageError(f"dynamic axis {expression!r}: a name, or + - * // of names and numbers, is wanted")

    return value(_parse(expression))


def _parse(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise UsageError(
            f"dynamic axis {expression!r}: a name, or + - * // of names and numbers, is wanted"
        ) from error


def _by_name(part: str, asked: dict[str, dict[int, str]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    label, equals, places = part.partition("=")
    if equals:
        for place in places.split("+"):
            name, colon, number = place.rpartition(":")
            if not colon or not re.fullmatch(r"-?\d+", number):
                raise UsageError(
                    f"--dynamic {part!r}: NAME=INPUT:AXIS is wanted",
                    hint=f"for example {label or 'batch'}={next(iter(shapes))}:0",
                )
            _known(name, shapes)
            _set(asked, shapes, name, int(number), label)
        return
    if part.lower() not in _CONVENTIONS:
        raise UsageError(
            f"--dynamic {part!r}: not a name with a known place",
            hint=f"say where it is, as in {part}={next(iter(shapes))}:0; known places: {', '.join(_CONVENTIONS)}",
        )
    ranks, axis = _CONVENTIONS[part.lower()]
    fits = [name for name, shape in shapes.items() if len(shape) in ranks]
    if part.lower() == "batch" and fits:
        # What holds for the whole batch (a time step, a scale) has another size along its first axis.
        size = shapes[fits[0]][0]
        fits = [name for name in fits if shapes[name][0] == size]
    if not fits:
        have = ", ".join(f"{n} {list(s)}" for n, s in shapes.items())
        raise UsageError(
            f"--dynamic {part!r}: no input has such an axis: {have}",
            hint=f"say where it is: {part}=INPUT:AXIS",
        )
    for name in fits:
        _set(asked, shapes, name, axis, part)


def _known(name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if name not in shapes:
        raise UnknownNameError("input", name, shapes, where="dynamic axes")


def _set(
    asked: dict[str, dict[int, str]], shapes: Mapping[str, tuple[int, ...]], name: str, axis: int, label: str
) -> None:
    shape = shapes[name]
    if not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
        raise UsageError(f"dynamic axis {label!r}: input {name!r} has no axis {axis}: {list(shape)}")
    asked.setdefault(name, {})[axis % len(shape)] = label


def _dim_name(dim: Any, name: str, axis: int) -> str:
    label = getattr(dim, "__name__", None)
    # Dim.AUTO and Dim.DYNAMIC have no name of their own.
    return (
        label
        if isinstance(label, str) and label.isidentifier()
        else f"{re.sub(r'[^0-9A-Za-z_]+', '_', name)}_{axis}"
    )


def _sizes(asked: Mapping[str, Mapping[int, str]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    sizes: dict[str, tuple[int, str]] = {}
    derived: list[tuple[str, str, int]] = []
    for name, axes in asked.items():
        for axis, label in axes.items():
            size = shapes[name][axis]
            if not label.isidentifier():
                derived.append((label, name, axis))
                continue
            first, other = sizes.setdefault(label, (size, name))
            if first != size:
                raise UsageError(
                    f"dynamic axis {label!r} is {first} in {other!r} and {size} in {name!r}",
                    hint="give axes of different sizes different names",
                )
    plain = {label: size for label, (size, _) in sizes.items()}
    for label, name, axis in derived:
        unknown = {n.id for n in ast.walk(_parse(label)) if isinstance(n, ast.Name)} - set(plain)
        if unknown:
            raise UsageError(f"dynamic axis {label!r} of {name!r}: no axis is called {min(unknown)!r}")
        if evaluate(label, plain) != shapes[name][axis]:
            raise UsageError(
                f"dynamic axis {label!r} of {name!r} is {shapes[name][axis]}, not {evaluate(label, plain)}"
            )
    return plain
