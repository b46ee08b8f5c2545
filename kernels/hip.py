"""HIP's runtime by ctypes: the calls of CUDA's driver under AMD's names, with nothing to install."""

from __future__ import annotations

import ctypes
import os
from typing import Any, ClassVar

from optkit.kernels.cuda import CudaError, Device

_NOT_FOUND = "there is no AMD driver here (libamdhip64.so does not load)"
# By the names of CUDA's driver; what is not here is called as there, with ``hip`` in front.
_NAMES = {
    "cuStreamCreate": "hipStreamCreateWithFlags",
    "cuStreamDestroy_v2": "hipStreamDestroy",
    "cuMemAlloc_v2": "hipMalloc",
    "cuMemFree_v2": "hipFree",
    "cuMemcpyHtoDAsync_v2": "hipMemcpyHtoDAsync",
    "cuMemcpyDtoHAsync_v2": "hipMemcpyDtoHAsync",
    "cuMemcpyDtoDAsync_v2": "hipMemcpyDtoDAsync",
    "cuLaunchKernel": "hipModuleLaunchKernel",
    "cuEventCreate": "hipEventCreateWithFlags",
    "cuEventDestroy_v2": "hipEventDestroy",
}
# hipDeviceProp_t of ROCm 6 on (hip_runtime_api.h): its size, and where the name of the architecture stands.
_PROPERTIES, _SIZE, _ARCH = "hipGetDevicePropertiesR0600", 1472, 1160


class HipDevice(Device):
    """One GPU of AMD's; close it, or use it in a ``with``."""

    # hipDeviceAttribute_t of hip_runtime_api.h.
    attributes: ClassVar = {
        "major": 23, "minor": 61, "units": 63, "l2": 19, "clock_khz": 5, "memory_clock_khz": 60, "shared": 74
    }  # fmt: skip
    vendor: ClassVar[str] = "HIP"
    driver: ClassVar[str] = "hip_driver"
    # All that a block may have needs no asking for.
    unasked: ClassVar[int] = 64 << 10

    def _library_found(self) -> ctypes.CDLL:
        for library in [
            os.environ.get("OPTKIT_LIBHIP", "libamdhip64.so"),
            "libamdhip64.so.6",
            "libamdhip64.so.7",
        ]:
            try:
                return ctypes.CDLL(library)
            except OSError:
                continue
        raise CudaError(_NOT_FOUND)

    def _retain(self) -> None:
        """The runtime keeps the context of a device itself."""

    def _release(self) -> None:
        """The same."""

    def use(self) -> None:
        """Make it the device of the thread that calls: each thread has to, once."""
        self._call("cuSetDevice", self._device)

    def _call(self, name: str, *arguments: Any) -> None:
        called = _NAMES.get(name, f"hip{name[2:]}")
        code = getattr(self._library, called)(*arguments)
        if code:
            self._library.hipGetErrorName.restype = ctypes.c_char_p
            text = self._library.hipGetErrorName(code) or b"error"
            raise CudaError(f"{called}: {text.decode()} ({code})")

    def facts(self) -> dict[str, Any]:
        """What records of a measurement must name: device, driver, clocks."""
        properties = ctypes.create_string_buffer(2 * _SIZE)
        if not hasattr(self._library, _PROPERTIES):
            raise CudaError(f"AMD's driver has no {_PROPERTIES}: ROCm 6 or newer is needed")
        code = getattr(self._library, _PROPERTIES)(properties, self._device)
        if code:
            raise CudaError(f"{_PROPERTIES} failed ({code})")
        arch = properties.raw[_ARCH : _ARCH + 256].partition(b"\0")[0].decode()
        # Behind a colon stand features that are on, as in gfx942:sramecc+:xnack-.
        return {**super().facts(), "arch": arch.partition(":")[0]}
