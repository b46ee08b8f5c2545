"""A detector of the shape of YOLOv8's smallest size with random weights; nothing is learnt, it is there to be timed.

Backbone and neck of blocks that split, convolve and concatenate (Wang et al., "CSPNet", 2019, arXiv:1911.11929; ELAN,
arXiv:2211.04800), pyramid pooling (He et al., 2014, arXiv:1406.4729), paths down and up again (Liu et al., "PANet", 2018,
arXiv:1803.01534), an anchor-free head with two branches (Ge et al., "YOLOX", 2021, arXiv:2107.08430) whose box sides are
distributions over 16 bins (Li et al., "Generalized Focal Loss", 2020, arXiv:2006.04388). Boxes are decoded in the graph.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from optkit.benchmarks.builders.vision import Residual, conv_norm, write

_SIZE, _BINS, _CLASSES, _STRIDES = 640, 16, 80, (8, 16, 32)
_WIDTHS = (64, 128, 256)


def _conv(inputs: int, outputs: int, size: int = 1, stride: int = 1) -> nn.Module:
    return nn.Sequential(*conv_norm(inputs, outputs, size, stride), nn.SiLU())


class _Split(nn.Module):
    """Halves the channels; one half goes through ``n`` blocks, and all that came about is merged."""

    def __init__(self, inputs: int, outputs: int, n: int, *, residual: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.start, self.merge = _conv(inputs, outputs), _conv((2 + n) * half, outputs)
        kind = Residual if residual else nn.Sequential
        self.blocks = nn.ModuleList(kind(_conv(half, half, 3), _conv(half, half, 3)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.start(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        y: Tensor = self.merge(torch.cat(parts, 1))
        return y


class _Pyramid(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.start, self.merge = _conv(width, width // 2), _conv(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.start(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        y: Tensor = self.merge(torch.cat(parts, 1))
        return y


class Detector(nn.Module):
    """``[batch, 3, 640, 640]`` -> ``[batch, 4 + 80, 8400]``: centre, size and class scores of every cell."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 16, 3, 2), _conv(16, 32, 3, 2), _Split(32, 32, 1, residual=True))
        self.third = nn.Sequential(_conv(32, 64, 3, 2), _Split(64, 64, 2, residual=True))
        self.fourth = nn.Sequential(_conv(64, 128, 3, 2), _Split(128, 128, 2, residual=True))
        self.fifth = nn.Sequential(_conv(128, 256, 3, 2), _Split(256, 256, 1, residual=True), _Pyramid(256))
        self.up = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.down4, self.down3 = _Split(384, 128, 1, residual=False), _Split(192, 64, 1, residual=False)
        self.to4, self.up4 = _conv(64, 64, 3, 2), _Split(192, 128, 1, residual=False)
        self.to5, self.up5 = _conv(128, 128, 3, 2), _Split(384, 256, 1, residual=False)
        self.boxes = nn.ModuleList(self._branch(width, 4 * _BINS, 64) for width in _WIDTHS)
        self.classes = nn.ModuleList(self._branch(width, _CLASSES, 80) for width in _WIDTHS)
        cells, strides = [], []
        for stride in _STRIDES:
            n = _SIZE // stride
            y, x = torch.meshgrid(torch.arange(n) + 0.5, torch.arange(n) + 0.5, indexing="ij")
            cells.append(torch.stack([x, y]).reshape(2, -1))
            strides.append(torch.full((1, n * n), float(stride)))
        self.cells, self.strides = nn.Buffer(torch.cat(cells, 1)), nn.Buffer(torch.cat(strides, 1))
        self.bins = nn.Buffer(torch.arange(_BINS, dtype=torch.float32).reshape(1, _BINS, 1, 1))

    @staticmethod
    def _branch(inputs: int, outputs: int, inner: int) -> nn.Module:
        return nn.Sequential(_conv(inputs, inner, 3), _conv(inner, inner, 3), nn.Conv2d(inner, outputs, 1))

    def forward(self, image: Tensor) -> Tensor:
        """All three levels, coarse cells last."""
        x3 = self.third(self.stem(image))
        x4 = self.fourth(x3)
        x5 = self.fifth(x4)
        y4 = self.down4(torch.cat([self.up(x5), x4], 1))
        y3 = self.down3(torch.cat([self.up(y4), x3], 1))
        y4 = self.up4(torch.cat([self.to4(y3), y4], 1))
        y5 = self.up5(torch.cat([self.to5(y4), x5], 1))
        levels = (y3, y4, y5)
        sides = torch.cat([f(x).flatten(2) for f, x in zip(self.boxes, levels, strict=True)], 2)
        scores = torch.cat([f(x).flatten(2) for f, x in zip(self.classes, levels, strict=True)], 2).sigmoid()
        # Four sides, each the expectation over its bins.
        sides = sides.reshape(sides.shape[0], 4, _BINS, sides.shape[2]).transpose(1, 2).softmax(1)
        before, after = nn.functional.conv2d(sides, self.bins.reshape(1, _BINS, 1, 1)).squeeze(1).chunk(2, 1)
        low, high = self.cells - before, self.cells + after
        return torch.cat([(low + high) / 2 * self.strides, (high - low) * self.strides, scores], 1)


def build(folder: Path, path: Path) -> None:
    """Write the model to ``path``; ``folder`` is not needed."""
    write(Detector, path, size=_SIZE, output="cells")
