"""Core AI: the artifact is an ``.aimodel`` for iOS 27 and macOS 27, run here by the runtime in Apple's Linux wheel.

Experimental. The graph is translated by ``coreai-onnx``, the best-kept public converter, and then held against ONNX Runtime as
every artifact is. The runtime on Linux computes what Apple's does, slowly: it verifies, and says nothing about speed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import coreai_onnx
import onnx_ir as ir
from coreai.authoring import AIModelAsset
from pydantic import Field

from optkit.backends.base import Backend, Executed, Options
from optkit.backends.coreai.program import products
from optkit.backends.coreai.session import FUNCTION, INTERFACE, MODEL, CoreAiSession, quietly
from optkit.backends.sizes import fixed, inputs, signatures
from optkit.data import TensorSpec
from optkit.errors import ModelError, UnsupportedOpError, UsageError
from optkit.graph import describe, walk
from optkit.rewrite import Names, register, substitute

if TYPE_CHECKING:
    import numpy as np

    from optkit.backends.base import Mark, Session, Task
    from optkit.targets import Target

_SUPPORTED = frozenset(coreai_onnx.supported_ops())
# What is computed from sizes is a constant once the inputs have theirs.
_SIZES = frozenset({"Constant", "ConstantOfShape", "NonZero", "Range", "Shape", "Size"})


class CoreAiOptions(Options):
    """How the program is made.

    Attributes:
        shapes: By free axis of the inputs, its size.
        usual: Shapes of inputs in the calibration data, for axes that ``shapes`` leaves out; a first axis without either is 1.
    """

    shapes: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    usual: dict[str, tuple[int, ...]] = Field(default_factory=dict)


class CoreAi(Backend):
    """Programs of fixed sizes, translated by ``coreai-onnx``; run by Core AI's runtime for Linux, or on a Mac by its own."""

    name: ClassVar[str] = "coreai"
    options: ClassVar[type[Options]] = CoreAiOptions
    packages: ClassVar[tuple[str, ...]] = ("coreai-core", "coreai-onnx")
    generic: ClassVar[bool] = False
    # It computes what devices do, ten to a hundred times as slowly as other runtimes of this machine.
    stands_in: ClassVar[bool] = True

    def available(self) -> str | None:
        """None: the packages bring writer and runtime."""
        return None

    def sizes(self, model: ir.Model, options: CoreAiOptions) -> Mapping[str, int]:
        """Those of the inputs, as far as they are known without data."""
        return signatures(model, options.shapes, options.usual, partial=True)[0].sizes

    def unsupported(self, node: ir.Node, target: Target) -> str | None:
        """What the converter has no translation for."""
        op = node.op_type if node.domain == "" else f"{node.domain}::{node.op_type}"
        if op in _SUPPORTED or (node.domain == "" and node.op_type in _SIZES):
            return None
        return f"coreai-onnx has no translation of {op.replace('::', '.')} into Core AI"

    def lower(self, model: ir.Model, target: Target, options: CoreAiOptions, path: Path) -> None:
        """Write ``model.aimodel`` and ``interface.json``.

        Raises:
            UsageError: The options name what the model does not have, or leave a size open.
            UnsupportedOpError: Nodes turn out not to fit once all sizes are known.
            ModelError: A shape depends on data, or the converter fails at a node.
        """
        (signature,) = signatures(model, options.shapes, options.usual)
        sized = _floats_of_int32(fixed(model, signature.sizes))
        nodes = {str(n.name): describe(n) for n in walk(sized)}
        try:
            with warnings.catch_warnings():
                # Of float16, whose support is partial: what does not run here is an error all the same.
                warnings.simplefilter("ignore")
                program = coreai_onnx.convert(ir.to_proto(sized))
        except coreai_onnx.UnsupportedOpError as error:
            problems = [
                (nodes.get(name, name), f"coreai-onnx has no translation of {op} into Core AI")
                for op, names in sorted(error.missing.items())
                for name in names
            ]
            raise UnsupportedOpError(
                f"Core AI for {target.name}", problems, hint="choose another --backend"
            ) from error
        except coreai_onnx.ConversionError as error:
            where = nodes.get(error.node_name, f"{error.node_name} ({error.op_key})")
            raise ModelError(
                f"{where}: coreai-onnx cannot translate it: {error.__cause__ or error}",
                hint="choose another --target; Core ML takes more operators",
            ) from error
        program.save_asset(path / MODEL)
        _date(path / MODEL / "metadata.json")
        told = {
            "inputs": [TensorSpec.of(v).told() for v in inputs(sized)],
            "outputs": [TensorSpec.of(v).told() for v in sized.graph.outputs],
        }
        (path / INTERFACE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    def load(
        self, path: Path, target: Target, options: CoreAiOptions, *, threads: int | None = None
    ) -> Session:
        """Open the program in the runtime of this machine."""
        return CoreAiSession(path)

    def evidence(self, path: Path, target: Target, options: CoreAiOptions) -> frozenset[str]:
        """What was read back from the program."""
        return frozenset({"inspected"})

    def deferred(self, path: Path, target: Target, options: CoreAiOptions) -> Sequence[str]:
        """What needs Apple's hardware."""
        return (
            "Core AI is experimental here, and its packages are a beta: executed by its runtime for Linux, not on Apple hardware",
            f"compile for a device: xcrun coreai-build {MODEL} (Xcode 27), which also says what each compute unit takes",
            "latency: on the device, iOS 27 or macOS 27",
        )

    def finalize(
        self,
        path: Path,
        target: Target,
        options: CoreAiOptions,
        task: Task,
        mark: Mark,
        *,
        force: bool = False,
    ) -> Any:
        """Nothing yet.

        Raises:
            UsageError: Says with what Apple compiles it.
        """
        raise UsageError(
            "Core AI is experimental: optkit has no steps of its own for it on a device yet",
            hint=f"xcrun coreai-build {path / MODEL} (Xcode 27)",
        )

    def executed(
        self, path: Path, target: Target, options: CoreAiOptions, feeds: Mapping[str, np.ndarray]
    ) -> Sequence[Executed]:
        """The operations of the stored program, and the types that their products have in it."""
        with quietly():
            return products(AIModelAsset.load(path / MODEL).program, FUNCTION)


def _date(metadata: Path) -> None:
    """The same model gives the same bytes: no time of its creation, and keys in order."""
    told = json.loads(metadata.read_bytes()) | {"creationDate": "19700101T000000Z"}
    metadata.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _floats_of_int32(model: ir.Model) -> ir.Model:
    """With biases on the grid of the products in float: Core AI has grids of 8 bits alone. The numbers are the same."""
    names = Names(model)
    for node in tuple(model.graph):
        stored = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if stored is None or stored.dtype != ir.DataType.INT32 or stored.const_value is None:
            continue
        scale = node.inputs[1]
        if scale is None or scale.const_value is None:
            continue
        # A zero point of int32 is 0 (ONNX, DequantizeLinear).
        floats = stored.const_value.numpy().astype("float32") * scale.const_value.numpy()
        substitute(node.outputs[0], register(model.graph, names.new(f"{stored.name}/floats"), floats))
        model.graph.remove(node, safe=True)
    return model
