"""Rules that Core ML's loader checks, read from the saved package: what a Mac would refuse is refused here.

The signatures of the operations are those that coremltools publishes for each version; the rules without one say where they
are documented.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optkit.backends.coreml.quiet import ct
from optkit.backends.coreml.reference.program import Block, Function, Lazy, Name, Operation, Package
from optkit.errors import ModelError

# Version of the specification that each set of operations needs (coremltools, Model.proto).
_VERSIONS = {"CoreML5": 6, "CoreML6": 7, "CoreML7": 8, "CoreML8": 9, "CoreML9": 10}
_TARGETS = {
    "CoreML5": "iOS15",
    "CoreML6": "iOS16",
    "CoreML7": "iOS17",
    "CoreML8": "iOS18",
    "CoreML9": "iOS26",
}
# Optional in coremltools' signatures; the loader of iOS 17 on refuses programs without (onnxsim, notes on its exporter).
_INDEXED = ("gather", "gather_nd", "gather_along_axis", "scatter", "scatter_nd", "scatter_along_axis")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_@]*")
_MOST_AXES = 5
# Written without a signature of their own, or with variable parameters.
_APART = ("const", "cond", "while_loop", "write_state", "read_state", "classify")


@functools.cache
def _signatures(opset: str) -> dict[str, Any]:
    """Newest signature of each operation that is no newer than ``opset``."""
    registry = importlib.import_module("coremltools.converters.mil.mil.ops.registry").SSAOpRegistry
    limit = getattr(ct.target, _TARGETS[opset]).value
    found = {}
    for name, versions in registry.core_ops.items():
        fit = [v for v in versions if v is None or v.value <= limit]
        if fit:
            found[name] = versions[
                max(fit, key=lambda v: -1 if v is None else v.value)
            ].input_spec.input_types
    return found


def problems(package: Path) -> list[str]:
    """What is wrong with a package; empty where nothing is."""
    try:
        opened = Package(package)
    except ModelError as error:
        return [str(error)]
    found = list(_interface(opened))
    for function in opened.functions.values():
        found += _function(opened, function)
    return list(dict.fromkeys(found))


def _interface(package: Package) -> Iterator[str]:
    description = package.spec.description
    if "main" not in package.functions:
        yield "there is no function 'main'"
        return
    main = package.functions["main"]
    inputs = {f.name for f in (*description.input, *description.state)}
    if inputs != {v.name for v in main.inputs}:
        yield f"the description names the inputs {sorted(inputs)}, the function {sorted(v.name for v in main.inputs)}"
    outputs = [f.name for f in description.output]
    if set(outputs) - set(main.block.outputs):
        yield f"the description names outputs that the function does not give: {sorted(set(outputs) - set(main.block.outputs))}"
    for feature in (*description.input, *description.output):
        if not _NAME.fullmatch(feature.name):
            yield f"{feature.name!r} is no identifier"
        array = feature.type.multiArrayType
        if any(r.upperBound < 0 for r in array.shapeRange.sizeRanges) and feature in description.input:
            yield f"the input {feature.name!r} has an axis without an upper bound, which ML Programs do not take"
    for value in main.inputs:
        if value.type.state and value.type.kind != "FLOAT16":
            yield f"the state {value.name!r} is {value.type}, and states hold float16"
        if value.type.shape == ():
            yield f"the input {value.name!r} has no axes"


def _function(package: Package, function: Function) -> Iterator[str]:
    if function.opset not in _VERSIONS:
        yield f"the operations {function.opset} are not known"
        return
    needed = _VERSIONS[function.opset]
    if package.spec.specificationVersion < needed:
        yield f"specification version {package.spec.specificationVersion}, and {function.opset} needs {needed}"
    known = {v.name for v in function.inputs}
    yield from _block(function.block, function.opset, known, set())


def _block(block: Block, opset: str, known: set[str], constants: set[str]) -> Iterator[str]:
    known, constants = set(known), set(constants)
    for op in block.operations:
        yield from _operation(op, opset, known, constants)
        for inner in op.blocks:
            yield from _block(inner, opset, known | {v.name for v in inner.inputs}, constants)
        for output in op.outputs:
            if output.name in known:
                yield f"{op}: the name {output.name!r} is defined twice"
            known.add(output.name)
            if output.type.shape is not None and len(output.type.shape) > _MOST_AXES:
                yield f"{op}: {output.name!r} has {len(output.type.shape)} axes, and Core ML has at most {_MOST_AXES}"
            if op.kind == "const" or op.kind.startswith("constexpr_"):
                constants.add(output.name)
    for name in block.outputs:
        if name not in known:
            yield f"the output {name!r} is not computed"


def _operation(op: Operation, opset: str, known: set[str], constants: set[str]) -> Iterator[str]:
    for parameter, values in op.inputs.items():
        for value in values:
            if isinstance(value, Name) and value.name not in known:
                yield f"{op}: {parameter} {value.name!r} is used before it is computed"
    yield from _blobs(op)
    if op.kind in _APART:
        return
    signature = _signatures(opset).get(op.kind)
    if signature is None:
        yield f"{op}: there is no such operation in {opset}"
        return
    given = set(op.inputs) | (set(op.attributes) if op.kind.startswith("constexpr_") else set())
    for parameter in sorted(given - set(signature)):
        yield f"{op}: {opset} has no parameter {parameter!r}"
    for parameter, wanted in signature.items():
        if parameter not in given:
            if not wanted.optional:
                yield f"{op}: the parameter {parameter!r} is missing"
        elif wanted.const:
            for value in op.inputs.get(parameter, ()):
                if isinstance(value, Name) and value.name not in constants:
                    yield f"{op}: the parameter {parameter!r} has to be constant"
    if op.kind in _INDEXED and "validate_indices" in signature and "validate_indices" not in given:
        yield f"{op}: the parameter 'validate_indices' is missing, and the loader asks for it"
    if op.kind in ("conv", "conv_transpose", "max_pool", "avg_pool") and "pad_type" not in given:
        yield f"{op}: the parameter 'pad_type' is missing"


def _blobs(op: Operation) -> Iterator[str]:
    values = [*op.attributes.values(), *(v for several in op.inputs.values() for v in several)]
    for value in values:
        if isinstance(value, Lazy):
            try:
                value.read()
            except (ModelError, ValueError) as error:
                yield f"{op}: {error}"
