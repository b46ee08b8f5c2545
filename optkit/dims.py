"""Arithmetic on the sizes of axes, which may be names."""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache

import onnx_ir as ir

_SUMS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_NO_NAMES = frozenset({"none", "nan", "any", "dyn", "dynamic", "unk", "unknown", "undefined"})

INFERRED = "optkit.shape"
"""Key of the metadata of values under which inference puts what it found where something else is declared."""

Dim = int | str
"""A size: a number, or a name that stands for the same number everywhere in the model."""


def shape_of(value: ir.Value | None) -> tuple[Dim | None, ...] | None:
    """The shape of a value as plain numbers and names; None where the rank is unknown.

    ``?``, ``-1``, ``None`` and the like are what exporters write for any size: such axes of an input or output of a
    graph are called ``<value>.d<axis>``, so that two of them are not taken for equal. A sum of names, such as
    ``sequence+past``, is written as ``plus`` writes it, whichever way the exporter did. Of an output of a graph that
    is declared with names of its own, it is the shape that inference found.
    """
    if value is None or value.shape is None:
        return None
    known: tuple[Dim, ...] | None = value.meta.get(INFERRED)
    if known is not None and len(known) == len(value.shape):
        return known
    return tuple(
        d
        if isinstance(d, int)
        else (
            _in_order(str(d.value)) if is_name(d.value) else None if d.value is None else f"{value.name}.d{i}"
        )
        for i, d in enumerate(value.shape)
    )


def is_name(name: str | None) -> bool:
    """Whether a symbolic axis has a name that says which size it is."""
    return name is not None and any(c.isalpha() for c in name) and name.lower() not in _NO_NAMES


@lru_cache(maxsize=4096)
def _in_order(name: str) -> Dim:
    """A sum of names and numbers as ``plus`` writes it; any other name as it is."""
    if "+" not in name:
        return name

    def value(node: ast.AST) -> Dim | None:
        match node:
            case ast.Constant(value=int() as number):
                return number
            case ast.Name(id=word):
                return word
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return plus(value(left), value(right))
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return times(value(left), value(right))
        return None

    found = _parsed(name, value)
    return name if found is None else found


def _parsed(name: str, value: Callable[[ast.AST], Dim | None]) -> Dim | None:
    """What ``value`` makes of the expression that a name is; None where it is none."""
    try:
        return value(ast.parse(name.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _factors(dim: Dim) -> tuple[int, Counter[str]]:
    """A product as its number and its names. A name with any other operation in it is one factor."""
    if isinstance(dim, int):
        return dim, Counter()
    if any(c in dim for c in "+-/ ()"):
        # Only this module writes products of sums, and those in parentheses.
        depth, parts, start = 0, [], 0
        for position, c in enumerate(dim):
            depth += (c == "(") - (c == ")")
            if c == "*" and depth == 0:
                parts.append(dim[start:position])
                start = position + 1
        parts.append(dim[start:])
        if not all(p.isdigit() or p.isidentifier() or (p.startswith("(") and p.endswith(")")) for p in parts):
            return 1, Counter([dim])
    else:
        parts = dim.split("*")
    number, names = 1, Counter[str]()
    for part in parts:
        if part.isdigit():
            number *= int(part)
        else:
            names[part] += 1
    return number, names


def _product(number: int, names: Counter[str]) -> Dim:
    if number == 0 or not +names:
        return number
    parts = ([str(number)] if number != 1 else []) + sorted((+names).elements())
    return "*".join(parts)


def times(a: Dim | None, b: Dim | None) -> Dim | None:
    """``a * b``."""
    if a is None or b is None:
        return None
    (m, x), (n, y) = _factors(a), _factors(b)
    return _product(m * n, x + y)


def quotient(a: Dim | None, b: Dim | None) -> Dim | None:
    """``a / b`` where it is known to leave no rest, else None."""
    if a is None or b is None:
        return None
    (m, x), (n, y) = _factors(a), _factors(b)
    if n == 0 or m % n or y - x:
        return None
    return _product(m // n, x - y)


def plus(a: Dim | None, b: Dim | None) -> Dim | None:
    """``a + b``."""
    if a is None or b is None:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if 0 in (a, b):
        return b if a == 0 else a
    number, counts = 0, Counter[str]()
    for dim in (a, b):
        for part in dim[1:-1].split(" + ") if isinstance(dim, str) and _is_sum(dim) else [dim]:
            if isinstance(part, int) or part.removeprefix("-").isdigit():
                number += int(part)
            else:
                count, names = _factors(part)
                counts[str(_product(1, names))] += count
    terms = [str(_product(counts[name], _factors(name)[1])) for name in sorted(counts)]
    terms += [str(number)] if number else []
    return terms[0] if len(terms) == 1 else f"({' + '.join(terms)})"


def _is_sum(dim: str) -> bool:
    return dim.startswith("(") and dim.endswith(")") and " + " in dim and "(" not in dim[1:]


def minus(a: Dim | None, b: Dim | None) -> Dim | None:
    """``a - b``."""
    if a is None or b is None:
        return None
    if a == b:
        return 0
    return plus(a, -b) if isinstance(b, int) else None


def divide(a: Dim | None, b: Dim | None) -> Dim | None:
    """``a / b``, rounded towards zero as ONNX does."""
    if isinstance(a, int) and isinstance(b, int):
        return None if b == 0 else (a // b if (a < 0) == (b < 0) else -(-a // b))
    return quotient(a, b)


def remainder(a: Dim | None, b: Dim | None) -> Dim | None:
    """``a`` modulo ``b``, neither of them negative."""
    if isinstance(a, int) and isinstance(b, int):
        return a % b if a >= 0 and b > 0 else None
    return 0 if quotient(a, b) is not None else None


def worked_out(dim: Dim | None, sizes: Mapping[str, int]) -> int | None:
    """The number that a size is: of ``past + sequence`` where ``sizes`` has both, or has the whole by this name; else None."""
    if dim is None or isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]

    def value(node: ast.AST) -> int | None:
        match node:
            case ast.Constant(value=int() as number):
                return number
            case ast.Name(id=name):
                return sizes.get(name)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _SUMS:
                a, b = value(left), value(right)
                return None if a is None or b is None else int(_SUMS[type(op)](a, b))
        return None

    found = _parsed(dim, value)
    return found if isinstance(found, int) and found >= 0 else None
