"""PP-OCRv4 text detection: how well the map covers the words drawn into a scene, and nothing else (F1).

A scene is a photograph or a sheet of paper with lines of text at known places. The model answers with the core of
each line, not its box, so the columns of a box are what can be found; the mean over the scenes is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from optkit.benchmarks.lines import font, fonts, phrase, words
from optkit.benchmarks.photos import photos, pixels

METRIC = "text F1"
_SIZE, _THRESHOLD = 320, 0.3

Box = tuple[int, int, int, int]


def samples(n: int = 80) -> Iterator[tuple[dict[str, np.ndarray], list[Box]]]:
    """A scene, and the boxes (left, top, right, bottom) of its lines."""
    return _scenes(n, seed=0, held_out=False)


def score(outputs: dict[str, np.ndarray], label: Sequence[Box]) -> float:
    """Harmonic mean of the share of columns found and the share of the map that lies on text."""
    (probabilities,) = outputs.values()
    found = probabilities.reshape(probabilities.shape[-2:]) > _THRESHOLD
    columns = hits = inside = 0
    for left, top, right, bottom in label:
        box = found[top:bottom, left:right]
        columns, hits, inside = columns + box.shape[1], hits + int(box.any(0).sum()), inside + int(box.sum())
    recall, precision = hits / columns, inside / max(1, int(found.sum()))
    return 2 * recall * precision / max(recall + precision, 1e-9)


def calibration(n: int = 16) -> Iterator[dict[str, np.ndarray]]:
    """Scenes with text that no sample shows, before other photographs."""
    for feeds, _ in _scenes(n, seed=1, held_out=True):
        yield feeds


def _scenes(n: int, *, seed: int, held_out: bool) -> Iterator[tuple[dict[str, np.ndarray], list[Box]]]:
    rng = np.random.default_rng(seed)
    source, faces, backgrounds = words(held_out), fonts(), photos()[1 if held_out else 0 :: 2]
    for i in range(n):
        if i % 2:
            shade = int(rng.integers(190, 256))
            picture = Image.new("RGB", (_SIZE, _SIZE), (shade, shade, shade))
        else:
            with Image.open(backgrounds[int(rng.integers(len(backgrounds)))]) as file:
                picture = file.convert("RGB").resize((_SIZE, _SIZE)).filter(ImageFilter.GaussianBlur(3))
        boxes, top = [], int(rng.integers(4, 24))
        while top < _SIZE - 30:
            face = font(faces[int(rng.integers(len(faces)))], int(rng.integers(15, 32)))
            box = _write(rng, picture, face, phrase(rng, source, 22), top)
            if box is None:
                break
            boxes.append(box)
            top = box[3] + int(rng.integers(8, 40))
        noisy = np.asarray(picture, np.float32) + rng.normal(0, rng.uniform(0, 8), (_SIZE, _SIZE, 1))
        picture = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        # The network was trained on pictures in the order blue, green, red.
        yield {"x": np.ascontiguousarray(pixels(picture, 0.5, 0.5)[:, ::-1])}, boxes


def _write(
    rng: np.random.Generator, picture: Image.Image, face: ImageFont.FreeTypeFont, text: str, top: int
) -> Box | None:
    """Draw a line below ``top`` in an ink that stands out; None where it does not fit."""
    draw = ImageDraw.Draw(picture)
    x0, y0, x1, y1 = (int(edge) for edge in draw.textbbox((0, 0), text, face))
    width, height = x1 - x0, y1 - y0
    if width > _SIZE - 8 or top + height > _SIZE - 4:
        return None
    left = int(rng.integers(4, _SIZE - width - 3))
    below = np.asarray(picture.crop((left, top, left + width, top + height)).convert("L"), np.float32).mean()
    ink = int(rng.integers(0, 60)) if below > 128 else int(rng.integers(200, 256))
    draw.text((left - x0, top - y0), text, (ink, ink, ink), face)
    return left, top, left + width, top + height
