"""Processors."""

from __future__ import annotations

from optkit.targets.host import detected, features
from optkit.targets.spec import Target

_SDM = "Intel SDM, vol. 2"
_ARM = "Arm ARM, DDI 0487"
_INT8 = frozenset({"fp32", "int8"})
# Levels of the x86-64 psABI.
_V3 = frozenset({"avx2", "fma", "bmi2", "f16c"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

# Weakest first. OpenVINO serves those without VNNI too, but on other machines it does not emulate what it saturates on them.
X86 = (
    Target(
        name="x86-avx2",
        vendor="any",
        arch="x86-64-v3: AVX2 and FMA, no VNNI",
        backends=("onnxruntime",),
        formats=_INT8,
        features=(_V3,),
        saturates=True,
        source=f"{_SDM}: PMADDUBSW saturates to 16 bits",
    ),
    Target(
        name="x86-avx512",
        vendor="any",
        arch="x86-64-v4: AVX-512 F, BW, DQ and VL, no VNNI",
        backends=("onnxruntime",),
        formats=_INT8,
        features=(_V4,),
        saturates=True,
        source=f"{_SDM}: PMADDUBSW saturates to 16 bits",
    ),
    Target(
        name="x86-vnni",
        vendor="any",
        arch="x86-64 with AVX512-VNNI or AVX-VNNI",
        backends=("onnxruntime", "openvino"),
        formats=_INT8,
        features=(_V4 | {"avx512_vnni"}, _V3 | {"avx_vnni"}),
        source=f"{_SDM}: VPDPBUSD accumulates in 32 bits",
    ),
    Target(
        name="x86-amx",
        vendor="intel",
        arch="x86-64 with AMX-INT8 and AMX-BF16",
        backends=("onnxruntime", "openvino"),
        formats=_INT8 | {"bf16"},
        features=(_V4 | {"avx512_vnni", "amx_int8", "amx_bf16"},),
        source=f"{_SDM}: TDPBUSD accumulates in 32 bits, TDPBF16PS in float32",
    ),
)
ARM64 = (
    Target(
        name="arm64-dot",
        vendor="arm",
        arch="Armv8.2-A with the dot product (UDOT, SDOT)",
        backends=("onnxruntime", "openvino"),
        formats=_INT8,
        features=(frozenset({"asimd", "asimddp"}),),
        source=f"{_ARM}: UDOT and SDOT accumulate in 32 bits",
    ),
    Target(
        name="arm64-i8mm",
        vendor="arm",
        arch="Armv8.6-A with 8-bit matrix products (USMMLA, SMMLA)",
        backends=("onnxruntime", "openvino"),
        formats=_INT8,
        features=(frozenset({"asimd", "asimddp", "i8mm"}),),
        source=f"{_ARM}: USMMLA accumulates in 32 bits",
    ),
)
_CPU = Target(
    name="cpu",
    vendor="any",
    arch="this machine",
    backends=("onnxruntime", "openvino"),
    formats=_INT8,
    runs_here=True,
    source="instruction sets from the operating system; speed is measured where it runs",
)

ROWS = detected(_CPU, (*X86, *ARM64), features())
