"""Devices that LiteRT is for."""

from __future__ import annotations

from optkit.targets.spec import Target

ROWS = (
    Target(
        name="android-cpu", vendor="any", arch="Armv8.2-A with the dot product", backends=("litert",),
        formats=frozenset({"fp32", "int8"}),
        source="LiteRT documentation, 'CPU (XNNPACK)': float32 and int8 kernels for arm64; dot products since Armv8.2-A (Arm ARM, DDI 0487)",
    ),
    Target(
        name="raspberry-pi5", vendor="broadcom", arch="4x Cortex-A76 at 2.4 GHz, Armv8.2-A with the dot product",
        backends=("litert", "onnxruntime"), formats=frozenset({"fp32", "int8"}), memory=8 << 30,
        bandwidth=17.1e9, peak={"fp32": 38.4e9 * 4, "int8": 153.6e9 * 4},
        source="Raspberry Pi 5 product brief: BCM2712, LPDDR4X-4267, 32 bits wide; Cortex-A76 software optimization guide: two 128-bit "
        "FMA or SDOT a cycle and core",
    ),
    Target(
        name="edge-tpu", vendor="google", arch="Coral Edge TPU", backends=("litert",), formats=frozenset({"int8"}), peak={"int8": 4e12},
        lacks={"fp32": "the Edge TPU computes in 8-bit integers alone", "fp16": "the Edge TPU computes in 8-bit integers alone"},
        source="Coral documentation, 'Edge TPU performance' (4 TOPS) and 'TensorFlow models on the Edge TPU': fully 8-bit quantized models",
    ),
)  # fmt: skip
