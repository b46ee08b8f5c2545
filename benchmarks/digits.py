"""Two small networks and handwritten digits to train them on: what the recipes for training are measured with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """Shuffled batches, shifted by up to ``shift`` pixels; a new order each epoch, the same in each process.

    Args:
        data: With pictures ``x`` and labels ``y``.
    """

    def __init__(self, data: Any, size: int = 50, seed: int = 0, shift: int = 1) -> None:
        self._data, self._size, self._random = data, size, torch.Generator().manual_seed(seed)
        self._shift = shift

    def __len__(self) -> int:
        return len(self._data.x) // self._size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self._data.x), generator=self._random)
        for k in range(len(self)):
            rows = order[k * self._size : (k + 1) * self._size]
            x = self._data.x[rows]
            if self._shift:
                low, high = -self._shift, self._shift + 1
                x = torch.roll(x, torch.randint(low, high, (2,), generator=self._random).tolist(), (2, 3))
            yield x, self._data.y[rows]


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
    return fit(module.train(), Loader(data), F.cross_entropy, epochs).eval()


def fit(
    module: nn.Module,
    loader: Loader,
    loss: Callable[[Any, Any], torch.Tensor],
    epochs: int,
    *,
    rate: float = 3e-3,
    clip: float | None = None,
) -> nn.Module:
    """A plain loop: AdamW, one cycle of the learning rate up to ``rate``.

    The module is left in the mode that it is in.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            value: Any = loss(module(x), y)
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            schedule.step()
    return module
