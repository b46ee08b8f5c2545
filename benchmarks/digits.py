"""Two small networks and handwritten digits to train them on: what the recipes for training are measured with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

_TRAIN = 1000


class Residual(nn.Module):
    """Two stages of plain convolutions with shortcuts."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = _Unit(1, width)
        self.a1, self.a2 = _Unit(width, width), _Unit(width, width, relu=False)
        self.down = _Unit(width, 2 * width, stride=2)
        self.b1, self.b2 = _Unit(2 * width, 2 * width), _Unit(2 * width, 2 * width, relu=False)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores ``[batch, 10]``."""
        x = F.max_pool2d(self.stem(x), 2)
        x = F.relu(x + self.a2(self.a1(x)))
        x = self.down(x)
        x = F.relu(x + self.b2(self.b1(x)))
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores


class Separable(nn.Module):
    """Depthwise and pointwise convolutions, as in networks for phones."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = _Unit(1, width)
        self.a = _Separated(width, width)
        self.b = _Separated(width, 2 * width)
        self.c = _Separated(2 * width, 2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores ``[batch, 10]``."""
        x = F.max_pool2d(self.stem(x), 2)
        x = F.max_pool2d(self.b(x + self.a(x)), 2)
        x = x + self.c(x)
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores


class _Unit(nn.Module):
    def __init__(
        self, i: int, o: int, *, stride: int = 1, kernel: int = 3, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(o)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.relu(self.norm(self.conv(x)))
        return y


class _Separated(nn.Sequential):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(_Unit(i, i, groups=i), _Unit(i, o, kernel=1))


@dataclass(frozen=True, slots=True)
class Digits:
    """Pictures ``[n, 1, 16, 16]`` from 0 to 1, and their labels."""

    x: torch.Tensor
    y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @staticmethod
    def load() -> Digits:
        """The set, split the same way each time."""
        from sklearn.datasets import load_digits

        raw = load_digits()
        x = torch.as_tensor(raw.images[:, None] / 16.0, dtype=torch.float32)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = x[order], torch.as_tensor(raw.target)[order]
        return Digits(x[:_TRAIN], y[:_TRAIN], x[_TRAIN:], y[_TRAIN:])


class Loader:
    """Shuffled batches, shifted by up to a pixel; a new order each epoch, the same in each process."""

    def __init__(self, data: Digits, size: int = 50, seed: int = 0) -> None:
        self._data, self._size, self._random = data, size, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._data.x) // self._size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self._data.x), generator=self._random)
        for k in range(len(self)):
            rows = order[k * self._size : (k + 1) * self._size]
            dx, dy = torch.randint(-1, 2, (2,), generator=self._random).tolist()
            yield torch.roll(self._data.x[rows], (dx, dy), (2, 3)), self._data.y[rows]


def right(module: nn.Module, data: Digits) -> np.ndarray:
    """Which test pictures the module names right."""
    was = module.training
    module.eval()
    with torch.no_grad():
        found: np.ndarray = (module(data.test_x).argmax(1) == data.test_y).numpy().astype(np.float64)
    module.train(was)
    return found


def train(module: nn.Module, data: Digits, epochs: int) -> nn.Module:
    """Train a float network."""
    loader = Loader(data)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(loader))
    module.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss: Any = F.cross_entropy(module(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
    return module.eval()
