"""The table of backends, and the extra that installs what each needs."""

from __future__ import annotations

from optkit.registry import Registry

BACKENDS = Registry(
    "backend",
    {
        "onnxruntime": "optkit.backends.onnxruntime:OnnxRuntime",
        "openvino": "optkit.backends.openvino.lower:OpenVino",
        "tensorrt": "optkit.backends.tensorrt.lower:TensorRt",
        "coreml": "optkit.backends.coreml.lower:CoreMl",
        "coreai": "optkit.backends.coreai.lower:CoreAi",
        "litert": "optkit.backends.litert.lower:LiteRt",
        "triton": "optkit.backends.triton.lower:Triton",
    },
    group="optkit.backends",
    extras={"openvino": "openvino", "coreml": "coreml", "coreai": "coreai", "litert": "litert"},
)
