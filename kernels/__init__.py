"""The table of fused kernels."""

from __future__ import annotations

from optkit.registry import Registry

KERNELS = Registry(
    "kernel",
    {
        "layer-norm": "optkit.kernels.triton.norm:LayerNorm",
        "add-layer-norm": "optkit.kernels.triton.norm:AddLayerNorm",
        "rms-norm": "optkit.kernels.triton.norm:RmsNorm",
        "add-rms-norm": "optkit.kernels.triton.norm:AddRmsNorm",
    },
    group="optkit.kernels",
)
