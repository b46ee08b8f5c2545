"""TensorRT: a real engine where TensorRT-RTX compiles for the card without having it, else all that building there needs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from optkit import golden
from optkit.arithmetic import FLOATS, product_format, products
from optkit.backends.base import Backend, Executed, Finished, Mark, Options, Task
from optkit.backends.tensorrt import bundle, rtx
from optkit.backends.tensorrt.finalize import at_hand, finalize
from optkit.backends.tensorrt.placement import PLACEMENTS
from optkit.backends.tensorrt.profiles import Range, profile, ranges, seen
from optkit.backends.tensorrt.refusals import refusal
from optkit.backends.tensorrt.session import TypedGraphSession
from optkit.backends.tensorrt.spelling import inline, spelled
from optkit.backends.tensorrt.verdict import Record
from optkit.data import specs
from optkit.errors import BackendUnavailableError, ModelError, UnsupportedOpError, UsageError
from optkit.graph import describe, walk
from optkit.inference import at_shapes
from optkit.multiplies import macs, multiplies
from optkit.store import save

if TYPE_CHECKING:
    import numpy as np

    from optkit.backends.base import Session
    from optkit.placement import Placement
    from optkit.targets import Target

logger = logging.getLogger(__name__)

_EXTRA = "pip install 'optkit[tensorrt]'"


class TensorRtOptions(Options):
    """How the engine is built.

    Attributes:
        mode: ``rtx-engine`` compiles with TensorRT-RTX here, ``bundle`` leaves it to TensorRT on the device, and
            ``device-build`` writes a bundle and finishes it here; ``auto`` takes the last where TensorRT and such a card are
            at hand, else the first where TensorRT-RTX supports the card.
        sizes: Smallest, usual and largest size of free axes, by their symbols or ``<input>.<axis>``; those that are not
            named are taken from the calibration data and the evaluator's samples.
        tf32: Whether float32 products may round their operands to 10 bits, as TensorRT does by default.
        proxy: Whether a bundle is tried out with TensorRT-RTX for another card, which is named.
    """

    mode: Literal["auto", "rtx-engine", "bundle", "device-build"] = "auto"
    sizes: dict[str, Range] = Field(default_factory=dict)
    tf32: bool = False
    proxy: bool = True


_MODES = {
    "rtx-engine": "TensorRT-RTX compiled the engine here, without the card",
    "bundle": "TensorRT builds the engine on the device, when optkit finalize runs there",
    "device-build": "TensorRT built the engine here, on the device of this machine",
}


def mode(target: Target, options: TensorRtOptions) -> str:
    """The mode that ``options`` mean for ``target``."""
    if options.mode != "auto":
        return options.mode
    try:
        at_hand(target)
    except BackendUnavailableError as error:
        logger.debug("no device-build: %s", error)
        return "rtx-engine" if rtx.native(target) is not None else "bundle"
    return "device-build"


class TensorRt(Backend):
    """TensorRT 11 and TensorRT-RTX: precision comes from the types and Q/DQ pairs of the graph alone."""

    name: ClassVar[str] = "tensorrt"
    options: ClassVar[type[Options]] = TensorRtOptions
    placements: ClassVar[Mapping[str, Placement]] = PLACEMENTS
    stands_in: ClassVar[bool] = True
    fixes: ClassVar[bool] = True
    generic: ClassVar[bool] = False
    zero_points_apart: ClassVar[bool] = True
    doubles_in_floats: ClassVar[bool] = True

    def available(self) -> str | None:
        """Always: a bundle needs no package, and ``ready`` says what an engine needs."""
        return None

    def ready(self, target: Target, options: TensorRtOptions) -> None:
        """Refuse what cannot be built, before any work.

        Raises:
            UsageError: The target is no card of NVIDIA's, or none that TensorRT-RTX has.
            BackendUnavailableError: TensorRT-RTX is to compile, and is not installed; or TensorRT is to build here, and it or
                the device is missing.
        """
        if target.vendor != "nvidia" or target.capability is None:
            raise UsageError(
                f"TensorRT runs on NVIDIA's GPUs; the target is {target.name}", hint="choose another --target"
            )
        if options.mode == "device-build":
            at_hand(target)
        if mode(target, options) != "rtx-engine":
            return
        if rtx.capability(target) is None:
            raise UsageError(
                f"TensorRT-RTX compiles nothing for {target.name} ({target.arch})",
                hint="--set options.mode=bundle leaves building to TensorRT on the device",
            )
        if not rtx.installed():
            raise BackendUnavailableError(
                f"an engine for {target.name} is compiled with TensorRT-RTX, which is not installed",
                hint=f"{_EXTRA}, or --set options.mode=bundle to build it on the device",
            )

    def settled(self, target: Target, options: TensorRtOptions) -> TensorRtOptions:
        """With the mode."""
        return options.model_copy(update={"mode": mode(target, options)})

    def mode(self, options: TensorRtOptions) -> str:
        """By name and in words."""
        return f"{options.mode}: {_MODES[options.mode]}"

    def finishes(self, options: TensorRtOptions) -> bool:
        """Where the engine is built here."""
        return options.mode == "device-build"

    def unsupported(self, node: ir.Node, target: Target) -> str | None:
        """Formats that the card lacks, and operators that TensorRT has no notion of."""
        return refusal(node, target)

    def span(
        self, model: ir.Model, options: TensorRtOptions, sizes: Mapping[str, Sequence[Range]]
    ) -> TensorRtOptions:
        """With the sizes of the data for the axes that the options do not name."""
        return options.model_copy(update={"sizes": seen(specs(model)[0], sizes, options.sizes)})

    def usual(self, model: ir.Model, options: TensorRtOptions) -> dict[str, tuple[int, ...]]:
        """Of inputs with free axes, what the engine is tuned for."""
        inputs, _ = specs(model)
        shapes = profile(inputs, ranges(inputs, options.sizes))
        return {name: tuple(usual) for name, (_, usual, _) in shapes.items()}

    def exact(self, options: TensorRtOptions) -> TensorRtOptions:
        """The same without TF32."""
        return options.model_copy(update={"tf32": False})

    def lower(self, model: ir.Model, target: Target, options: TensorRtOptions, path: Path) -> None:
        """Write the typed graph, golden inputs and outputs, the programs for the device and, where possible, the engine.

        Raises:
            BackendUnavailableError: The engine is to be compiled here, and TensorRT-RTX is not installed.
            UnsupportedOpError: TensorRT-RTX's parser refuses nodes; lists them all.
            ModelError: The graph has Q/DQ pairs and yet no quantized product, or TensorRT-RTX fails.
        """
        chosen = mode(target, options)
        native = chosen == "rtx-engine"
        if native:
            self.ready(target, options)
        model = inline(model)
        inputs, _ = specs(model)
        sizes = ranges(inputs, options.sizes)
        shapes = profile(inputs, sizes)
        counted = products(model)
        own = spelled(model)
        pairs = own is not None or any(node.op_type == "QuantizeLinear" for node in walk(model))
        if pairs and not set(counted) - FLOATS:
            raise ModelError("the graph has Q/DQ pairs, but not one product with weights is quantized")
        save(model, path / bundle.MODEL)
        source = bundle.MODEL if own is None else bundle.SPELLED
        if own is not None:
            save(own, path / source)
        usual, least = ({name: r[which] for name, r in sizes.items()} for which in (1, 0))
        wanted = [usual, least] if usual != least else [usual]
        apart = golden.write(path / bundle.MODEL, path / golden.FOLDER, model, wanted, seed=0)
        bundle.write(
            path, target=target.name, arch=target.arch, profile=shapes, min_cosine=golden.limit(tuple(counted), apart),
            tf32=options.tf32, rtx=native, source=source,
        )  # fmt: skip
        if native:
            found = rtx.capability(target)
            assert found is not None
            self._compile(model, path / source, path / bundle.ENGINE, found, options.tf32, shapes)
        elif chosen == "bundle" and options.proxy and rtx.installed():
            with tempfile.TemporaryDirectory(prefix=".proxy-", dir=path) as folder:
                engine = Path(folder) / bundle.ENGINE
                self._compile(
                    model, path / source, engine, rtx.proxy(target), options.tf32, shapes, proxy=True
                )

    def _compile(
        self,
        model: ir.Model,
        source: Path,
        engine: Path,
        capability: str,
        tf32: bool,
        shapes: Mapping[str, Sequence[Sequence[int]]],
        *,
        proxy: bool = False,
    ) -> None:
        """Let TensorRT-RTX build, read its plan, and keep what it said."""
        said = rtx.build(source, engine, [capability], shapes, tf32=tf32)
        if said.refused:
            nodes = {str(node.name): describe(node) for node in walk(model)}
            raise UnsupportedOpError(
                f"TensorRT-RTX {said.version}{' (asked as a proxy)' if proxy else ''} cannot read the graph",
                [(nodes.get(node, f"{node} ({op})"), why) for node, op, why in said.refused],
                hint="--set options.proxy=false writes the bundle without asking" if proxy else None,
            )
        if not said.built and (not proxy or not said.parsed):
            raise ModelError(
                f"TensorRT-RTX {said.version} cannot build for {capability}: {said.message}",
                hint="sizes of free axes are set with --set options.sizes.AXIS=[smallest, usual, largest]",
            )
        if not said.built:
            logger.warning(
                "as a proxy, TensorRT-RTX %s built nothing for %s: %s", said.version, capability, said.message
            )
        formats = {str(n.name): product_format(n) for n in walk(model) if multiplies(n)}
        record = Record.of(said, engine, formats, capability=capability, proxy=proxy)
        if record.unused:
            shown = ", ".join(sorted({record.products[n] for n in formats if n in record.products}))
            what = (
                f"TensorRT-RTX {said.version} multiplies nothing in {record.unused} for {capability}: it reads the numbers and "
                f"computes in {shown}"
            )
            if not proxy:
                raise ModelError(
                    what,
                    hint="--set options.mode=bundle leaves building to TensorRT on the device; or choose another --precision",
                )
            logger.warning("as a proxy, %s", what)
        if record.built and not record.operations:
            logger.warning(
                "the plan of TensorRT-RTX %s is not readable: formats are the graph's", said.version
            )
        record.save(source.parent)

    def size(self, path: Path) -> int:
        """Of the engine; where it is built on the device, of the typed graph."""
        engine, source = path / bundle.ENGINE, path / bundle.SPELLED
        if not source.is_file():
            source = path / bundle.MODEL
        files = [engine] if engine.is_file() else path.glob(f"{source.name}*")
        return sum(f.stat().st_size for f in files)

    def load(
        self, path: Path, target: Target, options: TensorRtOptions, *, threads: int | None = None
    ) -> Session:
        """The typed graph in ONNX Runtime: the engine itself needs its card."""
        return TypedGraphSession(path / bundle.MODEL, bundle.read(path)["profile"])

    def executed(
        self, path: Path, target: Target, options: TensorRtOptions, feeds: Mapping[str, np.ndarray]
    ) -> Sequence[Executed]:
        """The products as the compiled plan shows them; those it does not name, as the typed graph says."""
        model = at_shapes(ir.load(path / bundle.MODEL), {k: v.shape for k, v in feeds.items()})
        record = Record.load(path)
        found = []
        for node in walk(model):
            if not multiplies(node) or (count := macs(node)) is None:
                continue
            shown = None if record is None else record.products.get(str(node.name))
            found.append(
                Executed(
                    name=str(node.name), op=node.op_type, macs=count, seconds=0.0,
                    where="typed graph" if record is None or shown is None else record.where,
                    format=product_format(node) if shown is None else shown,
                )
            )  # fmt: skip
        nothing = Executed(name="", op="none", where="typed graph", format="fp32", macs=0, seconds=0.0)
        return found or [nothing]

    def evidence(self, path: Path, target: Target, options: TensorRtOptions) -> frozenset[str]:
        """Compiled where the engine is for this very card; proxy-compiled where it was for another."""
        record = Record.load(path)
        if record is None or not record.built:
            return frozenset()
        if record.proxy:
            return frozenset({"proxy_compiled"})
        return frozenset({"compiled", "inspected"} if record.operations else {"compiled"})

    def finalize(
        self, path: Path, target: Target, options: TensorRtOptions, task: Task, mark: Mark, *, force: bool
    ) -> Finished:
        """Build, compare, measure, with the artifact's own programs."""
        return finalize(path, task, mark, force=force)

    def deferred(self, path: Path, target: Target, options: TensorRtOptions) -> Sequence[str]:
        """Build where that is left, verify, measure."""
        record = Record.load(path)
        if bundle.read(path)["runtime"] == bundle.RTX:
            first = "load the engine, which chooses its kernels on the card (python verify.py)"
        elif record is None:
            first = f"build the engine with TensorRT 11 (python build_engine.py); not tried here: {_EXTRA}"
        else:
            tried = f"built nothing: {record.message}" if record.message else "built it"
            if record.unused:
                tried += f", with no product in {record.unused}"
            first = (
                "build the engine with TensorRT 11 (python build_engine.py); as a proxy, TensorRT-RTX "
                f"{record.version} for {record.capability} {tried}"
            )
        return (
            first,
            "compare it with the golden outputs (python verify.py)",
            "measure its latency (python bench.py); optkit finalize does all of these steps",
        )
