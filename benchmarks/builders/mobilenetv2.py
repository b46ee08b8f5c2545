"""A network of MobileNetV2's shape with random weights; nothing is learnt, it is there to be timed.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, arXiv:1801.04381, table 2.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from optkit.benchmarks.builders.vision import Residual, conv_norm, write

# Expansion, channels, repetitions, stride of the first.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _inverted(inputs: int, outputs: int, stride: int, expansion: int) -> nn.Module:
    inner = inputs * expansion
    wide = [*conv_norm(inputs, inner, 1), nn.ReLU6()] if expansion != 1 else []
    body = [*wide, *conv_norm(inner, inner, 3, stride, inner), nn.ReLU6(), *conv_norm(inner, outputs, 1)]
    return Residual(*body) if stride == 1 and inputs == outputs else nn.Sequential(*body)


def network() -> nn.Module:
    """``[batch, 3, 224, 224]`` -> ``[batch, 1000]``."""
    layers: list[nn.Module] = [*conv_norm(3, 32, 3, 2), nn.ReLU6()]
    width = 32
    for expansion, channels, repetitions, stride in _STAGES:
        for i in range(repetitions):
            layers.append(_inverted(width, channels, stride if i == 0 else 1, expansion))
            width = channels
    layers += [*conv_norm(width, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(1280, 1000))


def build(folder: Path, path: Path) -> None:
    """Write the model to ``path``; ``folder`` is not needed."""
    write(network, path, size=224, output="logits")
