"""Launches of the pretended driver: written down, and where asked computed by Triton's interpreter on the host's memory.

    python launches.py ARTIFACT FEEDS.npz OUTPUTS.npz LOG.json

runs a Triton artifact with the driver of ``$OPTKIT_LIBCUDA``; every launch is the source of its kernel, with the very
arguments that the driver was given. A process of its own: Triton's interpreter is chosen when kernels are read.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.triton import bundle
from optkit.closeness import batch
from optkit.kernels.cuda import Device
from optkit.kernels.hip import HipDevice
from optkit.reference import ReferenceSession

_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint), ctypes.c_uint,
    ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


class _Kept:
    """A device that keeps what it was told to launch.

    Args:
        records: Of the machine code, by its SHA-256.
        compute: What a launch does.
    """

    def __init__(
        self, records: dict[str, dict[str, Any]], compute: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        super().__init__()
        self._records, self._compute = records, compute
        self._loaded: dict[int, dict[str, Any]] = {}
        self.seen: list[dict[str, Any]] = []
        self._error: BaseException | None = None
        self._callback = _LAUNCH(self._on_launch)
        self._library.fake_on_launch(self._callback)

    def close(self) -> None:
        self._library.fake_on_launch(_LAUNCH(0))
        super().close()

    def load(self, code: bytes, entry: str, *, shared: int = 0) -> int:
        function = super().load(code, entry, shared=shared)
        self._loaded[function] = self._records[hashlib.sha256(code).hexdigest()]
        return function

    def launch(self, *arguments: Any) -> None:
        super().launch(*arguments)
        # What goes wrong in a call from C does not get through it.
        if self._error is not None:
            raise self._error

    def _on_launch(self, *launch: Any) -> None:
        try:
            self._write_down(*launch)
        except BaseException as error:  # noqa: BLE001  (raised again in launch)
            self._error = error

    def _write_down(self, function, grid, block, shared, stream, arguments) -> None:
        record = self._loaded[function]
        kinds = [record["signature"][name] for name in record["parameters"]] + ["*", "*"]
        read = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}
        values = [
            read.get(kind, ctypes.c_uint64).from_address(arguments[i]).value for i, kind in enumerate(kinds)
        ]
        names = [*record["parameters"], *record["trailing_pointers"]]
        launch = {
            "entry": record["entry"], "grid": [grid[i] for i in range(3)], "block": [block[i] for i in range(3)],
            "shared": shared, "stream": stream, "arguments": dict(zip(names, values, strict=True)), "record": record,
        }  # fmt: skip
        self.seen.append(launch)
        if self._compute is not None:
            self._compute(launch)


class Recording(_Kept, Device):
    """One of NVIDIA's."""


class HipRecording(_Kept, HipDevice):
    """One of AMD's."""


def memory(address: int, like: np.ndarray) -> np.ndarray:
    """What lies there, as an array of the kind and shape of ``like``; writing into it writes there."""
    raw = (ctypes.c_uint8 * like.nbytes).from_address(address)
    return np.frombuffer(raw, np.uint8).view(like.dtype).reshape(like.shape)


class Oracle:
    """Does what a launch is for: finds the call by its operands, and writes what ONNX Runtime computes.

    Attributes:
        slow: Programs that take three milliseconds.
        wrong: Programs that write something else.
        count: Launches so far.
    """

    def __init__(self, artifact: Path) -> None:
        model = ir.load(artifact / bundle.MODEL)
        given, _ = batch(artifact / "golden" / "000.npz")
        self.rows = bundle.read(artifact)["launches"]
        names = [n for row in self.rows for n in (*row["inputs"], *(o["name"] for o in row["outputs"] if o))]
        constants = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
        wanted = sorted(set(names) - set(constants) - set(given))
        found = ReferenceSession(model, outputs=wanted, optimize=False).run(given)
        self.values = {**constants, **given, **found}
        files = (artifact / "kernels").glob("*.json")
        self.names = {json.loads(file.read_bytes())["sha256"]: file.stem for file in files}
        self.slow: set[str] = set()
        self.wrong: set[str] = set()
        self.count = 0

    def __call__(self, launch) -> None:
        self.count += 1
        name = self.names[launch["record"]["sha256"]]
        if name in self.slow:
            time.sleep(0.003)
        (row,) = [row for row in self.rows if name in row["kernels"] and self._fits(row, launch)]
        for argument in launch["record"]["program"]["arguments"]:
            kind, _, index = argument["binds"].partition(":")
            if kind == "output":
                right = self.values[row["outputs"][int(index)]["name"]]
                memory(launch["arguments"][argument["name"]], right)[...] = (
                    -right if name in self.wrong else right
                )

    def _fits(self, row, launch) -> bool:
        for argument in launch["record"]["program"]["arguments"]:
            kind, _, index = argument["binds"].partition(":")
            if kind == "input":
                right = self.values[row["inputs"][int(index)]]
                found = memory(launch["arguments"][argument["name"]], right)
                if not np.allclose(found.astype(float), right.astype(float), atol=0.01):
                    return False
        return True


def records(artifact: Path) -> dict[str, dict[str, Any]]:
    """Of all machine code of an artifact, by SHA-256."""
    found = [json.loads(file.read_bytes()) for file in sorted((artifact / "kernels").glob("*.json"))]
    return {record["sha256"]: record for record in found}


def interpreted(launch: dict[str, Any]) -> None:
    """Run the source of a kernel on what the launch points at."""
    import torch

    from optkit.kernels.triton.tensors import TORCH

    record, given = launch["record"], {}
    for name in record["parameters"]:
        kind, value = record["signature"][name], launch["arguments"][name]
        if kind.startswith("*"):
            # The kernel goes where its own arithmetic leads it: only the first address is handed over.
            memory = (ctypes.c_uint8 * 16).from_address(value)
            given[name] = torch.frombuffer(memory, dtype=torch.uint8).view(TORCH[kind[1:]])
        else:
            given[name] = value
    module, _, function = record["program"]["function"].partition(":")
    kernel = getattr(importlib.import_module(module), function)
    kernel[tuple(launch["grid"])](**given, **record["program"]["constants"])


def interpret(
    artifact: Path, given: dict[str, np.ndarray], driver: Path, folder: Path
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """The outputs and the launches, every one computed by Triton's interpreter in another process."""
    np.savez(folder / "feeds.npz", **given)
    arguments = [artifact, folder / "feeds.npz", folder / "out.npz", folder / "log.json"]
    command = [sys.executable, __file__, *map(str, arguments)]
    environment = {**os.environ, "OPTKIT_LIBCUDA": str(driver)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(folder / "out.npz") as found:
        return dict(found), json.loads((folder / "log.json").read_text())


def main(artifact: Path, feeds: Path, outputs: Path, log: Path) -> None:
    from optkit.backends.triton.runtime import DeviceSession
    from optkit.kernels.triton import interpret

    interpret._check_dot()
    with np.load(feeds) as arrays:
        given = {k: arrays[k] for k in arrays.files}
    with Recording(records(artifact), interpreted) as device:
        session = DeviceSession(artifact, device, rest="cpu")
        found = session.run(given)
        session.close()
        np.savez(outputs, **found)
        log.write_text(json.dumps([{k: v for k, v in one.items() if k != "record"} for one in device.seen]))


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated
    main(*map(Path, sys.argv[1:]))
