"""NVIDIA's GPUs.

Peaks are dense, without 2:4 sparsity, with sums in float32 (int32 for int8): GeForce cards reach twice as much in fp16 and fp8
with sums in float16, which no runtime here uses.
"""

from __future__ import annotations

from optkit.targets.gpu import ARCHITECTURES, Capability, formats
from optkit.targets.spec import Target

_TERA, _GIGA, _MIB, _GIB = 1e12, 1e9, 2**20, 2**30

# What the first architecture with a format is: the PTX ISA's tables for mma, wgmma and tcgen05, and what TensorRT-RTX
# 1.7.1 answers when it is asked to build ("model contains HW-specific datatypes").
_FIRST = {
    "bf16": "sm_80",
    "w4a16": "sm_80",
    "w4a8": "sm_89",
    "fp8": "sm_89",
    "nvfp4": "sm_100 and sm_120",
    "mxfp4": "sm_100 and sm_120",
    "mxfp8": "sm_100 and sm_120",
}


def _gpu(
    name: str,
    capability: Capability,
    *,
    units: int,
    gib: float,
    gbs: float,
    l2: float,
    source: str,
    **teraops: float,
) -> Target:
    limits, known = ARCHITECTURES[capability], formats(capability)
    return Target(
        name=name,
        vendor="nvidia",
        arch=limits.arch,
        backends=("tensorrt",),
        formats=known,
        memory=int(gib * _GIB),
        bandwidth=gbs * _GIGA,
        peak={fmt: value * _TERA for fmt, value in teraops.items()},
        source=source,
        capability=capability,
        units=units,
        l2=int(l2 * _MIB),
        shared=limits.shared,
        lacks={
            fmt: f"{fmt} starts with {first}; {name} is {limits.arch}"
            for fmt, first in _FIRST.items()
            if fmt not in known
        },
    )  # fmt: skip


ROWS = (
    _gpu(
        "t4", (7, 5), units=40, gib=16, gbs=320, l2=4, fp32=8.1, fp16=65, int8=130,
        source="T4 datasheet (65 and 130 dense); 40 SMs, 320 GB/s, 4 MiB: TechPowerUp, Tesla T4",
    ),
    _gpu(
        "a10", (8, 6), units=72, gib=24, gbs=600, l2=6, fp32=31.2, tf32=62.5, fp16=125, bf16=125, int8=250,
        source="A10 datasheet; 72 SMs and 6 MiB: TechPowerUp, A10 PCIe",
    ),
    _gpu(
        "a100", (8, 0), units=108, gib=80, gbs=2039, l2=40, fp32=19.5, tf32=156, fp16=312, bf16=312, int8=624,
        source="A100 80 GB SXM datasheet",
    ),
    _gpu(
        "l4", (8, 9), units=58, gib=24, gbs=300, l2=48, fp32=30.3, tf32=60, fp16=121, bf16=121, fp8=242, int8=242,
        source="L4 datasheet, its figures with sparsity halved; 58 SMs = 7424 cores / 128",
    ),
    _gpu(
        "l40s", (8, 9), units=142, gib=48, gbs=864, l2=96, fp32=91.6, tf32=183, fp16=362, bf16=362, fp8=733, int8=733,
        source="L40S datasheet; sources say 48 or 96 MiB of L2: the larger, so that no floor is too high",
    ),
    _gpu(
        "h100", (9, 0), units=132, gib=80, gbs=3350, l2=50, fp32=67, tf32=494.7, fp16=989.4, bf16=989.4, fp8=1978.9,
        int8=1978.9, source="H100 SXM: NVIDIA's Hopper whitepaper; 132 SMs and 50 MiB are also what the device reports",
    ),
    _gpu(
        "h200", (9, 0), units=132, gib=141, gbs=4800, l2=60, fp32=67, tf32=494.7, fp16=989.4, bf16=989.4, fp8=1978.9,
        int8=1978.9, source="H200 SXM datasheet; 60 MiB is what the device reports",
    ),
    _gpu(
        "b200", (10, 0), units=148, gib=180, gbs=8000, l2=126, fp32=75, tf32=1125, fp16=2250, bf16=2250, fp8=4500,
        int8=4500, nvfp4=9000, mxfp4=9000, mxfp8=4500,
        source="HGX B200 datasheet, its figures with sparsity halved; SMs and L2 are not documented alike everywhere",
    ),
    _gpu(
        "rtx3090", (8, 6), units=82, gib=24, gbs=936, l2=6, fp32=35.6, tf32=35.6, fp16=71, bf16=71, int8=284,
        source="GA102 whitepaper, appendix A",
    ),
    _gpu(
        "rtx4090", (8, 9), units=128, gib=24, gbs=1008, l2=72, fp32=82.6, tf32=82.6, fp16=165.2, bf16=165.2, fp8=330.3,
        int8=660.6, source="Ada whitepaper, appendix A; waredb.com, GeForce RTX 4090",
    ),
    _gpu(
        "rtx5090", (12, 0), units=170, gib=32, gbs=1792, l2=96, fp32=104.8, tf32=104.8, fp16=209.5, bf16=209.5, fp8=419,
        int8=838, nvfp4=1676, mxfp4=1676, mxfp8=419, source="RTX Blackwell whitepaper, appendix A",
    ),
    _gpu(
        "jetson-orin", (8, 7), units=16, gib=64, gbs=204.8, l2=4, fp32=5.3, fp16=42.5, bf16=42.5, int8=85,
        source="AGX Orin 64 GB technical brief, the GPU alone (275 TOPS adds DLA and sparsity); fp16 is half of int8",
    ),
    _gpu(
        "gb10", (12, 1), units=48, gib=128, gbs=273, l2=24, fp32=31, nvfp4=500, mxfp4=500, fp8=125, mxfp8=125, int8=250,
        fp16=62.5, bf16=62.5,
        source="DGX Spark: 1 PFLOP fp4 is with sparsity; other formats by the ratios of the RTX 5090, same tensor cores",
    ),
)  # fmt: skip
