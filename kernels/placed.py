"""Launches with inputs of their own on a device: what they compute, and how long they take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from optkit.errors import ModelError
from optkit.kernels.build import Built, build
from optkit.kernels.launching import Code, Function

if TYPE_CHECKING:
    from optkit.kernels.cuda import Device
    from optkit.kernels.numerics import Launch

_DTYPES = {
    "fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16),
    "i8": np.dtype(np.int8), "i32": np.dtype(np.int32), "i64": np.dtype(np.int64),
    "fp8e4nv": np.dtype(ml_dtypes.float8_e4m3fn),
}  # fmt: skip
# Bytes behind each output, and what stands there before and afterwards.
_TAIL, _MARK = 256, 0x5A


class Placed:
    """A launch whose inputs lie on the device.

    Args:
        device: Of the architecture that the code is for.
        one: The program with its inputs.
        built: The program as machine code.

    Raises:
        UsageError: The device is another one.
        ModelError: The driver does not take the code, or the launch does not keep its promises.
    """

    def __init__(self, device: Device, one: Launch, built: Built) -> None:
        self._device, self._one = device, one
        code = Code(name=built.record["entry"], record=built.record, machine=built.code.read_bytes())
        shapes = [() if a is None else a.shape for a in one.inputs]
        self._held: list[int] = []
        inputs = [None if a is None else self._keep(device.put(a)) for a in one.inputs]
        made = one.kernel.outputs(one.problem, shapes)
        kinds = {
            int(a.binds.partition(":")[2]): _DTYPES[a.type.lstrip("*")]
            for a in one.program.arguments
            if a.binds.startswith("output:")
        }
        # None for what the program does not write.
        self._outputs: list[int | None] = [None] * len(made)
        self._made = {
            i: (shape, kinds[i]) for i, shape in enumerate(made) if shape is not None and i in kinds
        }
        aliases = {int(k): int(v) for k, v in built.record["program"].get("aliases", {}).items()}
        for index, (shape, kind) in self._made.items():
            size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
            blank = np.full(size + _TAIL, _MARK, np.uint8)
            if index in aliases:
                before = one.inputs[aliases[index]]
                assert before is not None
                blank[:size] = np.ascontiguousarray(before).view(np.uint8).reshape(-1)
            self._outputs[index] = self._keep(device.put(blank))
        sizes = one.kernel.sizes(one.problem, shapes)
        self.prepared = Function(device, code).prepare(
            inputs, self._outputs, sizes, lambda size: self._keep(device.empty(size))
        )

    def _keep(self, address: int) -> int:
        self._held.append(address)
        return address

    def run(self) -> list[np.ndarray]:
        """The outputs of one launch.

        Raises:
            ModelError: It wrote behind an output.
        """
        self.prepared.start(self._device)
        found = []
        for index, (shape, kind) in self._made.items():
            address = self._outputs[index]
            assert address is not None
            size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
            raw = self._device.get(address, (size + _TAIL,), np.dtype(np.uint8))
            if (raw[size:] != _MARK).any():
                raise ModelError(f"{self._one.program.function} wrote behind output {index}")
            found.append(raw[:size].view(kind).reshape(shape))
        return found

    def close(self) -> None:
        """Give the memory back."""
        self._device.wait()
        for address in self._held:
            self._device.free(address)
        self._held.clear()


def place(device: Device, launches: Sequence[Launch]) -> list[Placed]:
    """Each launch with machine code for the device.

    Raises:
        BackendUnavailableError: Triton, which compiles, is not installed.
        ModelError: Triton or the driver refuses a program.
    """
    facts = device.facts()
    capability = (int(facts["major"]), int(facts["minor"]))
    built = build([(one.program, capability) for one in launches])
    return [Placed(device, one, found) for one, found in zip(launches, built, strict=True)]
