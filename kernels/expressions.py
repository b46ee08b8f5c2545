"""Expressions of sizes, as launches carry them in files: read and worked out without running what is in them."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optkit.errors import ModelError

_BINARY: dict[type[ast.operator], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.FloorDiv: ("//", operator.floordiv),
    ast.Mod: ("%", operator.mod),
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"cdiv": lambda a, b: -(-a // b), "min": min, "max": max}
_LONGEST = 500


def evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    """The value of an expression of whole numbers, ``names``, ``+ - * // %``, and calls of ``cdiv``, ``min`` and ``max``.

    Args:
        names: Numbers, and functions that may be called too. Where some are symbols, so is the value.

    Raises:
        ModelError: It has something else in it, a name that nobody knows, or divides by zero.
    """
    known = {**_FUNCTIONS, **names}

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.Constant(value=int() as number):
                return number
            case ast.Name(id=name) if name in known and not callable(known[name]):
                return known[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _BINARY[type(op)][1](value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if callable(known.get(name)):
                given = [value(a) for a in arguments]
                if any(isinstance(v, Symbol) for v in given):
                    return Symbol(f"{name}({', '.join(map(str, given))})")
                return known[name](*given)
        raise ModelError(f"{ast.unparse(node)!r} in {expression!r} is not a size")

    if len(expression) > _LONGEST:
        raise ModelError(f"an expression of {len(expression)} characters is not a size")
    try:
        found = value(ast.parse(expression, mode="eval"))
        return found if isinstance(found, Symbol) else int(found)
    except (SyntaxError, ZeroDivisionError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise ModelError(f"{expression!r} is not a size: {error}") from error


class Symbol:
    """A size that is known when a program is launched; what is computed with it is an expression."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    def _with(self, sign: str, other: Any, *, swapped: bool = False) -> Symbol:
        left, right = (other, self) if swapped else (self, other)
        return Symbol(f"({left} {sign} {right})")

    def __add__(self, other: Any) -> Symbol:
        return self._with("+", other)

    def __radd__(self, other: Any) -> Symbol:
        return self._with("+", other, swapped=True)

    def __sub__(self, other: Any) -> Symbol:
        return self._with("-", other)

    def __rsub__(self, other: Any) -> Symbol:
        return self._with("-", other, swapped=True)

    def __mul__(self, other: Any) -> Symbol:
        return self._with("*", other)

    def __rmul__(self, other: Any) -> Symbol:
        return self._with("*", other, swapped=True)

    def __floordiv__(self, other: Any) -> Symbol:
        return self._with("//", other)

    def __mod__(self, other: Any) -> Symbol:
        return self._with("%", other)

    def __neg__(self) -> Symbol:
        return Symbol(f"(-{self})")


def symbols(ranks: Sequence[int | None]) -> list[tuple[Symbol, ...]]:
    """Shapes of inputs whose every axis is a symbol; an input that is left out, or of no known rank, has none."""
    return [tuple(Symbol(f"axis({i}, {k})") for k in range(rank or 0)) for i, rank in enumerate(ranks)]


def of_shapes(shapes: Sequence[tuple[int, ...]]) -> dict[str, Callable[..., int]]:
    """The functions ``elements(<input>)`` and ``axis(<input>, <axis>)`` for inputs of these shapes."""

    def elements(i: int) -> int:
        count = 1
        for size in shapes[i]:
            count *= size
        return count

    return {"elements": elements, "axis": lambda i, k: shapes[i][k]}
