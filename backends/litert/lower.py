"""LiteRT: the artifact is a ``.tflite`` file, with a subgraph for each set of sizes that its inputs may have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Discriminator, Field, Tag

from optkit.backends.base import Backend, Executed, Options
from optkit.backends.litert.emit import ROWS, Context
from optkit.backends.litert.flat import File
from optkit.backends.litert.kernels import NotTakenError
from optkit.backends.litert.placement import PLACEMENTS
from optkit.backends.litert.profile import operators, weights
from optkit.backends.litert.session import INTERFACE, MODEL, LiteRtSession
from optkit.backends.litert.trial import survives
from optkit.backends.sizes import Count, fixed, inputs, signatures, spelling
from optkit.control_flow import BODIES, flatten
from optkit.decompositions import RULES
from optkit.errors import ModelError, OptkitError, UnsupportedOpError
from optkit.graph import describe
from optkit.rewrite import Builder, Names, remove, remove_unused, substitute

if TYPE_CHECKING:
    from optkit.backends.base import Session
    from optkit.placement import Placement
    from optkit.targets import Target

_MOST_AXES = 8


class LiteRtOptions(Options):
    """How the file is made.

    Attributes:
        shapes: By free axis of the inputs, its size, or a list of sizes; lists are as long as one another, and belong together
            entry by entry: each is a signature of the file, and all share the weights.
        usual: Shapes of inputs in the calibration data, for axes that ``shapes`` leaves out; a first axis without either is 1.
        threads: Of a run; 0 leaves it to LiteRT.
    """

    shapes: dict[
        str,
        Annotated[
            Annotated[Count, Tag("size")] | Annotated[tuple[Count, ...], Field(min_length=1), Tag("sizes")],
            Discriminator(spelling),
        ],
    ] = Field(default_factory=dict)
    usual: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    threads: int = Field(default=0, ge=0)


class LiteRt(Backend):
    """Flatbuffers written from the graph; run by LiteRT on this machine's processor."""

    name: ClassVar[str] = "litert"
    options: ClassVar[type[Options]] = LiteRtOptions
    placements: ClassVar[Mapping[str, Placement]] = PLACEMENTS
    packages: ClassVar[tuple[str, ...]] = ("ai-edge-litert",)
    generic: ClassVar[bool] = False
    dynamic_in_floats: ClassVar[bool] = True
    halves_in_floats: ClassVar[bool] = True
    doubles_in_floats: ClassVar[bool] = True

    def available(self) -> str | None:
        """None: the package brings writer and runtime."""
        return None

    def sizes(self, model: ir.Model, options: LiteRtOptions) -> Mapping[str, int]:
        """Those of the first signature, as far as they are known without data."""
        return signatures(model, options.shapes, options.usual, partial=True)[0].sizes

    def unsupported(self, node: ir.Node, target: Target) -> str | None:
        """What LiteRT cannot express of a node."""
        if node.op_type == "Constant" and node.domain == "":
            return None
        row = ROWS.get(node.op_type) if node.domain == "" else None
        if row is None:
            # Sizes that are computed are constants once the inputs have theirs.
            if node.op_type in _SIZES and node.domain == "":
                return None
            return f"optkit has no translation of {node.domain + '.' if node.domain else ''}{node.op_type} into LiteRT"
        for value in (*node.inputs, *node.outputs):
            if value is None or value.dtype is None:
                continue
            if value.dtype.name not in _TYPES:
                return f"{value.name!r} is of type {value.dtype.name.lower()}, which LiteRT has not"
            if value.shape is not None and len(value.shape) > _MOST_AXES and value.const_value is None:
                return f"{value.name!r} has {len(value.shape)} axes, and LiteRT has at most {_MOST_AXES}"
        return None if row.refuse is None or _sized(node) else row.refuse(node)

    def settles(self, node: ir.Node) -> bool:
        """Whether something may stand for it at the sizes of the file, it may be written out step by step, or be a number that follows from them."""
        if node.domain != "" or node.op_type not in RULES.keys() | ROWS.keys() | BODIES.keys():
            return False
        if node.op_type in BODIES:
            return True
        return _sized(node) if node.op_type in RULES else _is_number(node.outputs[0])

    def lower(self, model: ir.Model, target: Target, options: LiteRtOptions, path: Path) -> None:
        """Write ``model.tflite`` and ``interface.json``.

        Raises:
            UsageError: The options name what the model does not have, or leave a size open.
            UnsupportedOpError: Nodes turn out not to fit once all sizes are known.
            ModelError: A shape depends on data, or LiteRT dies of the file.
        """
        chosen = signatures(model, options.shapes, options.usual)
        file, shapes = File(), {}
        for signature in chosen:
            sized = fixed(model, signature.sizes)
            if flatten(sized):
                sized = fixed(sized, signature.sizes)
            _write_out(sized)
            problems = [(describe(n), reason) for n in sized.graph if (reason := _refused(n)) is not None]
            floats = list[str]()
            if not problems:
                floats, problems = _emit(file, sized, signature.key)
            if problems:
                raise UnsupportedOpError(
                    f"LiteRT for {target.name}", problems, hint="choose another --backend"
                )
            if floats and (why := target.refusal("fp32")) is not None:
                raise UnsupportedOpError(
                    f"LiteRT for {target.name}",
                    [(name, f"a product of floats: {why}") for name in dict.fromkeys(floats)],
                    hint="all products have to be quantized: -r auto or litert-int8 with --calib FOLDER; those that stay in float cannot run there",
                )
            shapes[signature.key] = [list(map(int, v.shape)) for v in inputs(sized)]  # type: ignore[arg-type]
        (path / MODEL).write_bytes(file.bytes())
        survives(path / MODEL)
        told = {
            "inputs": _ports(inputs(model), list(shapes.values())),
            "outputs": _ports(model.graph.outputs, None),
            "signatures": shapes,
        }
        (path / INTERFACE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    def load(
        self, path: Path, target: Target, options: LiteRtOptions, *, threads: int | None = None
    ) -> Session:
        """Open the file."""
        return LiteRtSession(path, (options.threads or None) if threads is None else threads)

    def weights(self, path: Path) -> dict[str, int] | None:
        """Of the file: what float16 holds is in 16 bits there, and in 32 in the graph."""
        return weights(path / MODEL) or None

    def parallel(self, options: LiteRtOptions, *, threads: int, streams: int) -> LiteRtOptions | None:
        """Threads of one request; a file runs one at a time."""
        return options.model_copy(update={"threads": threads}) if streams == 1 else None

    def parallelism(self, options: LiteRtOptions) -> tuple[int, int]:
        """Threads, and one request at a time."""
        return options.threads, 1

    def deferred(self, path: Path, target: Target, options: LiteRtOptions) -> Sequence[str]:
        """What the device has to do."""
        if target.name == "edge-tpu":
            return (
                f"compile for the Edge TPU: edgetpu_compiler {MODEL}, which also says what of it runs there",
            )
        return (
            f"latency on {target.name}: benchmark_model --graph={MODEL} --num_threads=1 --use_xnnpack=true (LiteRT's own tool), there",
        )

    def executed(
        self, path: Path, target: Target, options: LiteRtOptions, feeds: Mapping[str, np.ndarray]
    ) -> Sequence[Executed]:
        """The operators of the file; one run says what they take together, which is shared out by products."""
        session = LiteRtSession(path, 1)
        found = operators(session, path / MODEL, feeds)
        session.close()
        return found


_SIZES = frozenset({"Shape", "Size", "ConstantOfShape", "Range", "NonZero"})
_TYPES = frozenset({"FLOAT", "FLOAT16", "INT8", "UINT8", "INT32", "INT64", "BOOL"})


def _sized(node: ir.Node) -> bool:
    """Whether it is about sizes, or has sizes that are not known yet: it is asked again once they are."""
    return any(
        v is not None and (v.shape is None or not v.shape.is_static()) for v in (*node.inputs, *node.outputs)
    )


def _is_number(value: ir.Value) -> bool:
    whole = value.dtype is not None and value.dtype.is_integer()
    return whole and value.shape is not None and value.shape.is_static() and prod(value.shape.numpy()) == 1


def _write_out(model: ir.Model) -> None:
    """Put what stands for nodes that LiteRT does not take in their places, where that depends on sizes, which are known by now."""
    names, left = Names(model), list(model.graph)
    while left:
        node = left.pop()
        if node.domain != "" or _refused(node) is None:
            continue
        for rule in RULES.get(node.op_type, ()):
            before = set(model.graph)
            result = rule(Builder(node, names), node)
            made = [n for n in model.graph if n not in before]
            # What is left of its own kind has to be simpler.
            if result is not None and all(
                n.op_type != node.op_type or _refused(n) is None or len(n.inputs) < len(node.inputs)
                for n in made
            ):
                substitute(node.outputs[0], result)
                remove(node)
                left += made
                break
            remove_unused(made)


def _refused(node: ir.Node) -> str | None:
    if node.op_type == "Constant":
        return None
    row = ROWS.get(node.op_type) if node.domain == "" else None
    if node.op_type in BODIES and node.domain == "":
        open_ = "which branch it takes" if node.op_type == "If" else "how many steps it takes"
        return (
            f"LiteRT gets {node.op_type} written out alone; {open_} depends on data, or it has too many nodes"
        )
    if row is None:
        why = " in this form" if node.op_type in RULES else "; it depends on data"
        return f"optkit has no translation of {node.op_type} into LiteRT{why}"
    return row.refuse(node) if row.refuse is not None else None


def _emit(file: File, model: ir.Model, key: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Add a subgraph; gives the names of products that are computed in floats, and nodes that no kernel takes with the reason."""
    context, problems = Context(file, key), []
    given = {}
    for value in inputs(model):
        assert value.shape is not None and value.dtype is not None
        tensor = context.graph.tensor(str(value.name), [int(d) for d in value.shape], value.dtype.numpy())  # type: ignore[arg-type]
        given[str(value.name)] = context.put(value, tensor)
    for node in model.graph:
        if node in context.done or node.op_type == "Constant":
            continue
        context.at = str(node.name or "")
        try:
            ROWS[node.op_type].emit(context, node)
        except OptkitError:
            raise
        except NotTakenError as error:
            problems.append((describe(node), str(error)))
            context.skip(node)
        except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{describe(node)}: cannot be written for LiteRT: {type(error).__name__}: {error}",
                hint="this is a mistake in optkit: please report it with the model",
            ) from error
    if problems:
        return [], problems
    try:
        outputs = {str(v.name): context.result(v) for v in model.graph.outputs}
    except NotTakenError as error:
        raise ModelError(f"an output of the model: {error}", hint="leave it out of the model") from error
    file.add(context.graph, key, given, outputs)
    return context.graph.products(integers=False), []


def _ports(
    values: Sequence[ir.Value], shapes: Sequence[Sequence[Sequence[int]]] | None
) -> list[dict[str, Any]]:
    """Names, types and shapes; a size that differs between signatures is None."""
    found = []
    for index, value in enumerate(values):
        assert value.dtype is not None
        if shapes is not None:
            rows = [s[index] for s in shapes]
            shape: list[int | None] = [a[0] if len(set(a)) == 1 else None for a in zip(*rows, strict=True)]
        else:
            shape = [d if isinstance(d, int) else None for d in value.shape or ()]
        found.append({"name": value.name, "dtype": value.dtype.numpy().name, "shape": shape})
    return found
