"""What a package says of its inputs, outputs and states, held against the function that it runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from optkit.backends.coreml.quiet import FeatureTypes_pb2
from optkit.backends.coreml.reference.program import Package, Type

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_@]*")
_ARRAY, _IMAGE = FeatureTypes_pb2.ArrayFeatureType, FeatureTypes_pb2.ImageFeatureType


def disagreements(package: Package) -> Iterator[str]:
    """What the description and the function ``main`` disagree on."""
    description = package.spec.description
    if "main" not in package.functions:
        yield "there is no function 'main'"
        return
    main = package.functions["main"]
    inputs, outputs = [*description.input, *description.state], list(description.output)
    yield from _names("inputs", [f.name for f in inputs], "takes", [v.name for v in main.inputs])
    yield from _names("outputs", [f.name for f in outputs], "gives", main.block.outputs)
    types = {o.name: o.type for op in main.block.operations for o in op.outputs}
    types |= {v.name: v.type for v in main.inputs}
    for what, features in (("input", inputs), ("output", outputs)):
        for feature in features:
            if not _NAME.fullmatch(feature.name):
                yield f"{feature.name!r} is no identifier"
            if feature.name in types:
                for problem in _feature(feature, types[feature.name], given=what == "input"):
                    yield f"the {what} {feature.name!r} {problem}"


def _names(what: str, described: Sequence[str], does: str, function: Sequence[str]) -> Iterator[str]:
    if Counter(described) != Counter(function):
        yield f"the description names the {what} {sorted(described)}, the function {does} {sorted(function)}"


def _feature(feature: Any, type_: Type, *, given: bool) -> Iterator[str]:
    """What is wrong with one; labels and their dictionaries say no type that could be."""
    which = feature.type.WhichOneof("Type")
    if (which == "stateType") != type_.state:
        yield f"is described as {which}, and the function has {type_}"
    elif which == "stateType":
        yield from _array(feature.type.stateType.arrayType, type_, given=given)
    elif which == "multiArrayType":
        yield from _array(feature.type.multiArrayType, type_, given=given)
    elif which == "imageType":
        yield from _image(feature.type.imageType, type_)
    elif given:
        yield f"is described as {which}, and ML Programs take arrays and pictures"


def _array(array: Any, type_: Type, *, given: bool) -> Iterator[str]:
    name = _ARRAY.ArrayDataType.Name(array.dataType)
    kind = {"DOUBLE": "FLOAT64"}.get(name, name)
    ranges = [(r.lowerBound, r.upperBound) for r in array.shapeRange.sizeRanges]
    listed = [tuple(s.shape) for s in array.enumeratedShapes.shapes]
    usual = tuple(array.shape)
    if kind != type_.kind:
        yield f"is described as {kind.lower()}, and the function has {type_}"
    if type_.shape is None:
        return
    # Of outputs a shape need not be told.
    for shape in dict.fromkeys([usual, *listed] if usual or given else listed):
        if not type_.takes(shape):
            yield f"is described as {list(shape)}, and the function has {type_}"
    if listed and given and usual not in listed:
        yield f"is usually {list(usual)}, which is none of its listed shapes"
    if not ranges:
        return
    if len(ranges) != len(type_.shape):
        yield f"has {len(ranges)} ranges, and the function has {type_}"
        return
    for axis, ((low, high), size) in enumerate(zip(ranges, type_.shape, strict=True)):
        if high < 0 and given:
            yield f"has an axis without an upper bound ({axis}), which ML Programs do not take"
        elif size >= 0 and (low, high) != (size, size):
            yield f"has {low} to {high} on axis {axis}, and the function has {type_}"
        elif given and axis < len(usual) and not low <= usual[axis] <= high:
            yield f"is usually {list(usual)}, and axis {axis} is {low} to {high}"


def _image(image: Any, type_: Type) -> Iterator[str]:
    color = _IMAGE.ColorSpace.Name(image.colorSpace)
    channels = 1 if color.startswith("GRAYSCALE") else 3
    shape = (1, channels, image.height, image.width)
    if type_.shape is None or not type_.takes(shape):
        yield f"is a picture of {color}, {image.height} by {image.width}, and the function has {type_}"
