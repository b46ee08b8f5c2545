"""What the builders of random vision networks share: weights from a seed, statistics of photographs, the export."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from optkit.benchmarks.photos import crops

_SEED, _WARMING = 0, 8


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias, as wide before as after at stride 1, and its batch normalisation."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def write(make: Callable[[], nn.Module], path: Path, *, size: int, output: str) -> None:
    """Export what ``make`` gives as TorchScript does, for pictures ``[batch, 3, size, size]``.

    Weights: He initialisation (arXiv:1502.01852) of convolutions from a fixed seed, torch's own of the rest. Batch
    normalisation: gammas like those of trained networks, statistics of eight photographs, so that no layer saturates or dies.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        module = make()
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            elif isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.0)
                nn.init.normal_(part.bias, 0.0, 0.1)
                part.momentum = None  # the plain mean of the batches seen
    pictures = torch.from_numpy(np.concatenate(list(crops(_WARMING, seed=1, size=size))))
    with torch.no_grad():
        module.train()(pictures)
    module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of the exporter's age; of sizes that become constants, as they should
        torch.onnx.export(
            module, (pictures[:1],), str(path), dynamo=False, opset_version=17, input_names=["image"], output_names=[output],
            dynamic_axes={"image": {0: "batch"}, output: {0: "batch"}},
        )  # fmt: skip


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that ``body`` keeps."""
        y: Tensor = x + self.body(x)
        return y
