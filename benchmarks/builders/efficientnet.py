"""EfficientNet-Lite0 from its published PyTorch weights, exported with TorchScript.

The package's ``set_swish`` is not called: it would put Swish where the lite models have ReLU6, without a word.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch


def build(folder: Path, path: Path) -> None:
    """Export the model with the weights in ``folder`` to ``path``; its code lies in ``folder`` too."""
    sys.path.insert(0, str(folder))
    try:
        package = importlib.import_module("efficientnet_lite_pytorch")
    finally:
        sys.path.remove(str(folder))
    module = package.EfficientNet.from_name("efficientnet-lite0").eval()
    weights = next(iter(sorted(folder.glob("*.pth"))))
    module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    torch.onnx.export(
        module,
        (torch.zeros(1, 3, 224, 224),),
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )
