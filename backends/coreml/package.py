"""Writing a program into an ``.mlpackage``: the same bytes for the same program."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from optkit.backends.coreml.counted import angles, counted, regained
from optkit.backends.coreml.interface import LABEL, Port
from optkit.backends.coreml.quiet import ct, silence

PACKAGE = "model.mlpackage"
DATA = "Data/com.apple.CoreML"
MODEL, WEIGHTS = f"{DATA}/model.mlmodel", f"{DATA}/weights/weight.bin"

# Any fixed one will do; what an item is called follows from what it is.
_SPACE = uuid.UUID("6ba7b812-9dad-11d1-80b4-00c04fd430c8")
_FP16 = {"common::add_fp16_cast", "common::add_int16_cast"}
# Passes of coremltools that change what a program computes.
_NEVER = {
    # Takes the factors of a palette's channels for scales of its entries, and writes a table for each channel.
    "common::canonicalize_quantized_lut_pattern",
    # Counts negative indices from the end of the first axes, also of those behind axes of a batch. Here none is negative.
    "common::guard_negative_gather_indices",
    # These take a constant over a convolution for the convolution over it, mix up the channels of transposed convolutions with
    # groups, and stop at constants with more axes. The passes of optkit fold as much.
    "common::fuse_conv_scale", "common::fuse_conv_bias", "common::fuse_conv_batchnorm",
    # Leaves the epsilon of a norm as it is, 1e-5, and stops at float16.
    "common::fuse_elementwise_to_batchnorm",
}  # fmt: skip
# From coremltools' choice of 16 bits for integers: the operations, and the axis along which each counts.
_SHORT = {
    "gather": "axis",
    "gather_along_axis": "axis",
    "gather_nd": "batch_dims",
    "topk": "axis",
    "squeeze": "",
}
_LONGEST = np.iinfo(np.int16).max
# From powers to their logarithms there are sums, scales and filters.
_SPANNING = frozenset({
    "abs", "add", "clip", "expand_dims", "linear", "matmul", "maximum", "mul", "pow", "real_div", "reduce_mean", "reduce_sum",
    "reduce_sum_square", "reshape", "sqrt", "square", "squeeze", "transpose",
})  # fmt: skip


def convert(
    program: Any,
    features: list[Any],
    version: int,
    *,
    fp16: bool,
    weights: Path,
    classified: Port | None = None,
) -> Any:
    """Run coremltools' own passes over a program and serialize it; its weights go into the folder ``weights``.

    Args:
        program: Of ``program.build``.
        features: The types of its inputs.
        version: Major version of the oldest iOS.
        fp16: Whether float32 inside becomes float16, as far as coremltools finds that the constants fit; what logarithms
            are taken of stays in float32, and so do squares up to the root of what they become, what sizes are rounded from, whole
            numbers that become floats again, and the angles that those make.
        weights: An empty folder.
        classified: The output that becomes a label and a dictionary.

    Returns:
        The model's protobuf.
    """
    from coremltools.converters.mil.converter import (
        ConverterRegistry,
        _reset_conversion_state,
        mil_convert_to_proto,
    )

    named = None
    if classified is not None:
        named = ct.ClassifierConfig(list(classified.labels), LABEL, classified.feature)
    with silence():
        pipeline = ct.PassPipeline()
        pipeline.remove_passes(_NEVER)
        if not fp16:
            pipeline.remove_passes(_FP16)
        else:
            option = ct.converters.mil.mil.passes.graph_pass.PassOption
            pipeline._pass_options["common::add_int16_cast"] = [
                option(option_name="op_selector", option_val=_is_short)
            ]
            pipeline._pass_options["common::add_fp16_cast"] = [
                option(option_name="op_selector", option_val=_selector(program))
            ]
        # Whether all of it still hangs together would be looked at after each of a hundred passes; once, at the end, is enough.
        program.validate = lambda **_: None
        try:
            spec, _ = mil_convert_to_proto(
                program, "milinternal", "mlprogram", ConverterRegistry, main_pipeline=pipeline, inputs=features, outputs=None,
                classifier_config=named, debug=False, specification_version=getattr(ct.target, f"iOS{version}"),
                use_default_fp16_io=False, states=[], weights_dir=str(weights),
            )  # fmt: skip
            del program.validate
            program.validate(check_essential_scope=True)
        finally:
            # Else the names of the next program would count on from those of this one.
            _reset_conversion_state()
    return spec


# The areas of boxes of hundreds of pixels are beyond float16.
_SUPPRESSION = "non_maximum_suppression"


def _selector(program: Any) -> Callable[[Any], bool]:
    """Which operations of a program are computed in float16."""

    @cache
    def kept() -> set[Any]:
        return {
            op
            for function in program.functions.values()
            for op in (*counted(function), *regained(function), *angles(function))
        }

    # The passes before give the program other operations: what it has is asked for when the first of them is looked at.
    return lambda op: not (op.op_type == _SUPPRESSION or op in kept() or _is_logged(op) or _is_spread(op))


def _is_short(op: Any) -> bool:
    """Whether the integers that an operation takes and gives fit 16 bits, as far as coremltools does not look itself.

    It looks at constants, and at the size of the axis that indices of some operations count along.
    """
    if op.op_type not in _SHORT:
        return False
    x = op.x
    if ct.converters.mil.mil.types.is_int(x.dtype) and (x.op is None or x.op.op_type != "const"):
        return False
    if op.op_type == "squeeze" or (op.op_type != "topk" and op.indices.val is not None):
        return True
    first = getattr(op, _SHORT[op.op_type]).val
    sizes = x.shape[first:][: op.indices.shape[-1]] if op.op_type == "gather_nd" else [x.shape[first]]
    return all(isinstance(n, int | np.integer) and n <= _LONGEST for n in sizes)


def _is_logged(op: Any) -> bool:
    """Whether a logarithm is taken of what an operation gives, as far as small values stay small on the way there.

    A power of sound spans more than float16 does: what is below 6e-8 would be 0, and far from the rest once it is logged.
    """
    found, seen = [op], {op}
    for one in found:
        if one.op_type == "log":
            return True
        if one.op_type in _SPANNING:
            after = [child for output in one.outputs for child in output.child_ops if child not in seen]
            found += after
            seen.update(after)
    return False


# What lies between a square and the root of what it becomes.
_BETWEEN = frozenset({
    "add", "clip", "expand_dims", "maximum", "reduce_mean", "reduce_sum", "relu", "reshape", "squeeze", "sub", "threshold",
})  # fmt: skip
_ROOTS = ("rsqrt", "sqrt")


def _is_spread(op: Any) -> bool:
    """Whether an operation lies between squares and the root of their sum or mean, both included, or gives the mean of the squares.

    A square of 256 is beyond float16, and residual streams of decoders reach thousands; of ``mean(x^2) - mean(x)^2`` where both
    agree to three digits float16 leaves nothing, and the root of that is divided by.
    """
    if op.op_type == "reduce_mean" and any(_is_square(c) and _is_spread(c) for c in _children(op)):
        return True
    if not (_is_square(op) or op.op_type in _ROOTS or _leads(op)):
        return False
    rooted = op.op_type in _ROOTS or any(
        c.op_type in _ROOTS for one in _closure(op, _children) for c in _children(one)
    )
    squared = _is_square(op) or any(_is_square(p) for one in _closure(op, _parents) for p in _parents(one))
    return rooted and squared


def _is_square(op: Any) -> bool:
    if op.op_type == "pow":
        return op.y.val is not None and bool(np.all(op.y.val == 2))
    return op.op_type == "square" or (op.op_type == "mul" and op.x is op.y)


def _leads(op: Any) -> bool:
    """Whether it may lie between; a factor may be a constant."""
    if op.op_type in ("mul", "real_div"):
        return op.y.val is not None or (op.op_type == "mul" and op.x.val is not None)
    return op.op_type in _BETWEEN


def _closure(op: Any, steps: Callable[[Any], list[Any]]) -> list[Any]:
    """The operation, and what is reached from it by ``steps`` through operations that may lie between."""
    found, seen = [op], {op}
    for one in found:
        more = [o for o in dict.fromkeys(steps(one)) if o not in seen and _leads(o)]
        found += more
        seen.update(more)
    return found


def _parents(op: Any) -> list[Any]:
    return [v.op for v in (op.inputs.get("x"), op.inputs.get("y")) if v is not None and v.op is not None]


def _children(op: Any) -> list[Any]:
    return [child for output in op.outputs for child in output.child_ops]


def write(spec: Any, folder: Path, metadata: Mapping[str, str]) -> None:
    """Write the protobuf and the manifest into the package ``folder``; the weights are there already.

    Args:
        spec: Of ``convert``.
        folder: Of the package.
        metadata: ``author``, ``license``, ``version`` and ``description``, each where it is said.
    """
    own = spec.description.metadata
    own.author, own.license = metadata.get("author", ""), metadata.get("license", "")
    own.versionString, own.shortDescription = metadata.get("version", ""), metadata.get("description", "")
    (folder / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    items = {
        str(uuid.uuid5(_SPACE, path)).upper(): {
            "author": "com.apple.CoreML", "description": f"CoreML Model {what}", "name": Path(path).name, "path": path
        }
        for path, what in (("com.apple.CoreML/model.mlmodel", "Specification"), ("com.apple.CoreML/weights", "Weights"))
    }  # fmt: skip
    manifest = {
        "fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": next(iter(items))
    }  # fmt: skip
    (folder / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")
