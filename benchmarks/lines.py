"""Lines of text as a camera or a scanner would see them: many fonts, tilt, blur, noise, poor contrast.

The text is CPython's own documentation of the language, so that nothing but fonts has to be fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from optkit.benchmarks import datasets

# Evaluation reads the front of the text and calibration the back: no line is in both.
_SPLIT = 0.8


@cache
def words(held_out: bool) -> tuple[str, ...]:
    """Words of printable ASCII in reading order; ``held_out`` are those that no evaluation sees."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics))
    found = [w for w in re.findall(r"[\x21-\x7e]+", text) if len(w) <= 14 and re.search(r"[A-Za-z0-9]", w)]
    border = int(len(found) * _SPLIT)
    return tuple(found[border:] if held_out else found[:border])


@cache
def fonts() -> tuple[Path, ...]:
    """The font files, by name."""
    return tuple(sorted(datasets.find("fonts").glob("*.[ot]tf")))


def font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """A font at a size, laid out the same way whatever Pillow was built with."""
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def phrase(rng: np.random.Generator, source: Sequence[str], longest: int) -> str:
    """Consecutive words, at most ``longest`` characters and at least one word."""
    start = int(rng.integers(len(source) - 8))
    text = source[start]
    for word in source[start + 1 : start + 1 + int(rng.integers(1, 5))]:
        if len(text) + 1 + len(word) > longest:
            break
        text += " " + word
    return text


def lines(
    n: int, *, seed: int, held_out: bool = False, longest: int = 20
) -> Iterator[tuple[str, Image.Image]]:
    """``n`` times a text and its grey picture."""
    rng = np.random.default_rng(seed)
    source, faces = words(held_out), fonts()
    for i in range(n):
        text = phrase(rng, source, longest)
        yield text, _render(rng, text, font(faces[i % len(faces)], int(rng.integers(22, 44))))


def _render(rng: np.random.Generator, text: str, face: ImageFont.FreeTypeFont) -> Image.Image:
    left, top, right, bottom = face.getbbox(text)
    side, above = (int(v) for v in rng.integers(4, 14, 2))
    size = (int(right - left) + 2 * side, int(bottom - top) + 2 * above)
    paper, ink = int(rng.integers(150, 256)), int(rng.integers(0, 100))
    picture = Image.new("L", size, paper)
    ImageDraw.Draw(picture).text((side - left, above - top), text, ink, face)
    picture = picture.rotate(rng.uniform(-1.5, 1.5), Image.Resampling.BICUBIC, fillcolor=paper)
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    noisy = np.asarray(picture, np.float32) + rng.normal(0, rng.uniform(0, 14), (size[1], size[0]))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def tensor(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """A grey line as ``[1, 3, height, width]`` in [-1, 1], its shape kept, zeros to the right as PaddleOCR does."""
    scaled = min(width, max(1, round(picture.width * height / picture.height)))
    line = np.asarray(picture.resize((scaled, height), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
    x = np.zeros((1, 3, height, width), np.float32)
    x[..., :scaled] = line
    return x
