"""A network of ResNet-50's shape with random weights, whose activations are those of a trained one in size.

He et al., "Deep Residual Learning", 2016, arXiv:1512.03385, table 1, with the stride in the 3x3 convolution.
Weights: He initialisation from a fixed seed. Batch-normalisation statistics: those of eight photographs, so that
no layer saturates or dies. Nothing is learnt: it is there to be timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from optkit.benchmarks.photos import crops

_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
_EPSILON = 1e-5


class _Network:
    """Collects nodes and weights. ``statistics`` None: normalise by the batch and make the moments outputs."""

    def __init__(self, statistics: dict[str, np.ndarray] | None) -> None:
        self.rng = np.random.default_rng(0)
        self.statistics = statistics
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.moments: list[str] = []

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def convolution(self, x: str, name: str, inputs: int, outputs: int, size: int, stride: int) -> str:
        spread = np.sqrt(2 / (inputs * size * size))
        self.weights[f"{name}.weight"] = self.rng.normal(0, spread, (outputs, inputs, size, size)).astype(
            np.float32
        )
        x = self.node(
            "Conv",
            [x, f"{name}.weight"],
            f"{name}.conv",
            kernel_shape=[size, size],
            strides=[stride, stride],
            pads=[size // 2] * 4,
        )
        self.weights[f"{name}.gamma"] = self.rng.uniform(0.5, 1.0, outputs).astype(np.float32)
        self.weights[f"{name}.beta"] = self.rng.normal(0, 0.1, outputs).astype(np.float32)
        if self.statistics is None:
            return self._normalise_batch(x, name)
        self.weights[f"{name}.mean"] = self.statistics[f"{name}.mean"].reshape(-1)
        self.weights[f"{name}.variance"] = self.statistics[f"{name}.variance"].reshape(-1)
        parameters = [f"{name}.{part}" for part in ("gamma", "beta", "mean", "variance")]
        return self.node("BatchNormalization", [x, *parameters], f"{name}.norm", epsilon=_EPSILON)

    def _normalise_batch(self, x: str, name: str) -> str:
        mean = self.node("ReduceMean", [x], f"{name}.mean", axes=[0, 2, 3], keepdims=1)
        centred = self.node("Sub", [x, mean], f"{name}.centred")
        square = self.node("Mul", [centred, centred], f"{name}.square")
        variance = self.node("ReduceMean", [square], f"{name}.variance", axes=[0, 2, 3], keepdims=1)
        self.moments += [mean, variance]
        self.weights[f"{name}.epsilon"] = np.array(_EPSILON, np.float32)
        shape = f"{name}.shape"
        self.weights[shape] = np.array([1, -1, 1, 1], np.int64)
        spread = self.node(
            "Sqrt", [self.node("Add", [variance, f"{name}.epsilon"], f"{name}.safe")], f"{name}.spread"
        )
        unit = self.node("Div", [centred, spread], f"{name}.unit")
        gamma = self.node("Reshape", [f"{name}.gamma", shape], f"{name}.gamma4")
        beta = self.node("Reshape", [f"{name}.beta", shape], f"{name}.beta4")
        return self.node("Add", [self.node("Mul", [unit, gamma], f"{name}.scaled"), beta], f"{name}.norm")

    def block(self, x: str, name: str, inputs: int, inner: int, stride: int) -> str:
        y = self.node("Relu", [self.convolution(x, f"{name}.1", inputs, inner, 1, 1)], f"{name}.1.relu")
        y = self.node("Relu", [self.convolution(y, f"{name}.2", inner, inner, 3, stride)], f"{name}.2.relu")
        y = self.convolution(y, f"{name}.3", inner, 4 * inner, 1, 1)
        if stride != 1 or inputs != 4 * inner:
            x = self.convolution(x, f"{name}.shortcut", inputs, 4 * inner, 1, stride)
        return self.node("Relu", [self.node("Add", [y, x], f"{name}.sum")], f"{name}.relu")

    def model(self) -> onnx.ModelProto:
        x = self.node("Relu", [self.convolution("image", "stem", 3, 64, 7, 2)], "stem.relu")
        x = self.node("MaxPool", [x], "stem.pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        width = 64
        for i, (inner, blocks, stride) in enumerate(_STAGES):
            for j in range(blocks):
                x = self.block(x, f"stage{i + 1}.{j}", width, inner, stride if j == 0 else 1)
                width = 4 * inner
        x = self.node("Flatten", [self.node("GlobalAveragePool", [x], "pool")], "features", axis=1)
        self.weights["head.weight"] = self.rng.normal(0, width**-0.5, (1000, width)).astype(np.float32)
        self.weights["head.bias"] = np.zeros(1000, np.float32)
        self.node("Gemm", [x, "head.weight", "head.bias"], "logits", transB=1)
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1000])]
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.moments]
        graph = helper.make_graph(
            self.nodes,
            "resnet50_shaped",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 224, 224])],
            outputs,
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def build(folder: Path, path: Path) -> None:
    """Write the model to ``path``; ``folder`` is not needed."""
    warm = _Network(statistics=None)
    session = ort.InferenceSession(warm.model().SerializeToString(), providers=["CPUExecutionProvider"])
    batch = np.concatenate(list(crops(8, seed=1)))
    moments = session.run(warm.moments, {"image": batch})
    onnx.save(_Network(dict(zip(warm.moments, moments, strict=True))).model(), path)
