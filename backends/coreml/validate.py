"""Rules that Core ML's loader checks, read from the saved package: what a Mac would refuse is refused here.

Names, blocks and the file of weights are checked here, operations by ``definitions.py``, what the package says of itself by
``described.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optkit.backends.coreml.definitions import Definitions, Value, fits
from optkit.backends.coreml.described import disagreements
from optkit.backends.coreml.quiet import silence
from optkit.backends.coreml.reference.program import Block, Function, Lazy, Name, Operation, Package, Type
from optkit.errors import ModelError

# Version of the specification that each set of operations needs (coremltools, Model.proto).
_VERSIONS = {"CoreML5": 6, "CoreML6": 7, "CoreML7": 8, "CoreML8": 9, "CoreML9": 10}
_MOST_AXES = 5
_FLAG = Type(kind="BOOL", dtype=np.bool_, shape=())

_Known = Mapping[str, Value]


def problems(package: Path) -> list[str]:
    """What is wrong with a package; empty where nothing is."""
    try:
        opened = Package(package)
    except ModelError as error:
        return [str(error)]
    found = list(disagreements(opened))
    with silence():
        for function in opened.functions.values():
            found += _function(opened, function)
    return list(dict.fromkeys(found))


def _function(package: Package, function: Function) -> Iterator[str]:
    if function.opset not in _VERSIONS:
        yield f"the operations {function.opset} are not known"
        return
    needed = _VERSIONS[function.opset]
    if package.spec.specificationVersion < needed:
        yield f"specification version {package.spec.specificationVersion}, and {function.opset} needs {needed}"
    for value in function.inputs:
        if value.type.state and value.type.kind != "FLOAT16":
            yield f"the state {value.name!r} is {value.type}, and states hold float16"
        if value.type.shape == ():
            yield f"the input {value.name!r} has no axes"
        if _unsized(value.type):
            yield f"the input {value.name!r} is declared with another number of axes than it has sizes"
    known = {v.name: Value(v.type) for v in function.inputs}
    if len(known) < len(function.inputs):
        yield f"two inputs of the function {function.name!r} have one name"
    yield from _block(function.block, Definitions(function.opset), known)


def _block(block: Block, definitions: Definitions, outside: _Known) -> Iterator[str]:
    known = dict(outside)
    for op in block.operations:
        found = [f"{op}: {problem}" for problem in _operation(op, definitions, known)]
        yield from found
        for inner in op.blocks:
            yield from _block(inner, definitions, known | {v.name: Value(v.type) for v in inner.inputs})
        for output in op.outputs:
            if output.name in known:
                yield f"{op}: the name {output.name!r} is defined twice"
            if _unsized(output.type):
                yield f"{op}: {output.name!r} is declared with another number of axes than it has sizes"
            elif output.type.shape is not None and len(output.type.shape) > _MOST_AXES:
                yield f"{op}: {output.name!r} has {len(output.type.shape)} axes, and Core ML has at most {_MOST_AXES}"
            held = op.attributes.get("val") if op.kind == "const" and not found else None
            known[output.name] = Value(output.type, op.kind if op.is_constant else "", held)
    for name in block.outputs:
        if name not in known:
            yield f"the output {name!r} is not computed"


def _unsized(type_: Type) -> bool:
    """Whether a tensor has no known shape; of lists, whose kinds are not in capitals, none is asked for."""
    return type_.shape is None and type_.kind.isupper()


def _operation(op: Operation, definitions: Definitions, known: _Known) -> Iterator[str]:
    missing = [
        f"{parameter} {value.name!r} is used before it is computed"
        for parameter, values in op.inputs.items()
        for value in values
        if isinstance(value, Name) and value.name not in known
    ]
    yield from missing
    yield from _blobs(op)
    if missing:
        return
    arguments = {p: [_value(v, known) for v in values] for p, values in op.inputs.items()}
    if op.kind.startswith("constexpr_"):
        arguments |= {p: [Value.stored(v)] for p, v in op.attributes.items()}
    yield from definitions.problems(op, arguments)
    if op.kind == "const":
        yield from _constant(op)
    elif op.kind in _FLOWS:
        yield from _FLOWS[op.kind](op, arguments, known)
    elif op.kind == "write_state":
        state, data = arguments["input"][0].type, arguments["data"][0].type
        if not state.state or (state.kind, state.shape) != (data.kind, data.shape):
            yield f"writes {data} into {state}"


def _value(given: Any, known: _Known) -> Value:
    return known[given.name] if isinstance(given, Name) else Value.stored(given)


def _constant(op: Operation) -> Iterator[str]:
    held, declared = op.attributes.get("val"), op.outputs[0].type
    if held is None:
        yield "has no value"
    elif declared.shape is not None and not fits(Value.stored(held).type, declared):
        yield f"is declared as {declared}, and holds {Value.stored(held).type}"


def _cond(op: Operation, arguments: Mapping[str, Sequence[Value]], known: _Known) -> Iterator[str]:
    """Its branches give what it gives."""
    if not all(fits(v.type, _FLAG) for v in arguments["pred"]):
        yield f"pred is {arguments['pred'][0].type}, and has to be one bool"
    if len(op.blocks) != 2:
        yield f"has {len(op.blocks)} branches"
    for block in op.blocks:
        yield from _same("the branch", _results(block, known), "the operation", [o.type for o in op.outputs])


def _while(op: Operation, arguments: Mapping[str, Sequence[Value]], known: _Known) -> Iterator[str]:
    """What it carries has one type before, in and after it."""
    if len(op.blocks) != 2:
        yield f"has {len(op.blocks)} blocks"
        return
    carried = [v.type for v in arguments["loop_vars"]]
    condition, body = op.blocks
    for block in op.blocks:
        yield from _same("a block takes", [v.type for v in block.inputs], "the loop", carried)
    yield from _same("the condition", _results(condition, known), "a loop", [_FLAG])
    yield from _same("the body", _results(body, known), "the loop", carried)
    yield from _same("the operation", [o.type for o in op.outputs], "the loop", carried)


_FLOWS = {"cond": _cond, "while_loop": _while}


def _results(block: Block, outside: _Known) -> list[Type]:
    """The types of a block's outputs, as far as they are there."""
    types = {n: v.type for n, v in outside.items()} | {v.name: v.type for v in block.inputs}
    types |= {o.name: o.type for op in block.operations for o in op.outputs}
    return [types[n] for n in block.outputs if n in types]


def _same(what: str, found: Sequence[Type], whose: str, wanted: Sequence[Type]) -> Iterator[str]:
    if len(found) != len(wanted) or not all(
        fits(a, b) for a, b in zip(found, wanted, strict=True) if b.shape is not None
    ):
        yield f"{what} {_listed(found)}, {whose} {_listed(wanted)}"


def _listed(types: Sequence[Type]) -> str:
    return f"has {', '.join(map(str, types)) or 'nothing'}"


def _blobs(op: Operation) -> Iterator[str]:
    values = [*op.attributes.values(), *(v for several in op.inputs.values() for v in several)]
    for value in values:
        if isinstance(value, Lazy):
            try:
                value.check()
            except ModelError as error:
                yield str(error)
