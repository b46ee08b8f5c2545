"""What a program computes, read from the operations that are stored in it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from optkit.backends.base import Executed

_TENSOR = re.compile(r"tensor<((?:[\d?]+x)*)(\w+)>")
_FORMATS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "si8": "int8", "ui8": "int8"}
_DIALECT, _WRITTEN_OUT = "coreai.", "decomposable."


def products(program: Any, function: str) -> Sequence[Executed]:
    """The operations of ``function``; products with their multiply-accumulates, and no times.

    Operations that hold what they stand for in simpler ones count as themselves.
    """
    # There is no public way from a program to its operations (coreai-core 1.0.0b3).
    graph = program._get_graph(function)
    seen: Counter[str] = Counter()
    rows = []
    for op in _operations(graph.operation):
        name = op.name.removeprefix(_DIALECT).removeprefix(_WRITTEN_OUT)
        if name in ("constant", "output", "return", "yield"):
            continue
        given = [_type(v) for v in op.operands]
        made = [_type(v) for v in op.results]
        seen[name] += 1
        rows.append(
            Executed(
                name=f"{name}.{seen[name]}", op=name, where="cpu", format=_format(given, made), macs=_macs(name, given, made),
                seconds=0.0,
            )
        )  # fmt: skip
    return rows


def _operations(op: Any) -> Iterator[Any]:
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                # Bodies of control flow run; those of compound operations say the same in other words.
                if _WRITTEN_OUT not in inner.operation.name:
                    yield from _operations(inner.operation)


def _type(value: Any) -> tuple[tuple[int, ...], str]:
    """Shape, with 0 for sizes that are not known, and element."""
    found = _TENSOR.fullmatch(str(value.type))
    if found is None:
        return (), ""
    return tuple(0 if d == "?" else int(d) for d in found[1].split("x") if d), found[2]


def _format(given: Sequence[tuple[tuple[int, ...], str]], made: Sequence[tuple[tuple[int, ...], str]]) -> str:
    return next((_FORMATS[kind] for _, kind in (*given, *made) if kind in _FORMATS), "fp32")


def _macs(
    name: str, given: Sequence[tuple[tuple[int, ...], str]], made: Sequence[tuple[tuple[int, ...], str]]
) -> int:
    if "matmul" in name:
        return math.prod(made[0][0]) * given[0][0][-1]
    if name.startswith("conv") and "transpose" not in name:
        # Weights: output channels, input channels of a group, kernel.
        return math.prod(made[0][0]) * math.prod(given[1][0][1:])
    if name.startswith("conv"):
        # Weights: input channels, output channels of a group, kernel; each element of the input meets all of the latter.
        return math.prod(given[0][0]) * math.prod(given[1][0][1:])
    if "attention" in name:
        queries, keys, values = (shape for shape, _ in given[:3])
        return math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])
    return 0
