"""ONNX Runtime on CPUs."""

from __future__ import annotations

from optkit.backends.onnxruntime.lower import OnnxRuntime

__all__ = ["OnnxRuntime"]
