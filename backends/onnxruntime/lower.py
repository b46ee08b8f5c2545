"""ONNX Runtime: the artifact is the ONNX file, its session options and nothing else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import onnx_ir as ir
import onnxruntime as ort
from pydantic import Field

from optkit.backends.base import Backend, Executed, Options
from optkit.backends.onnxruntime.placement import PLACEMENTS
from optkit.backends.onnxruntime.profile import conv_weights, read_profile
from optkit.backends.onnxruntime.session import OnnxRuntimeSession
from optkit.backends.onnxruntime.spelling import spelled
from optkit.graph import attribute, walk
from optkit.reference import session_options
from optkit.saturation import emulate
from optkit.store import save
from optkit.targets import target as find_target

if TYPE_CHECKING:
    import numpy as np

    from optkit.backends.base import Session
    from optkit.placement import Placement
    from optkit.targets import Target

MODEL = "model.onnx"


class OnnxRuntimeOptions(Options):
    """Session options.

    Attributes:
        disabled_optimizers: Optimizers of ONNX Runtime that stay off, by their names. SkipLayerNormFusion is off by
            default: its kernel takes longer than the Add and LayerNormalization that it replaces.
        threads: Threads of one operator; 0 leaves the choice to ONNX Runtime (one for each core).
        streams: Requests that are meant to run at the same time, in threads of the caller; each has ``threads`` of its own.
        prepacking: Repack weights when loading: faster products, and a second copy of the weights.
        accuracy_level: Of products with weights in 4 bits, by ONNX Runtime's numbers: 1 computes in float32, 4 rounds the
            activations to int8, a scale for each block.
    """

    disabled_optimizers: tuple[str, ...] = ("SkipLayerNormFusion",)
    threads: int = Field(default=0, ge=0)
    streams: int = Field(default=1, ge=1)
    prepacking: bool = True
    accuracy_level: Literal[1, 4] = 1


class OnnxRuntime(Backend):
    """ONNX Runtime's CPU execution provider."""

    name: ClassVar[str] = "onnxruntime"
    options: ClassVar[type[Options]] = OnnxRuntimeOptions
    placements: ClassVar[Mapping[str, Placement]] = PLACEMENTS

    def available(self) -> str | None:
        """Always: onnxruntime is a dependency of optkit itself."""
        return None

    def unsupported(self, node: ir.Node, target: Target) -> str | None:
        """ONNX Runtime runs nearly all of the standard; of types it lacks arithmetic in bfloat16."""
        if node.domain == "" and node.op_type in ("GRU", "LSTM", "RNN") and attribute(node, "layout", 0):
            return "ONNX Runtime's CPU provider takes no batch that comes first (layout 1)"
        product = node.domain == "" and node.op_type in ("MatMul", "Gemm", "Conv")
        if product and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.BFLOAT16:
            return "ONNX Runtime's CPU provider has no bfloat16 kernel for it"
        return None

    def lower(self, model: ir.Model, target: Target, options: OnnxRuntimeOptions, path: Path) -> None:
        """Write ``model.onnx``, with weights beside it where they do not fit into one file."""
        save(spelled(model), path / MODEL)

    def load(
        self, path: Path, target: Target, options: OnnxRuntimeOptions, *, threads: int | None = None
    ) -> Session:
        """Open the file with the options."""
        return OnnxRuntimeSession(path / MODEL, options, threads=threads)

    def parallel(self, options: OnnxRuntimeOptions, *, threads: int, streams: int) -> OnnxRuntimeOptions:
        """A session runs any number of requests, each on the threads of one operator: the caller's thread among them."""
        return options.model_copy(update={"threads": max(1, threads // streams), "streams": streams})

    def parallelism(self, options: OnnxRuntimeOptions) -> tuple[int, int]:
        """Threads of all streams, and streams."""
        return options.threads * options.streams, options.streams

    def predict(
        self, path: Path, target: Target, options: OnnxRuntimeOptions, *, threads: int | None = None
    ) -> Session:
        """With the saturation in 16 bits that the target has and this machine has not, or without it the other way round."""
        here = find_target("cpu").saturates
        if target.saturates == here or target.runs_here:
            return self.load(path, target, options, threads=threads)
        if here:
            return OnnxRuntimeSession(path / MODEL, options, threads=threads, precise=True)
        model = ir.load(path / MODEL)
        if not emulate(model):
            return self.load(path, target, options, threads=threads)
        # Open files outlive their names, so the session keeps weights that lie beside the graph.
        with tempfile.TemporaryDirectory(prefix="optkit-") as folder:
            save(model, Path(folder) / MODEL)
            return OnnxRuntimeSession(Path(folder) / MODEL, options, threads=threads)

    def prediction(self, target: Target) -> str | None:
        """Whether ``predict`` adds saturation or takes it away."""
        here = find_target("cpu").saturates
        if target.saturates == here or target.runs_here:
            return None
        if here:
            return "products of u8 by s8 computed without the saturation in 16 bits that this processor has"
        return "saturation of vpmaddubsw in 16 bits, which this processor does not have, emulated"

    def evidence(self, path: Path, target: Target, options: OnnxRuntimeOptions) -> frozenset[str]:
        """The same ONNX Runtime took the file, for another processor; its operators were read back there."""
        return frozenset({"inspected", "proxy_compiled"})

    def deferred(self, path: Path, target: Target, options: OnnxRuntimeOptions) -> Sequence[str]:
        """Time it, and hold the numbers against the prediction."""
        return (
            f"time it on a processor of the kind {target.name}: optkit bench FOLDER --against MODEL",
            "hold the metric there against what was found here: optkit eval FOLDER --against MODEL --eval FILE",
        )

    def executed(
        self, path: Path, target: Target, options: OnnxRuntimeOptions, feeds: Mapping[str, np.ndarray]
    ) -> Sequence[Executed]:
        """One run under ONNX Runtime's profiler."""
        with tempfile.TemporaryDirectory(prefix="optkit-") as folder:
            shown = options.model_copy(update={"prepacking": False})
            session = OnnxRuntimeSession(path / MODEL, shown, threads=1, profile=Path(folder) / "profile")
            session.run(feeds)
            file = session.end_profiling()
            session.close()
            return read_profile(json.loads(file.read_text()), conv_weights(ir.load(path / MODEL)))

    def runner(
        self, model: bytes, feeds: Mapping[str, np.ndarray], precision: str
    ) -> Callable[[], object] | None:
        """A session on the bytes; float32 and int8 are what its kernels multiply in."""
        if precision not in ("fp32", "int8"):
            return None
        session = ort.InferenceSession(model, session_options(threads=1), providers=["CPUExecutionProvider"])
        return partial(session.run, None, dict(feeds))

    def variants(
        self,
        model: ir.Model,
        target: Target,
        options: Any,
        path: Path,
        feeds: Sequence[Mapping[str, np.ndarray]],
    ) -> Sequence[OnnxRuntimeOptions]:
        """SkipLayerNormFusion on, where the graph has layer norms that it could take."""
        if not any(node.op_type == "LayerNormalization" for node in walk(model)):
            return ()
        kept = tuple(name for name in options.disabled_optimizers if name != "SkipLayerNormFusion")
        return (
            ()
            if kept == options.disabled_optimizers
            else (options.model_copy(update={"disabled_optimizers": kept}),)
        )
