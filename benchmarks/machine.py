"""What a measurement depends on besides the code: processor and versions. No host name, no path, no time."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from optkit.benchmarks.cores import usable

_PACKAGES = (
    "optkit",
    "coremltools",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "torch",
)

# The instructions that decide how fast a matrix product is.
_FLAGS = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def processor() -> dict[str, str | int | list[str]]:
    """Name, instruction sets that matter, cores that this process may use."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            elif key in ("flags", "Features"):
                flags = set(value.split())
    elif sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or name
    cores = len(usable())
    return {
        "name": name,
        "architecture": platform.machine(),
        "flags": [f for f in _FLAGS if f in flags],
        "cores": cores,
    }


def versions() -> dict[str, str]:
    """Python and the packages that take part, where they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
