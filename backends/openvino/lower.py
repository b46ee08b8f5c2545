"""OpenVINO: the artifact is its own ``model.xml`` and ``model.bin``."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from onnx_ir.passes.common import InlinePass
from pydantic import Field

from optkit.backends.base import Backend, Executed, Options
from optkit.backends.openvino import cache
from optkit.backends.openvino.convert import convert
from optkit.backends.openvino.kernels import Kernel, Layer, available, fastest, layers, times
from optkit.backends.openvino.misread import misread
from optkit.backends.openvino.placement import PLACEMENTS
from optkit.backends.openvino.profile import products, read_runtime, runtime_nodes
from optkit.backends.openvino.quiet import core, ov
from optkit.backends.openvino.session import OpenVinoSession
from optkit.backends.openvino.spelling import spelled
from optkit.backends.openvino.steps import unit_steps
from optkit.errors import BackendUnavailableError
from optkit.graph import describe, walk
from optkit.store import save
from optkit.targets.host import features

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from optkit.backends.base import Session
    from optkit.placement import Placement
    from optkit.targets import Target

MODEL, WEIGHTS = "model.xml", "model.bin"


class OpenVinoOptions(Options):
    """Properties of the compiled model.

    Attributes:
        precision: Of what is not quantized. OpenVINO's own default, ``auto``, is bfloat16 wherever the processor has
            instructions for it: lossy, and slower than float32 on those without AMX that halve its rate.
        hint: What to compile for.
        streams: Requests that run at the same time; 0 leaves it to the hint.
        threads: Of all streams together; 0 leaves it to OpenVINO (one for each core).
        shapes: Of all inputs, as they usually are: they run in a compiled model without free axes. None takes them from the
            calibration data where most batches are alike; inputs of other shapes run all the same.
        kernels: Of convolutions, by the layer's name: which of oneDNN's implementations comes before OpenVINO's choice, as
            measured on this machine.
        cache: Keep the compiled model of a finished artifact in ``$OPTKIT_CACHE``.
    """

    precision: Literal["f32", "bf16", "auto"] = "f32"
    hint: Literal["latency", "throughput"] = "latency"
    streams: int = Field(default=0, ge=0)
    threads: int = Field(default=0, ge=0)
    shapes: dict[str, tuple[int, ...]] | None = None
    kernels: dict[str, Kernel] = Field(default_factory=dict)
    cache: bool = True


def settings(options: OpenVinoOptions, threads: int | None = None) -> dict[str, str | int]:
    """The properties that ``options`` stand for, by OpenVINO's names."""
    chosen: dict[str, str | int] = {"PERFORMANCE_HINT": options.hint.upper()}
    if options.precision != "auto":
        chosen["INFERENCE_PRECISION_HINT"] = options.precision
    if options.precision == "f32":
        # Else products with weights in few bits quantize their activations, and attention its cache.
        chosen |= {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
    if options.streams:
        chosen["NUM_STREAMS"] = options.streams
    if count := options.threads if threads is None else threads:
        chosen["INFERENCE_NUM_THREADS"] = count
    return chosen


class OpenVino(Backend):
    """OpenVINO's CPU plugin."""

    name: ClassVar[str] = "openvino"
    options: ClassVar[type[Options]] = OpenVinoOptions
    placements: ClassVar[Mapping[str, Placement]] = PLACEMENTS
    packages: ClassVar[tuple[str, ...]] = ("openvino",)

    def available(self) -> str | None:
        """None where the CPU plugin loads."""
        return None if "CPU" in core().available_devices else "this build of OpenVINO has no CPU plugin"

    def exact(self, options: OpenVinoOptions) -> OpenVinoOptions:
        """The same in float32."""
        return options.model_copy(update={"precision": "f32"})

    def parallel(self, options: OpenVinoOptions, *, threads: int, streams: int) -> OpenVinoOptions:
        """Streams of OpenVINO, which share the threads evenly."""
        hint = "latency" if streams == 1 else "throughput"
        return options.model_copy(update={"hint": hint, "streams": streams, "threads": threads})

    def parallelism(self, options: OpenVinoOptions) -> tuple[int, int]:
        """Threads of all streams, and streams."""
        return options.threads, max(1, options.streams)

    def unsupported(self, node: ir.Node, target: Target) -> str | None:
        """What it would compute otherwise than the node says; what it refuses depends on more, and ``lower`` tries and says it."""
        return misread(node)

    def lower(self, model: ir.Model, target: Target, options: OpenVinoOptions, path: Path) -> None:
        """Write ``model.xml`` and ``model.bin``; weights keep their formats.

        Raises:
            BackendUnavailableError: The processor, or the target, has no instructions for the precision.
            ModelError: OpenVINO does not take the model.
        """
        able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if options.precision == "bf16" and "bf16" not in target.formats:
            raise BackendUnavailableError(f"{target.name} has no bfloat16 instructions")
        if options.precision == "bf16" and "BF16" not in able:
            raise BackendUnavailableError("this processor has no bfloat16 instructions")
        if model.functions:
            model = model.clone()
            InlinePass()(model)
        model = spelled(model) or model
        model = unit_steps(model) or model
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=path) as folder:
            source = Path(folder) / "model.onnx"
            save(model, source)
            names = {
                "inputs": [v.name for v in model.graph.inputs],
                "outputs": [v.name for v in model.graph.outputs],
            }
            source.with_suffix(".json").write_text(json.dumps(names))
            nodes: dict[str, list[str]] = {}
            for node in walk(model):
                nodes.setdefault(node.op_type, []).append(describe(node))
            convert(source, path / MODEL, settings(options, 1), nodes)

    def load(
        self, path: Path, target: Target, options: OpenVinoOptions, *, threads: int | None = None
    ) -> Session:
        """Open the files with the options."""
        chosen = settings(options, threads)
        machine = f"{ov.get_version()} {core().get_property('CPU', 'FULL_DEVICE_NAME')} {sorted(options.kernels.items())}"
        if options.cache and (kept := cache.folder(path, (MODEL, WEIGHTS), machine)) is not None:
            chosen["CACHE_DIR"] = str(kept)
        return OpenVinoSession(path / MODEL, chosen, options.shapes, options.kernels)

    def fit(self, options: OpenVinoOptions, shapes: Mapping[str, tuple[int, ...]] | None) -> OpenVinoOptions:
        """With the usual shapes, where the options leave them open."""
        if shapes is None or options.shapes is not None:
            return options
        return options.model_copy(update={"shapes": dict(shapes)})

    def variants(
        self,
        model: ir.Model,
        target: Target,
        options: OpenVinoOptions,
        path: Path,
        feeds: Sequence[Mapping[str, np.ndarray]],
    ) -> Sequence[OpenVinoOptions]:
        """Other kernels for convolutions, where the counters of the layers say that they are faster here."""
        names = [] if options.kernels else layers(path / MODEL)
        families = available(features())
        if not names or not families:
            return ()

        fitting = (f for f in feeds if options.shapes in (None, {k: x.shape for k, x in f.items()}))
        usual = next(fitting, feeds[0])

        def measure(kernels: Mapping[str, Kernel]) -> Mapping[str, Layer]:
            counted = settings(options, 1) | {"PERF_COUNT": "YES"}
            session = OpenVinoSession(path / MODEL, counted, options.shapes, kernels)
            try:
                return times(partial(session.run, usual), session.counters)
            finally:
                session.close()

        return [options.model_copy(update={"kernels": k}) for k in fastest(names, families, measure)]

    def runner(
        self, model: bytes, feeds: Mapping[str, np.ndarray], precision: str
    ) -> Callable[[], object] | None:
        """A request on the bytes; bfloat16 only where the processor has instructions for it."""
        if precision not in ("fp32", "int8", "bf16"):
            return None
        able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in able:
            return None
        options = OpenVinoOptions(precision="bf16" if precision == "bf16" else "f32")
        compiled = core().compile_model(core().read_model(model), "CPU", settings(options, 1))
        return partial(compiled.create_infer_request().infer, dict(feeds))

    def executed(
        self, path: Path, target: Target, options: OpenVinoOptions, feeds: Mapping[str, np.ndarray]
    ) -> Sequence[Executed]:
        """One run with performance counters, read from the runtime graph that it leaves."""
        counted = settings(options, 1) | {"PERF_COUNT": "YES"}
        session = OpenVinoSession(path / MODEL, counted, kernels=options.kernels)
        # The first run packs the weights.
        session.run(feeds)
        session.run(feeds)
        nodes = runtime_nodes(session.compiled)
        session.close()
        model = core().read_model(str(path / MODEL))
        # Shapes that depend on data stay open; what is behind them is not counted.
        with contextlib.suppress(RuntimeError):
            model.reshape({i: list(feeds[s.name].shape) for i, s in enumerate(session.inputs)})
        return read_runtime(nodes, products(model))
