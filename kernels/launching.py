"""Compiled programs on a device: machine code as files have it, and launches with the arguments that it takes."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optkit.errors import ModelError, UsageError
from optkit.kernels.cuda import CudaError, Device
from optkit.kernels.expressions import evaluate
from optkit.targets.gpu import code_kind

_ALIGNMENT = 16
_WHOLE = {"i32": (ctypes.c_int32, 31), "i64": (ctypes.c_int64, 63)}
# Most blocks along each axis, of every architecture that there are kernels for.
_MOST = ((1 << 31) - 1, 65535, 65535)


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A compiled program.

    Attributes:
        name: Of its files.
        record: What was read from it; see ``optkit.kernels.triton.worker``.
        machine: The machine code.
    """

    name: str
    record: Mapping[str, Any]
    machine: bytes


def read(folder: Path, name: str) -> Code:
    """What lies in ``folder`` as ``<name>.json`` and ``<name>.cubin`` or ``<name>.hsaco``.

    Raises:
        ModelError: A file is missing, or the record is of other code.
    """
    record = json.loads(_bytes(folder / f"{name}.json"))
    file = folder / f"{name}.{code_kind(record['arch'])}"
    machine = _bytes(file)
    if hashlib.sha256(machine).hexdigest() != record["sha256"]:
        raise ModelError(f"{file.name} is not the code that {name}.json describes", hint="compile again")
    return Code(name=name, record=record, machine=machine)


def _bytes(file: Path) -> bytes:
    if not file.is_file():
        raise ModelError(f"{file.name} is missing", hint="compile again")
    return file.read_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A launch that can be started any number of times."""

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[Any, ...]

    def start(self, device: Device) -> None:
        """Start it on the stream of ``device``."""
        device.launch(self.function, self.grid, self.threads, self.shared, self.arguments)

    def times(self, device: Device, *, together: int = 20, rounds: int = 11, warmup: int = 5) -> list[float]:
        """Seconds of a launch by the clock of the device, caches warm.

        Args:
            together: Launches between two events, so that the clock's grain of half a microsecond does not matter.
            rounds: How often that is done; one figure each.
            warmup: Launches before.
        """
        for _ in range(warmup):
            self.start(device)
        found = []
        for _ in range(rounds):
            first = device.event()
            for _ in range(together):
                self.start(device)
            found.append(device.seconds(first, device.event()) / together)
        return found


class Function:
    """A program loaded onto a device.

    Raises:
        UsageError: The code is for another architecture.
        ModelError: The driver does not take it.
    """

    def __init__(self, device: Device, code: Code) -> None:
        self.code, self.device = code, device
        record = code.record
        facts = device.facts()
        if facts["arch"] != record["arch"].rstrip("a"):
            raise UsageError(
                f"{code.name} is code for {record['arch']}, the device is {facts['device']} "
                f"({facts['arch']}): machine code runs only on the architecture that it was compiled for",
                hint="compile for the target that has this device: optkit targets lists them",
            )
        try:
            self._function = device.load(code.machine, record["entry"], shared=record["shared"])
        except CudaError as error:
            raise ModelError(
                f"{code.name} does not load: {error}",
                hint=f"{device.vendor} driver {facts[device.driver]} may be older than the code, "
                f"which Triton {record['triton']} made: update the driver",
            ) from error

    def prepare(
        self,
        inputs: Sequence[int | None],
        outputs: Sequence[int | None],
        sizes: Mapping[str, int],
        allocate: Callable[[int], int],
    ) -> Prepared:
        """The launch for operands at these addresses.

        Args:
            inputs: Of the operator; None where it is left out.
            outputs: Of the operator; None where nobody reads it.
            sizes: What the program's expressions are about.
            allocate: Gives memory for so many bytes that only this launch writes.

        Raises:
            ModelError: An operand is not aligned as the code was promised, is missing, or a size is beyond the code's.
        """
        record, name = self.code.record, self.code.name
        program = record["program"]
        grid = tuple(evaluate(expression, sizes) for expression in program["grid"])
        if any(n > most for n, most in zip(grid, _MOST, strict=True)):
            raise ModelError(
                f"{name}: {' x '.join(map(str, grid))} blocks are more than a GPU starts at a time"
            )
        given = {a["name"]: a for a in program["arguments"]}
        operands = {"input": inputs, "output": outputs}
        arguments: list[Any] = []
        for parameter in record["parameters"]:
            argument = given[parameter]
            kind, _, index = argument["binds"].partition(":")
            if kind in operands:
                found = operands[kind][int(index)]
                if found is None:
                    raise ModelError(f"{name}: its argument {parameter} is left out")
                made: Any = ctypes.c_uint64(found)
            else:
                found = evaluate(argument["binds"], sizes)
                made = _whole(name, argument, found)
            if argument["aligned"] and found % _ALIGNMENT:
                raise ModelError(
                    f"{name}: its argument {parameter} is {found}, and the code was promised a multiple of {_ALIGNMENT}"
                )
            arguments.append(made)
        blocks = grid[0] * grid[1] * grid[2]
        for each in (record["scratch"], record["profile_scratch"]):
            arguments.append(ctypes.c_uint64(allocate(blocks * each) if blocks * each else 0))
        return Prepared(
            function=self._function, grid=(grid[0], grid[1], grid[2]), threads=record["lanes"] * record["warps"],
            shared=record["shared"], arguments=tuple(arguments),
        )  # fmt: skip


def _whole(name: str, argument: Mapping[str, Any], value: int) -> Any:
    if argument["type"] not in _WHOLE:
        raise ModelError(
            f"{name}: its argument {argument['name']} is {argument['type']}, which is not a whole number"
        )
    kind, bits = _WHOLE[argument["type"]]
    if not -(1 << bits) <= value < 1 << bits:
        raise ModelError(
            f"{name}: its argument {argument['name']} is {value}, more than {bits + 1} bits hold"
        )
    return kind(value)
