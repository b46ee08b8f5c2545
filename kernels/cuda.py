"""CUDA's driver interface by ctypes: memory, streams, events, machine code and its launches, with nothing to install.

Artifacts carry this file as ``device.py``: it imports nothing of optkit.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

_NOT_FOUND = "there is no NVIDIA driver here (libcuda.so.1 does not load)"
# CUdevice_attribute of cuda.h.
_ATTRIBUTES = {
    "major": 75,
    "minor": 76,
    "units": 16,
    "l2": 38,
    "clock_khz": 13,
    "memory_clock_khz": 36,
    "shared": 97,
}
# CUfunction_attribute; what a block gets of shared memory without asking.
_MAX_DYNAMIC_SHARED, _SHARED_UNASKED = 8, 48 << 10


class CudaError(RuntimeError):
    """A call of the driver that failed."""


class Device:
    """One GPU with its primary context; close it, or use it in a ``with``."""

    attributes: ClassVar[Mapping[str, int]] = _ATTRIBUTES
    vendor: ClassVar[str] = "CUDA"
    driver: ClassVar[str] = "cuda_driver"
    unasked: ClassVar[int] = _SHARED_UNASKED

    def __init__(self, index: int = 0) -> None:
        self._library = self._library_found()
        self._memory: set[int] = set()
        self._modules: list[ctypes.c_void_p] = []
        self._call("cuInit", ctypes.c_uint(0))
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(index))
        self._context = ctypes.c_void_p()
        self._retain()
        self.use()
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(1))
        self.stream = int(stream.value or 0)

    def _library_found(self) -> ctypes.CDLL:
        try:
            return ctypes.CDLL(os.environ.get("OPTKIT_LIBCUDA", "libcuda.so.1"))
        except OSError as error:
            raise CudaError(_NOT_FOUND) from error

    def _retain(self) -> None:
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)

    def _release(self) -> None:
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'error').decode()} ({code})")

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back."""
        for address in tuple(self._memory):
            self.free(address)
        for module in self._modules:
            self._call("cuModuleUnload", module)
        self._modules.clear()
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(self.stream))
        self._release()

    def use(self) -> None:
        """Make it the device of the thread that calls: each thread has to, once."""
        self._call("cuCtxSetCurrent", self._context)

    def facts(self) -> dict[str, Any]:
        """What records of a measurement must name: device, driver, clocks."""
        name = ctypes.create_string_buffer(128)
        self._call("cuDeviceGetName", name, ctypes.c_int(128), self._device)
        driver = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(driver))
        found: dict[str, Any] = {"device": name.value.decode(), self.driver: driver.value}
        for key, number in self.attributes.items():
            value = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), self._device)
            found[key] = value.value
        return {**found, "arch": f"sm_{found['major']}{found['minor']}"}

    def empty(self, size: int) -> int:
        """The address of ``size`` bytes."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        self._memory.add(address.value)
        return address.value

    def free(self, address: int) -> None:
        """Give back what ``empty`` gave."""
        self._memory.remove(address)
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def put(self, array: np.ndarray) -> int:
        """Copy to the device."""
        array = np.ascontiguousarray(array)
        address = self.empty(array.nbytes)
        self.copy_in(address, array.ctypes.data, array.nbytes)
        return address

    def get(self, address: int, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        """Copy from the device, when the stream is done."""
        array = np.empty(tuple(shape), dtype)
        self.copy_out(array.ctypes.data, address, array.nbytes)
        return array

    def copy_in(self, to: int, source: int, size: int) -> None:
        """Copy bytes of the host to the device, in the order of the stream; the source may change at once."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(to), ctypes.c_void_p(source), ctypes.c_size_t(size), ctypes.c_void_p(self.stream),
        )  # fmt: skip

    def copy_out(self, to: int, source: int, size: int) -> None:
        """Copy bytes of the device to the host, when the stream is done."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(to), ctypes.c_uint64(source), ctypes.c_size_t(size), ctypes.c_void_p(self.stream),
        )  # fmt: skip
        self.wait()

    def copy(self, to: int, source: int, size: int) -> None:
        """Copy bytes within the device, in the order of the stream."""
        self._call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(size), ctypes.c_void_p(self.stream),
        )  # fmt: skip

    def load(self, code: bytes, entry: str, *, shared: int = 0) -> int:
        """A function of machine code, allowed to ask for ``shared`` bytes of shared memory a block."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(code))
        self._modules.append(module)
        self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(entry.encode()))
        if shared > self.unasked:
            self._call(
                "cuFuncSetAttribute", function, ctypes.c_int(_MAX_DYNAMIC_SHARED), ctypes.c_int(shared)
            )
        return int(function.value or 0)

    def launch(
        self, function: int, grid: Sequence[int], threads: int, shared: int, arguments: Sequence[Any]
    ) -> None:
        """Start a function on the stream; an empty grid starts nothing.

        Args:
            function: What ``load`` gave.
            grid: Blocks along three axes.
            threads: Of a block.
            shared: Bytes of a block.
            arguments: Numbers of ctypes, in the order of the function's parameters.
        """
        if 0 in grid:
            return
        places = [ctypes.cast(ctypes.byref(a), ctypes.c_void_p) for a in arguments]
        self._call(
            "cuLaunchKernel", ctypes.c_void_p(function), *map(ctypes.c_uint, grid), ctypes.c_uint(threads),
            ctypes.c_uint(1), ctypes.c_uint(1), ctypes.c_uint(shared), ctypes.c_void_p(self.stream),
            (ctypes.c_void_p * len(places))(*places), None,
        )  # fmt: skip

    def wait(self) -> None:
        """Until the stream is done."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def event(self) -> ctypes.c_void_p:
        """A point in time on the stream, recorded now."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
        self._call("cuEventRecord", event, ctypes.c_void_p(self.stream))
        return event

    def seconds(self, start: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        """Between two events."""
        self._call("cuEventSynchronize", end)
        milliseconds = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(milliseconds), start, end)
        for event in (start, end):
            self._call("cuEventDestroy_v2", event)
        return milliseconds.value / 1e3


if __name__ == "__main__":
    try:
        with Device() as device:
            print(json.dumps(device.facts(), indent=2))
    except CudaError as error:
        raise SystemExit(str(error)) from None
