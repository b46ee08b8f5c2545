"""The table of operations: a function each, with MIL's own parameters by name.

Arrays arrive with floats in float32, but for large weights in float16 without infinities, where operations widen those
themselves; scalars as Python numbers or strings. The result is rounded by whoever calls. Some may
write the result over an argument that nobody reads afterwards, which is given as ``out``, too, and some are told in ``room`` how
many elements of float32 they may hold at a time, the result's among them, where they can do with fewer and take longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OPERATIONS: dict[str, Callable[..., Any]] = {}
# Operations that take ``out``, of float32 and of the result's shape.
OVERWRITING: set[str] = set()
# Operations that take ``room``.
ROOMY: set[str] = set()


def operation(
    *names: str, over: bool = False, room: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function under the names of operations.

    Args:
        over: Whether it takes ``out``.
        room: Whether it takes ``room``.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            assert name not in OPERATIONS, name
            OPERATIONS[name] = function
        if over:
            OVERWRITING.update(names)
        if room:
            ROOMY.update(names)
        return function

    return enter
