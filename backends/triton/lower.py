"""The backend: cubins for what the graph calls, the graph itself for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from optkit.arithmetic import product_format
from optkit.backends.base import Backend, Executed, Options
from optkit.backends.triton import bundle
from optkit.backends.triton.placement import PLACEMENTS
from optkit.backends.triton.session import FunctionBodySession
from optkit.errors import UsageError
from optkit.graph import walk
from optkit.inference import at_shapes
from optkit.kernels.build import need_triton
from optkit.ops import spec

if TYPE_CHECKING:
    import numpy as np

    from optkit.backends.base import Session
    from optkit.placement import Placement
    from optkit.targets import Target


class TritonOptions(Options):
    """Nothing can be chosen: what is compiled follows from the graph and the target."""


class Triton(Backend):
    """Fused kernels compiled by Triton for NVIDIA's GPUs from sm_80 on, without having one.

    The artifact holds the machine code, what was read from it, and the graph, whose calls of kernels carry their ONNX
    bodies: any ONNX runtime computes the same with it. A runtime that launches the kernels is not part of it.
    """

    name: ClassVar[str] = "triton"
    options: ClassVar[type[Options]] = TritonOptions
    placements: ClassVar[Mapping[str, Placement]] = PLACEMENTS
    packages: ClassVar[tuple[str, ...]] = ("triton",)
    stands_in: ClassVar[bool] = True
    generic: ClassVar[bool] = False

    def available(self) -> str | None:
        """Always; ``ready`` says what compiling needs."""
        return None

    def ready(self, target: Target, options: TritonOptions) -> None:
        """Refuse what cannot be compiled, before any work.

        Raises:
            UsageError: The target is no GPU of NVIDIA's from sm_80 on.
            BackendUnavailableError: Triton is not installed.
        """
        if target.capability is None or target.capability < (8, 0):
            raise UsageError(
                f"kernels are compiled for NVIDIA's GPUs from sm_80 on; {target.name} is {target.arch}",
                hint="choose another --target or --backend",
            )
        need_triton()

    def unsupported(self, node: ir.Node, target: Target) -> str | None:
        """Calls that no program is for; nodes without kernel stay in the graph."""
        return bundle.refusal(node, target)

    def lower(self, model: ir.Model, target: Target, options: TritonOptions, path: Path) -> None:
        """Write the graph, the machine code with its gates, and the launches.

        Raises:
            BackendUnavailableError: Triton is not installed.
            ModelError: The graph calls no kernel, or machine code does not pass its gates.
        """
        bundle.write(model, target, path)

    def load(
        self, path: Path, target: Target, options: TritonOptions, *, threads: int | None = None
    ) -> Session:
        """The functions' bodies in ONNX Runtime: machine code needs its GPU."""
        return FunctionBodySession(path / bundle.MODEL)

    def executed(
        self, path: Path, target: Target, options: TritonOptions, feeds: Mapping[str, np.ndarray]
    ) -> Sequence[Executed]:
        """Products, those in the bodies of kernels too; they ran as ONNX on the CPU."""
        model = ir.load(path / bundle.MODEL)
        InlinePass()(model)
        model = at_shapes(model, {k: v.shape for k, v in feeds.items()})
        found = []
        for node in walk(model):
            known = spec(node)
            if (
                macs := known.macs(node) if known is not None and known.macs is not None else None
            ) is not None:
                found.append(
                    Executed(
                        name=str(node.name), op=node.op_type, where="ONNX on the CPU",
                        format=product_format(node), macs=macs, seconds=0.0,
                    )
                )  # fmt: skip
        nothing = Executed(name="", op="none", where="ONNX on the CPU", format="fp32", macs=0, seconds=0.0)
        return found or [nothing]

    def evidence(self, path: Path, target: Target, options: TritonOptions) -> frozenset[str]:
        """Compiled and inspected only where kernels are all that the graph computes with."""
        return frozenset() if bundle.read(path)["without_kernel"] else frozenset({"compiled", "inspected"})

    def deferred(self, path: Path, target: Target, options: TritonOptions) -> Sequence[str]:
        """What nobody has done: launching, and all that has no kernel."""
        found = bundle.read(path)
        count, programs = len(found["launches"]), len({row["kernel"] for row in found["launches"]})
        steps = [
            f"launch the {programs} compiled kernels ({count} calls) and compare them with their ONNX bodies; "
            "optkit has no program for that yet"
        ]
        if left := len(found["without_kernel"]):
            steps.append(f"compile the other {left} nodes that compute: they are in {bundle.MODEL} as ONNX")
        return (*steps, f"measure the latency on {target.name}")
