"""The backend: machine code for what the graph calls, the graph itself for the rest."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from pydantic import Field

from optkit import golden
from optkit.arithmetic import FLOATS, float_format, product_format, products, stored
from optkit.backends.base import Backend, Executed, Finished, Mark, Options, Task
from optkit.backends.triton import bundle, plugins
from optkit.backends.triton.finalize import finalize, tuned
from optkit.backends.triton.placement import PLACEMENTS
from optkit.backends.triton.runtime import DeviceSession, open_device
from optkit.backends.triton.session import FunctionBodySession
from optkit.data import specs, trial_sizes
from optkit.dims import worked_out
from optkit.errors import ModelError, OptkitError, UsageError
from optkit.graph import describe, walk
from optkit.inference import at_shapes
from optkit.kernels.base import DOMAIN
from optkit.kernels.build import need_triton
from optkit.kernels.gates import LeftOut
from optkit.kernels.rules import missed
from optkit.multiplies import macs, multiplies
from optkit.ops import spec

if TYPE_CHECKING:
    import numpy as np

    from optkit.backends.base import Session
    from optkit.backends.triton.rest import Place
    from optkit.placement import Placement
    from optkit.targets import Target

# Bits of quantized weights at most.
_NARROW = 8


class TritonOptions(Options):
    """How the artifact runs on its device; what is compiled follows from the graph and the target.

    Attributes:
        rest: Where nodes without kernel run: in ONNX Runtime with CUDA, or on the host's processor. Without it: with CUDA on
            NVIDIA's GPUs, on the processor beside AMD's, for which ONNX Runtime has no provider that shares their memory.
        sizes: Usual sizes of free axes, by their symbols: kernels are chosen and the latency is measured with them. Those that
            are not named are taken from the calibration data.
        plugins: Whether the kernels are written as plug-ins of TensorRT too, with the graph that calls them: ``tensorrt/``.
    """

    rest: Literal["cuda", "cpu"] | None = None
    sizes: dict[str, int] = Field(default_factory=dict)
    plugins: bool = False


class Triton(Backend):
    """Fused kernels compiled by Triton for NVIDIA's GPUs from sm_80 on and AMD's gfx942, without having one.

    The artifact holds the machine code, what was read from it, the launches in their order, and the graph, whose calls of
    kernels carry their ONNX bodies: any ONNX runtime computes the same with it. On the device the kernels are launched
    through the driver, CUDA's or HIP's, and what lies between them runs in ONNX Runtime.
    """

    name: ClassVar[str] = "triton"
    options: ClassVar[type[Options]] = TritonOptions
    placements: ClassVar[Mapping[str, Placement]] = PLACEMENTS
    packages: ClassVar[tuple[str, ...]] = ("triton",)
    stands_in: ClassVar[bool] = True
    generic: ClassVar[bool] = False
    floor: ClassVar[str] = "triton-fp32"

    def available(self) -> str | None:
        """Always; ``ready`` says what compiling needs."""
        return None

    def ready(self, target: Target, options: TritonOptions) -> None:
        """Refuse what cannot be compiled, before any work.

        Raises:
            UsageError: The target is no GPU that kernels are compiled for, or the options ask for what its vendor lacks.
            BackendUnavailableError: Triton is not installed.
        """
        if target.capability is None or target.capability < (8, 0):
            raise UsageError(
                f"kernels are compiled for NVIDIA's GPUs from sm_80 on and for AMD's gfx942; {target.name} is {target.arch}",
                hint="choose another --target or --backend",
            )
        if target.vendor == "amd" and (options.plugins or options.rest == "cuda"):
            asked = "plugins: TensorRT" if options.plugins else "rest=cuda: CUDA"
            raise UsageError(
                f"options.{asked} is NVIDIA's, and {target.name} is AMD's",
                hint="leave the option out",
            )
        need_triton()

    def unsupported(self, node: ir.Node, target: Target) -> str | None:
        """Calls that no program is for; nodes without kernel stay in the graph."""
        return bundle.refusal(node, target)

    def sizes(self, model: ir.Model, options: TritonOptions) -> Mapping[str, int]:
        """Those of the options."""
        known = {d: None for s in specs(model)[0] for d in s.shape or () if isinstance(d, str)}
        if unknown := [name for name in options.sizes if name not in known]:
            raise UsageError(
                f"options.sizes: {unknown[0]} is not a free axis of the model",
                hint=f"free axes: {', '.join(known) or 'none'}",
            )
        return options.sizes

    def span(
        self, model: ir.Model, options: TritonOptions, sizes: Mapping[str, Sequence[tuple[int, int, int]]]
    ) -> TritonOptions:
        """With the usual sizes of the data for the axes that the options do not name."""
        seen = {
            d: sizes[s.name][axis][1]
            for s in specs(model)[0]
            for axis, d in enumerate(s.shape or ())
            if isinstance(d, str) and s.name in sizes
        }
        return options.model_copy(update={"sizes": {**seen, **options.sizes}})

    def usual(self, model: ir.Model, options: TritonOptions) -> dict[str, tuple[int, ...]]:
        """Where all axes of an input have a size by the options."""
        known = {
            s.name: tuple(worked_out(d, options.sizes) or 0 for d in s.shape or ()) for s in specs(model)[0]
        }
        return {name: shape for name, shape in known.items() if all(shape)}

    def lower(self, model: ir.Model, target: Target, options: TritonOptions, path: Path) -> None:
        """Write the graph, the machine code with its gates, the launches, and golden inputs and outputs.

        Raises:
            BackendUnavailableError: Triton is not installed.
            ModelError: The graph calls no kernel, or none for what is quantized, machine code does not pass its gates, or no
                sizes of the inputs run.
        """
        assert target.capability is not None
        flat = model.clone()
        outside = _inlined(flat)
        if idle := _idle(flat, outside):
            raise ModelError(
                f"the weights of {', '.join(map(describe, idle))} are quantized, and no kernel multiplies any: all would be "
                "computed in floats",
                hint=missed(model, idle, target.capability)
                or "kernels multiply what they know; choose another --precision",
            )
        bundle.write(model, target, path)
        apart = self._golden(model, options, path)
        bundle.ask(path, golden.limit(tuple(products(flat)), apart))
        if options.plugins:
            plugins.write(path)

    def _golden(self, model: ir.Model, options: TritonOptions, path: Path) -> float:
        """One batch of usual sizes; where those are not known, of the first that are tried and run."""
        inputs, _ = specs(model)
        asked = self.sizes(model, options)
        trials = [{**sizes, **asked} for sizes in trial_sizes(inputs)] or [dict(asked)]
        folder, why = path / golden.FOLDER, None
        for usual in trials:
            try:
                return golden.write(path / bundle.MODEL, folder, model, [usual], seed=0)
            except ModelError as error:
                shutil.rmtree(folder)
                why = why or error
        assert why is not None
        raise ModelError(
            str(why), hint="sizes of free axes are set with --set options.sizes.AXIS=SIZE"
        ) from why

    def size(self, path: Path) -> int:
        """Of the graph and one program of each call: a device keeps one of the finalists."""
        first = {row["kernels"][0] for row in bundle.read(path)["launches"]}
        files = [*path.glob(f"{bundle.MODEL}*"), *bundle.code(path, first)]
        return sum(f.stat().st_size for f in files)

    def load(
        self, path: Path, target: Target, options: TritonOptions, *, threads: int | None = None
    ) -> Session:
        """The functions' bodies in ONNX Runtime: machine code needs its GPU."""
        return FunctionBodySession(path / bundle.MODEL)

    def on_device(self, path: Path, target: Target, options: TritonOptions) -> Session:
        """The machine code on its GPU, the programs that ``finalize`` chose there; nodes without kernel where the options say."""
        device = open_device(target.name, target.arch)
        try:
            rest = _rest(target, options)
            choices = tuned(path, device, rest)
            return DeviceSession(path, device, rest=rest, choices=choices, own=True)
        except OptkitError:
            device.close()
            raise

    def executed(
        self, path: Path, target: Target, options: TritonOptions, feeds: Mapping[str, np.ndarray]
    ) -> Sequence[Executed]:
        """Products, those in the bodies of kernels too; they ran as ONNX on the CPU.

        Outside of kernels ONNX Runtime multiplies what was dequantized, in floats.
        """
        model = ir.load(path / bundle.MODEL)
        outside = _inlined(model)
        model = at_shapes(model, {k: v.shape for k, v in feeds.items()})
        found = []
        for node in walk(model):
            if multiplies(node) and (count := macs(node)) is not None:
                found.append(
                    Executed(
                        name=str(node.name), op=node.op_type, where="ONNX on the CPU",
                        macs=count, seconds=0.0,
                        format=(float_format if node.outputs[0].name in outside else product_format)(node),
                    )
                )  # fmt: skip
        nothing = Executed(name="", op="none", where="ONNX on the CPU", format="fp32", macs=0, seconds=0.0)
        return found or [nothing]

    def evidence(self, path: Path, target: Target, options: TritonOptions) -> frozenset[str]:
        """Compiled and inspected only where kernels are all that the graph computes with."""
        return frozenset() if bundle.read(path)["without_kernel"] else frozenset({"compiled", "inspected"})

    def left_out(self, path: Path, target: Target, options: TritonOptions) -> Sequence[LeftOut]:
        """Finalists whose machine code does not pass its gates."""
        return [LeftOut(**row) for row in bundle.read(path)["left_out"]]

    def deferred(self, path: Path, target: Target, options: TritonOptions) -> Sequence[str]:
        """What nobody has done: launching, and all that has no kernel."""
        found = bundle.read(path)
        programs = {name for row in found["launches"] for name in row["kernels"]}
        first = f"load the {len(programs)} programs of {len(found['launches'])} calls, and choose among them by time"
        if left := len(found["without_kernel"]):
            where = "with CUDA" if _rest(target, options) == "cuda" else "on the processor"
            first += f"; the other {left} nodes that compute run in ONNX Runtime {where}"
        return (
            first,
            "compare with the golden outputs",
            f"measure the latency on {target.name}; optkit finalize does all of these steps",
        )

    def finalize(
        self, path: Path, target: Target, options: TritonOptions, task: Task, mark: Mark, *, force: bool
    ) -> Finished:
        """Load, choose, compare, measure, on the GPU of this machine."""
        return finalize(path, target.name, target.arch, _rest(target, options), task, mark, force=force)


def _inlined(model: ir.Model) -> frozenset[str | None]:
    """Put the bodies of kernels in the place of their calls; the names of the values that no kernel computes."""
    outside = frozenset(o.name for node in walk(model) if node.domain != DOMAIN for o in node.outputs)
    InlinePass()(model)
    return outside


def _idle(model: ir.Model, outside: frozenset[str | None]) -> list[ir.Node]:
    """The products whose weights are quantized, where none is in a kernel."""
    found = []
    for node in walk(model):
        known = spec(node)
        if known is None or known.macs is None:
            continue
        at = known.weight
        weight = None if at is None or at >= len(node.inputs) else stored(node.inputs[at])
        narrow = weight is not None and weight.dtype is not None and weight.dtype.bitwidth <= _NARROW
        if node.outputs[0].name in outside and narrow:
            found.append(node)
        elif node.outputs[0].name not in outside and (narrow or product_format(node) not in FLOATS):
            return []
    return found


def _rest(target: Target, options: TritonOptions) -> Place:
    return options.rest or ("cpu" if target.vendor == "amd" else "cuda")
