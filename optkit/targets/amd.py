"""AMD's GPUs."""

from __future__ import annotations

from optkit.targets.gpu import ARCHITECTURES, GFX942, formats
from optkit.targets.spec import Target

_GFX942 = ARCHITECTURES[GFX942]
_FP8 = "its floats of 8 bits are e4m3fnuz, and no pass writes those; OCP's e4m3 starts with gfx950"

ROWS = (
    Target(
        name="mi300x",
        vendor="amd",
        arch=_GFX942.arch,
        backends=("triton",),
        formats=formats(GFX942),
        memory=192 * 2**30,
        bandwidth=5.3e12,
        peak={"fp32": 163.4e12, "tf32": 653.7e12, "fp16": 1307.4e12, "bf16": 1307.4e12, "int8": 2614.9e12},
        source="AMD Instinct MI300X data sheet, 2023, dense; 304 units, 256 MiB: AMD CDNA 3 white paper",
        capability=GFX942,
        units=304,
        l2=256 * 2**20,
        shared=_GFX942.shared,
        lacks={
            "fp8": f"fp8 is not on mi300x: {_FP8}",
            "w4a8": "w4a8 is not on mi300x",
            **{f: f"{f} starts with gfx950; mi300x is gfx942" for f in ("mxfp8", "mxfp4")},
            "nvfp4": "nvfp4 is NVIDIA's alone; mi300x is gfx942",
        },
    ),
)  # fmt: skip
