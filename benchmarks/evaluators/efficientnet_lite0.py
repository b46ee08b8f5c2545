"""EfficientNet-Lite0: top-1 on photographs of things, ten views each or more, labelled by their English captions.

A caption that names several ImageNet classes ("a dog") is right for any of them. Calibration shows stamps whose
caption names no class, before other photographs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optkit.benchmarks.photos import pixels
from optkit.benchmarks.stamps import scene, split_photos, stamps

METRIC = "top-1"
# EfficientNet-Lite's own normalisation.
_MEAN, _DEVIATION, _SIZE = 127 / 255, 128 / 255, 224
_VIEWS = 10


def samples(n: int = 840) -> Iterator[tuple[dict[str, np.ndarray], frozenset[int]]]:
    """A picture, and the classes that are right."""
    rng = np.random.default_rng(0)
    named = [stamp for stamp in stamps() if stamp.classes]
    items = [(stamp, view) for stamp in named for view in range(max(_VIEWS, -(-n // len(named))))]
    backgrounds, _ = split_photos()
    for i in rng.permutation(len(items))[:n]:
        stamp, view = items[i]
        picture = scene(stamp, view, rng, backgrounds=backgrounds, size=_SIZE)
        yield {"image": pixels(picture, _MEAN, _DEVIATION)}, stamp.classes


def score(outputs: dict[str, np.ndarray], label: frozenset[int]) -> float:
    """1 where the best class is one of the right ones."""
    (logits,) = outputs.values()
    return float(int(logits[0].argmax()) in label)


def calibration(n: int = 64) -> Iterator[dict[str, np.ndarray]]:
    """Things that no sample shows."""
    rng = np.random.default_rng(1)
    unnamed = [stamp for stamp in stamps() if not stamp.classes]
    _, backgrounds = split_photos()
    for i, which in enumerate(rng.permutation(len(unnamed))[:n]):
        picture = scene(unnamed[which], i % 4, rng, backgrounds=backgrounds, size=_SIZE)
        yield {"image": pixels(picture, _MEAN, _DEVIATION)}
