"""Which compute units may run each operation, predicted from what Apple documents: nothing here was run on them.

Core ML decides when it loads a package on the device. The rules are those of Apple's ``coreai-models``
(``neural_engine_rules.md``, 2026-08-21) and ``ml-ane-transformers``: the Neural Engine computes in float16 and in integers
of 8 and 16 bits, at fixed sizes, without control flow, and pads the last axis to 64 bytes. Core ML's processor back end runs
every operation (coremltools guide, "Set the Compute Units").
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from optkit.backends.base import Eligible
from optkit.backends.coreml.reference.program import Block, Function, Operation, Output, Package

_ALL, _REST, _PROCESSOR = ("Neural Engine", "GPU", "CPU"), ("GPU", "CPU"), ("CPU",)
_ENGINE = frozenset({"FLOAT16", "INT8", "UINT8", "INT16", "UINT16", "BOOL"})
_CONTROL = frozenset({"cond", "while_loop"})
_STATE = frozenset({"read_state", "write_state"})
# Elements of float16 in the 64 bytes that the last axis is padded to.
_LAST = 32


def eligibility(package: Path) -> tuple[Eligible, ...]:
    """Every operation of the main function that computes something, in order."""
    function = Package(package).functions["main"]
    return tuple(_of(function))


def _of(function: Function) -> Iterator[Eligible]:
    types = {v.name: v for v in function.inputs}
    yield from _block(function.block, types, inside=False)


def _block(block: Block, known: dict[str, Output], *, inside: bool) -> Iterator[Eligible]:
    types = known | {v.name: v for v in block.inputs}
    fixed: set[str] = set()
    for op in block.operations:
        types |= {o.name: o for o in op.outputs}
        if op.is_constant:
            fixed.update(o.name for o in op.outputs)
            continue
        units, reason = (_PROCESSOR, "inside control flow") if inside else _judged(op, types, fixed)
        yield Eligible(name=op.name, op=op.kind, units=units, reason=reason)
        for inner in op.blocks:
            yield from _block(inner, types, inside=True)


def _judged(op: Operation, types: dict[str, Output], fixed: set[str]) -> tuple[tuple[str, ...], str]:
    """The units, and why the first of all is not among them, or what it costs there."""
    if op.kind in _CONTROL:
        return _PROCESSOR, "control flow"
    if op.kind in _STATE:
        return _REST, "keeps a state; the Neural Engine wants caches as inputs and outputs"
    read = {b.name for bindings in op.inputs.values() for b in bindings if hasattr(b, "name")}
    values = [*(types[n] for n in sorted(read - fixed) if n in types), *op.outputs]
    kinds = {v.type.kind for v in values}
    if wrong := sorted(kinds - _ENGINE):
        integers = all(k.startswith(("INT", "UINT", "STRING")) for k in kinds)
        return (_PROCESSOR if integers else _REST), f"computes with {', '.join(k.lower() for k in wrong)}"
    if any(v.type.shape is None or -1 in v.type.shape for v in values):
        return _ALL, "at the default size alone: its shape is a range"
    last = max((v.type.shape[-1] for v in op.outputs if v.type.shape), default=_LAST)
    if last < _LAST and any(v.type.shape for v in op.outputs):
        return _ALL, f"pads its last axis from {last} to {_LAST} elements"
    return _ALL, ""
