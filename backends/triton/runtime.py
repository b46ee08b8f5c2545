"""An artifact on the device that it is for: kernels launched from their machine code, all else in ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.base import Session
from optkit.backends.triton import bundle
from optkit.backends.triton.memory import Pool, Tensor
from optkit.backends.triton.rest import Place, Rest, need_provider
from optkit.data import specs, validate
from optkit.errors import BackendUnavailableError, ModelError, UsageError
from optkit.graph import constant
from optkit.kernels.cuda import CudaError, Device
from optkit.kernels.expressions import evaluate, of_shapes
from optkit.kernels.hip import HipDevice
from optkit.kernels.launching import Function, Prepared, read

Visit = Callable[[int, "Call"], None]


def open_device(target: str, arch: str) -> Device:
    """The GPU of this machine, where it is one that code for ``arch`` runs on.

    Raises:
        BackendUnavailableError: There is no driver or no GPU.
        UsageError: It is another one.
    """
    with ExitStack() as stack:
        try:
            device = HipDevice() if arch.startswith("gfx") else Device()
            stack.callback(device.close)
            facts = device.facts()
        except CudaError as error:
            raise BackendUnavailableError(
                str(error), hint="it runs on the machine with the GPU; copy the artifact's folder there"
            ) from error
        if (found := facts["arch"]) != arch.rstrip("a"):
            raise UsageError(
                f"the artifact is for {target} ({arch}), the device is {facts['device']} ({found})",
                hint=f"compile for it: optkit targets lists what is {found}",
            )
        stack.pop_all()
    return device


class Call:
    """One call of a kernel, ready to be launched by any of its programs.

    Args:
        values: By name; has the inputs.
        spare: Names of those that nobody reads afterwards.
    """

    def __init__(
        self,
        session: DeviceSession,
        row: Mapping[str, Any],
        values: dict[str, Tensor],
        spare: Collection[str] = (),
    ) -> None:
        self._session, self.row = session, row
        given = [None if name is None else values[name] for name in row["inputs"]]
        shapes = [() if t is None else t.shape for t in given]
        known = of_shapes(shapes)
        self.sizes = {name: evaluate(text, known) for name, text in row["sizes"].items()}
        self.inputs = [None if t is None else t.to_device(session.pool) for t in given]
        program = session.functions[row["kernels"][0]].code.record["program"]
        aliases = {int(output): int(written) for output, written in program.get("aliases", {}).items()}
        self.outputs: list[Tensor | None] = []
        for index, made in enumerate(row["outputs"]):
            if made is None:
                self.outputs.append(None)
                continue
            shape, kind = tuple(evaluate(d, known) for d in made["shape"]), ir.DataType[made["type"]]
            before = given[aliases[index]] if index in aliases else None
            name = row["inputs"][aliases[index]] if index in aliases else None
            if before is not None and name in spare and row["inputs"].count(name) == 1:
                self.outputs.append(Tensor(shape=shape, dtype=kind, device=before.device, owners=[before]))
                continue
            tensor = Tensor.empty(session.pool, shape, kind)
            if before is not None:
                # What is written in place is written into a copy: others read what was there.
                assert tensor.device is not None and before.device is not None
                session.device.copy(tensor.device, before.device, tensor.size)
            self.outputs.append(tensor)

    def prepare(self, name: str) -> Prepared:
        """The launch of the program ``name``.

        Raises:
            ModelError: Sizes or addresses are not what the code was promised.
        """
        addresses = [None if t is None else t.device for t in self.outputs]
        function = self._session.functions[name]
        try:
            return function.prepare(self.inputs, addresses, self.sizes, self._session.scratch)
        except ModelError as error:
            raise ModelError(f"{self.row['node']} ({self.row['op']}): {error}", hint=error.hint) from error


class DeviceSession(Session):
    """The artifact's steps, one after the other on one stream.

    Args:
        path: The artifact.
        device: Of the architecture that it is for.
        rest: Where nodes without kernel run.
        choices: Program by index of the launch; the first of each where it says nothing.
        own: Whether the device is closed with the session.

    Raises:
        ModelError: Files are missing or damaged, or the driver or ONNX Runtime does not take them.
        UsageError: The device is of another architecture.
        BackendUnavailableError: ONNX Runtime does not run where the rest is to run.
    """

    def __init__(
        self,
        path: Path,
        device: Device,
        *,
        rest: Place = "cuda",
        choices: Mapping[int, str] | None = None,
        own: bool = False,
    ) -> None:
        facts = bundle.read(path)
        self._own, self._lock = own, threading.Lock()
        self.launches, self._steps = facts["launches"], facts["steps"]
        self.pool, self.device = Pool(device), device
        self.choices = [(choices or {}).get(i, row["kernels"][0]) for i, row in enumerate(self.launches)]
        names = dict.fromkeys(name for row in self.launches for name in row["kernels"])
        self.functions = {name: Function(device, read(path / bundle.FOLDER, name)) for name in names}
        file = path / bundle.MODEL
        if not file.is_file():
            raise ModelError(f"{file.name} is missing")
        model = ir.load(file)
        self.inputs, self.outputs = specs(model)
        if any("launch" not in step for step in self._steps):
            need_provider(rest)
        self._rest = {
            index: Rest(model, step, rest, device.stream)
            for index, step in enumerate(self._steps)
            if "launch" not in step
        }
        self._constants = self._place_constants(model)
        self._last = self._last_uses()
        self._values: dict[str, Tensor] = {}
        self._scratch: int | None = None
        self._scratch_size = 0

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name; of several threads, one after the other."""
        with self._lock:
            self.device.use()
            self.bind(feeds)
            values = self.enqueue(once=True)
            return {o.name: values[o.name].array(self.pool) for o in self.outputs}

    def bind(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Copy inputs to the device, for the runs that follow."""
        found = validate(feeds, self.inputs)
        self._values = {
            s.name: Tensor.of(found[s.name], ir.DataType.from_numpy(s.dtype)) for s in self.inputs
        }
        for value in self._values.values():
            value.to_device(self.pool)

    def enqueue(self, visit: Visit | None = None, *, once: bool = False) -> dict[str, Tensor]:
        """Start all steps with the inputs that are bound; the outputs by name, when the stream is done.

        Args:
            visit: Is given each call with its index before it is launched.
            once: Whether no other run needs the inputs: kernels that write into one of them, such as a cache, write into
                the very memory.

        Raises:
            ModelError: A step does not fit the sizes, or the driver or ONNX Runtime stopped.
        """
        values = {**self._constants, **self._values}
        kept = self._constants.keys() if once else values.keys()
        if once:
            self._values = {}
        for index, step in enumerate(self._steps):
            if index in self._rest:
                self._rest[index].run(values, self.pool)
            else:
                spare = [name for name in self._last[index] if name not in kept]
                self._launch(step["launch"], values, visit, spare)
            for name in self._last[index]:
                values.pop(name, None)
        return values

    def _launch(
        self, index: int, values: dict[str, Tensor], visit: Visit | None, spare: Collection[str]
    ) -> None:
        row = self.launches[index]
        call = Call(self, row, values, spare)
        if visit is not None:
            visit(index, call)
        try:
            call.prepare(self.choices[index]).start(self.device)
        except CudaError as error:
            raise ModelError(f"{row['node']} ({row['op']}): {error}") from error
        for made, tensor in zip(row["outputs"], call.outputs, strict=True):
            if made is not None and tensor is not None:
                values[made["name"]] = tensor

    def scratch(self, size: int) -> int:
        """Memory that programs write while they run; they run one after the other, so it is the same for all."""
        if size > self._scratch_size:
            if self._scratch is not None:
                self.pool.give(self._scratch)
            self._scratch, self._scratch_size = self.pool.take(size), size
        assert self._scratch is not None
        return self._scratch

    def _place_constants(self, model: ir.Model) -> dict[str, Tensor]:
        """What launches read, and what is an output as it is."""
        read_ = {name for row in self.launches for name in row["inputs"]} | {o.name for o in self.outputs}
        nodes = [v for node in model.graph if node.op_type == "Constant" for v in node.outputs]
        found = {}
        for value in (*model.graph.initializers.values(), *nodes):
            if value.name not in read_ or value.is_graph_input():
                continue
            array = constant(value)
            assert array is not None and value.name is not None
            kind = value.dtype or ir.DataType.from_numpy(array.dtype)
            tensor = found[value.name] = Tensor.of(array, kind)
            tensor.to_device(self.pool)
        return found

    def _last_uses(self) -> list[list[str]]:
        """Names of values that no step after each needs."""
        keep = {o.name for o in self.outputs}
        last: dict[str, int] = {}
        for index, step in enumerate(self._steps):
            row = self.launches[step["launch"]] if "launch" in step else None
            inputs = step["inputs"] if row is None else row["inputs"]
            outputs = step["outputs"] if row is None else [o["name"] for o in row["outputs"] if o is not None]
            last |= dict.fromkeys((n for n in (*inputs, *outputs) if n is not None), index)
        found: list[list[str]] = [[] for _ in self._steps]
        for name, index in last.items():
            if name not in keep:
                found[index].append(name)
        return found

    def close(self) -> None:
        """Free ONNX Runtime's sessions; memory and code go with the device."""
        self.device.wait()
        self._rest.clear()
        self._values.clear()
        self._constants.clear()
        if self._own:
            self.device.close()
