"""Crops of natural photographs, normalised as image classifiers expect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from optkit.benchmarks import datasets

# The photographs among scikit-image's pictures, in colour or not; the rest are diagrams and microscopy.
_NAMES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
)


def photos() -> list[Path]:
    """The photographs, by name."""
    folder = datasets.find("photos")
    return [folder / name for name in _NAMES]


def crops(
    n: int, *, seed: int, size: int = 224, mean: float = 127 / 255, deviation: float = 128 / 255
) -> Iterator[np.ndarray]:
    """``n`` random crops, a third to the whole of a photograph each, as ``[1, 3, size, size]``."""
    rng = np.random.default_rng(seed)
    paths = photos()
    for i in range(n):
        with Image.open(paths[i % len(paths)]) as file:
            picture = file.convert("RGB")
        side = int(min(picture.size) * rng.uniform(0.35, 1.0))
        left, top = (int(rng.integers(0, edge - side + 1)) for edge in picture.size)
        picture = picture.crop((left, top, left + side, top + side)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        yield pixels(picture, mean, deviation)


def pixels(picture: Image.Image, mean: float, deviation: float) -> np.ndarray:
    """A colour picture as ``[1, 3, height, width]``, ``(x / 255 - mean) / deviation``."""
    x = (np.asarray(picture, np.float32) / 255 - np.float32(mean)) / np.float32(deviation)
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None])
