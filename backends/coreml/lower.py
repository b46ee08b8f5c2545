"""Core ML: the artifact is an ``.mlpackage`` with an ML Program, and what its inputs and outputs are in the model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from pydantic import Field

from optkit.backends.base import Backend, Eligible, Executed, Finished, Options
from optkit.backends.coreml.eligibility import eligibility
from optkit.backends.coreml.emit import ROWS
from optkit.backends.coreml.emit.quant import stored_constant
from optkit.backends.coreml.finalize import finalize, is_device
from optkit.backends.coreml.halves import saturate
from optkit.backends.coreml.interface import Picture, Port, describe_ports
from optkit.backends.coreml.package import DATA, PACKAGE, convert, write
from optkit.backends.coreml.placement import PLACEMENTS
from optkit.backends.coreml.program import build
from optkit.backends.coreml.quiet import silence
from optkit.backends.coreml.reference.program import Package
from optkit.backends.coreml.session import MacSession, ReferenceSession, has_core_ml
from optkit.backends.coreml.shapes import Axes, Size, axes, fix, keys
from optkit.backends.coreml.validate import problems
from optkit.errors import ModelError, UnsupportedOpError, UsageError
from optkit.graph import constant, describe, graphs, walk
from optkit.inference import infer

if TYPE_CHECKING:
    from optkit.backends.base import Mark, Session, Task
    from optkit.placement import Placement
    from optkit.targets import Target

# Where neither options nor target say: the oldest with all compressed forms.
_USUAL = 18
# Of files that ONNX Runtime's dynamic quantization wrote.
_IN_INTEGERS = frozenset({
    "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat",
})  # fmt: skip
# What pixels become.
_COLORS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


class CoreMlOptions(Options):
    """How the package is made.

    Attributes:
        precision: What float32 becomes inside. With float16 the inputs and outputs stay as they are.
        deployment: Oldest system that shall run it; ``auto`` is the target's.
        shapes: By free axis of the inputs, its size, a list of sizes, or ``{min, max, default}``; else 1 to 4096.
        usual: Shapes of inputs in the calibration data; they are the defaults of ranges, which the Neural Engine runs at.
        pictures: Inputs that take pictures; the network gets ``pixel * scale + bias``.
        labels: The output with the probabilities of classes, and their names: an application gets the likeliest, and a
            dictionary of all.
        states: Inputs that Core ML keeps between runs, and the outputs with their next values (iOS 18 on).
        units: What a Mac runs it on.
        metadata: ``author``, ``license``, ``version`` and ``description``, kept in the package.
    """

    precision: Literal["fp32", "fp16"] = "fp32"
    deployment: Literal["auto", "iOS16", "iOS17", "iOS18"] = "auto"
    shapes: dict[str, Size] = Field(default_factory=dict)
    usual: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    pictures: dict[str, Picture] = Field(default_factory=dict)
    labels: dict[str, tuple[str, ...]] = Field(default_factory=dict, max_length=1)
    states: dict[str, str] = Field(default_factory=dict)
    units: Literal["ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"] = "ALL"
    metadata: dict[Literal["author", "license", "version", "description"], str] = Field(default_factory=dict)


def version(options: CoreMlOptions, target: Target) -> int:
    """Major version of the oldest iOS that the package is for."""
    named = target.system if options.deployment == "auto" else options.deployment
    return int(named.removeprefix("iOS")) if named else _USUAL


class CoreMl(Backend):
    """ML Programs through coremltools' builder and its passes; run by the reference evaluator, or on a Mac by Core ML."""

    name: ClassVar[str] = "coreml"
    options: ClassVar[type[Options]] = CoreMlOptions
    placements: ClassVar[Mapping[str, Placement]] = PLACEMENTS
    packages: ClassVar[tuple[str, ...]] = ("coremltools",)
    generic: ClassVar[bool] = False
    dynamic_in_floats: ClassVar[bool] = True
    # The evaluator says what a package computes, and nothing about how fast.
    stands_in: ClassVar[bool] = not has_core_ml()

    def available(self) -> str | None:
        """None: writing and evaluating packages works wherever coremltools does."""
        return None

    def ready(self, target: Target, options: CoreMlOptions) -> None:
        """Refuse a precision that the target does not compute in.

        Raises:
            UsageError: It does not.
        """
        if (why := target.lacks.get(options.precision)) is not None:
            raise UsageError(
                f"options.precision={options.precision} for {target.name}: {why}", hint="-r coreml-fp16"
            )

    def exact(self, options: CoreMlOptions) -> CoreMlOptions:
        """The same in float32."""
        return options.model_copy(update={"precision": "fp32"})

    def widest(self, options: CoreMlOptions, target: Target) -> CoreMlOptions:
        """In float32, but for what computes in float16 alone."""
        return options if "fp32" in target.lacks else self.exact(options)

    def fallback(self, target: Target) -> str:
        """Float32, but for what computes in float16 alone."""
        return "coreml-fp16" if "fp32" in target.lacks else self.floor

    def narrows(self, options: CoreMlOptions) -> bool:
        """Pictures are whole numbers up to 255, and states are kept in float16 whatever the program computes in."""
        return bool(options.pictures or options.states)

    def sizes(self, model: ir.Model, options: CoreMlOptions) -> Mapping[str, int]:
        """Those that are fixed, the first that are listed, and the defaults of ranges."""
        asked = _chosen(model, options)
        first = {k: sizes[0] for k, sizes in asked.listed.items()}
        ranges = {k: r.usual for k, r in asked.ranged.items() if r.usual > 1}
        return {**asked.fixed, **first, **ranges}

    def fed(
        self, options: CoreMlOptions, feeds: Mapping[str, np.ndarray], *, drawn: bool
    ) -> dict[str, np.ndarray]:
        """Pixels, where pictures are taken."""
        return {
            name: options.pictures[name].fed(array, drawn=drawn) if name in options.pictures else array
            for name, array in feeds.items()
        }

    def unsupported(self, node: ir.Node, target: Target) -> str | None:
        """What Core ML cannot express of a node."""
        row = ROWS.get(node.op_type) if node.domain == "" else None
        if row is None:
            if node.op_type == "Constant" and node.domain == "":
                return None
            if node.op_type in _IN_INTEGERS:
                return "its integers have scales that are computed in each run, and Core ML's are constant: compile the model in float"
            return f"optkit has no translation of {node.domain + '.' if node.domain else ''}{node.op_type} into Core ML"
        if stored_constant(node):
            return None
        oldest = version(CoreMlOptions(), target)
        if row.oldest > oldest:
            return f"needs iOS {row.oldest}, {target.name} is for iOS {oldest}"
        for value in (*node.inputs, *node.outputs):
            if value is None or value.dtype is None:
                continue
            if value.dtype in (ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
                return f"{value.name!r} is of type {value.dtype.name.lower()}, which Core ML has not"
            if value.shape is not None and len(value.shape) > 5 and value.const_value is None:
                return f"{value.name!r} has {len(value.shape)} axes, and Core ML has at most 5"
        return row.refuse(node) if row.refuse is not None else None

    def lower(self, model: ir.Model, target: Target, options: CoreMlOptions, path: Path) -> None:
        """Write ``model.mlpackage`` and ``interface.json``.

        Raises:
            UsageError: The options name what the model does not have, or the target does not.
            ModelError: A node turns out not to fit, or Core ML would refuse the package.
        """
        self.ready(target, options)
        oldest = version(options, target)
        chosen = _chosen(model, options)
        _check(model, options, oldest, several=len(chosen.listed) > 0)
        _refuse_newer(model, target, oldest)
        interface = describe_ports(model, chosen, options.states, options.pictures, options.labels)
        classified = next((p for p in interface.outputs if p.labels), None)
        if classified is not None:
            _check_labels(classified)
        model = model.clone()
        if model.functions:
            InlinePass()(model)
        fix(model, chosen.fixed)
        if options.precision == "fp16":
            saturate(model)
        _forget_shapes(model)
        infer(model)
        with silence():
            program, features = build(model, interface, chosen, oldest)
        package = path / PACKAGE
        weights = package / DATA / "weights"
        weights.mkdir(parents=True)
        spec = convert(
            program,
            features,
            oldest,
            fp16=options.precision == "fp16",
            weights=weights,
            classified=classified,
        )
        write(spec, package, {str(k): v for k, v in options.metadata.items()})
        interface.write(path)
        if found := problems(package):
            lines = "".join(f"\n  {p}" for p in found)
            raise ModelError(
                f"the package breaks {len(found)} rule(s) of Core ML:{lines}",
                hint="this is a mistake in optkit: please report it with the model",
            )

    def load(
        self, path: Path, target: Target, options: CoreMlOptions, *, threads: int | None = None
    ) -> Session:
        """Open the package: on a Mac in Core ML, elsewhere in the reference evaluator."""
        return MacSession(path, options.units) if has_core_ml() else ReferenceSession(path)

    def weights(self, path: Path) -> dict[str, int] | None:
        """Of the file of weights: places in palettes have a few bits there, and 32 in the graph."""
        return Package(path / PACKAGE).weights() or None

    def evidence(self, path: Path, target: Target, options: CoreMlOptions) -> frozenset[str]:
        """The rules of the loader were checked on the saved package."""
        return frozenset({"inspected"})

    def eligibility(self, path: Path, target: Target, options: CoreMlOptions) -> Sequence[Eligible]:
        """By Apple's documented rules for the Neural Engine."""
        return eligibility(path / PACKAGE)

    def deferred(self, path: Path, target: Target, options: CoreMlOptions) -> Sequence[str]:
        """What a Mac or the device has to do: outputs so far are the reference evaluator's."""
        return (
            f"verified by the reference evaluator, not executed on Apple hardware: on a Mac, optkit finalize loads {PACKAGE} in "
            "Core ML, compares its outputs and asks which unit runs what (itself never run on a Mac so far)",
            *self._left(target, here=False),
        )

    def _left(self, target: Target, *, here: bool) -> tuple[str, ...]:
        """What ``finalize`` does not do."""
        accuracy = "accuracy of Core ML itself: on a Mac, optkit eval on this artifact (loads it in Core ML)"
        latency = f"latency and where operations run: Xcode, open {PACKAGE}, Performance, on {target.name}"
        return (accuracy,) if here else (accuracy, latency)

    def finalize(
        self, path: Path, target: Target, options: CoreMlOptions, task: Task, mark: Mark, *, force: bool
    ) -> Finished:
        """Load it in Core ML on this Mac, ask for its plan, compare the outputs, measure."""
        found = finalize(path, target, options.precision, options.units, task, mark, force=force)
        return replace(found, left=self._left(target, here=is_device(target, found.device["device"])))

    def executed(
        self, path: Path, target: Target, options: CoreMlOptions, feeds: Mapping[str, np.ndarray]
    ) -> Sequence[Executed]:
        """The operations as the reference evaluator ran them; where a device runs them is not known here."""
        session = ReferenceSession(path)
        found: list[Executed] = []
        last = [time.perf_counter()]

        def watch(op: Any, arguments: Mapping[str, Any], results: list[Any]) -> None:
            now = time.perf_counter()
            found.append(executed(op, arguments, results, now - last[0]))
            last[0] = now

        session.compute(session.features(feeds), watch)
        session.close()
        return found


def executed(op: Any, arguments: Mapping[str, Any], results: list[Any], seconds: float) -> Executed:
    """One operation as it ran."""
    kind = op.outputs[0].type.kind if op.outputs else ""
    integers = op.kind in ("quantize", "dequantize")
    fmt = {"FLOAT16": "fp16", "FLOAT32": "fp32"}.get(kind, "fp32")
    return Executed(
        name=op.name, op=op.kind, where="reference evaluator", format="int8" if integers else fmt,
        macs=macs(op.kind, arguments, results), seconds=seconds,
    )  # fmt: skip


def macs(kind: str, arguments: Mapping[str, Any], results: list[Any]) -> int:
    """Multiply-accumulates of one operation with these values."""
    if kind == "conv":
        return int(results[0].size * np.prod(arguments["weight"].shape[1:]))
    if kind == "conv_transpose":
        return int(arguments["x"].size * np.prod(arguments["weight"].shape[1:]))
    if kind == "linear":
        return int(results[0].size * arguments["weight"].shape[-1])
    if kind == "matmul":
        return int(results[0].size * arguments["x"].shape[-2 if arguments.get("transpose_x") else -1])
    if kind in ("lstm", "gru", "rnn"):
        steps, batch = arguments["x"].shape[:2]
        names = ("weight_ih", "weight_hh", "weight_ih_back", "weight_hh_back")
        return int(steps * batch * sum(np.size(arguments[n]) for n in names if n in arguments))
    return 0


def _chosen(model: ir.Model, options: CoreMlOptions) -> Axes:
    """What the free axes become; pictures have their sizes among them.

    Raises:
        UsageError: An option names what the model does not have, or a picture is none.
    """
    found = axes(model, options.shapes, options.usual)
    inputs = {str(v.name): v for v in model.graph.inputs if not v.is_initializer()}
    _known("pictures", options.pictures, inputs)
    for name, picture in options.pictures.items():
        value = inputs[name]
        named, wanted = keys(value), [1, picture.channels]
        shape = [found.fixed.get(str(k), k) for k in named]
        if len(shape) != 4 or shape[:2] != wanted:
            free = [
                f"options.shapes.{k}={n}" for k, n in zip(named, wanted, strict=False) if isinstance(k, str)
            ]
            raise UsageError(
                f"options.pictures: {name!r} is {shape}, and a picture in {picture.color} is [1, {picture.channels}, height, width]",
                hint=f"give {' and '.join(free)}"
                if free
                else "G is for one channel, RGB and BGR for three, which come first",
            )
        if value.dtype not in _COLORS or name in options.states:
            what = "a state" if name in options.states else f"of type {value.dtype}"
            raise UsageError(f"options.pictures: {name!r} is {what}, and pictures become floats")
    return found


def _known(option: str, names: Iterable[str], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(
                f"options.{option}: the model has no {name!r}", hint=f"known: {', '.join(known)}"
            )


def _check(model: ir.Model, options: CoreMlOptions, oldest: int, *, several: bool) -> None:
    inputs = {str(v.name): v for v in model.graph.inputs if not v.is_initializer()}
    outputs = {str(v.name): v for v in model.graph.outputs}
    _known("states", options.states, inputs)
    _known("states", options.states.values(), outputs)
    _known("labels", options.labels, outputs)
    if options.states and oldest < 18:
        raise UsageError(f"options.states: states need iOS 18, the package is for iOS {oldest}")
    for name, output in options.states.items():
        a, b = inputs[name].shape, outputs[output].shape
        if a is None or b is None or not a.is_static() or a != b:
            raise UsageError(f"options.states: {name} {a} and {output} {b} must have one fixed shape")
        kind = inputs[name].dtype
        if kind is not None and kind.is_integer() and not np.can_cast(kind.numpy(), np.float16):
            raise UsageError(
                f"options.states: {name} is {kind.name.lower()}, and Core ML keeps float16, which has no odd numbers beyond 2048",
                hint="leave counters and positions as inputs and outputs",
            )
    free = [n for n, v in inputs.items() if v.shape is not None and not v.shape.is_static()]
    if several and len(free) > 1 and oldest < 18:
        raise UsageError(
            f"options.shapes: lists of sizes for {len(free)} inputs ({', '.join(free)}) need iOS 18, the package is for iOS {oldest}"
        )


def _check_labels(port: Port) -> None:
    names = port.labels
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UsageError(f"options.labels: {', '.join(twice)} is there twice")
    if port.shape is None or [d for d in port.shape if d != 1] != [len(names)]:
        told = list(port.shape) if port.shape is not None else "of unknown rank"
        raise UsageError(
            f"options.labels: {len(names)} names for {port.name!r}, which is {told}",
            hint="it has to be one row with a number for each name; options.shapes fixes free axes",
        )


def _refuse_newer(model: ir.Model, target: Target, oldest: int) -> None:
    """What the options' own deployment does not have, all at once."""
    found = []
    for node in walk(model):
        row = ROWS.get(node.op_type)
        if stored_constant(node):
            small = node.inputs[0] is not None and node.inputs[0].dtype in (
                ir.DataType.INT4,
                ir.DataType.UINT4,
            )
            if oldest < _USUAL and (small or "block_size" in node.attributes):
                what = "4 bits" if small else "blocks"
                found.append(
                    (describe(node), f"weights of {what} need iOS 18, the package is for iOS {oldest}")
                )
        elif row is not None and row.oldest > oldest:
            found.append((describe(node), f"needs iOS {row.oldest}, the package is for iOS {oldest}"))
        elif node.op_type == "DequantizeLinear" and oldest < 17 and constant(node.inputs[0]) is None:
            found.append(
                (describe(node), f"quantized activations need iOS 17, the package is for iOS {oldest}")
            )
    if found:
        raise UnsupportedOpError(f"Core ML for {target.name}", found, hint="raise options.deployment")


def _forget_shapes(model: ir.Model) -> None:
    """What was inferred before the inputs had their sizes, and what passes left behind."""
    for graph in graphs(model):
        for node in graph:
            for value in node.outputs:
                value.shape = None
