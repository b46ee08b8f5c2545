"""Photographs of single things with their English names: the stamps of Tux Paint, before backgrounds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from optkit.benchmarks import datasets
from optkit.benchmarks.photos import photos

_DRAWINGS = {"cartoon", "symbols", "toys", "plastic", "people", "seasonal", "space"}

# Everyday words for several ImageNet classes: (first, last) of each run, in the order of ILSVRC-2012.
_BROADER = {
    "airplane": ((404, 404), (895, 895)),
    "bear": ((294, 297),),
    "beetle": ((300, 307),),
    "bird": ((7, 24), (80, 100), (127, 146)),
    "bull": ((345, 345),),
    "butterfly": ((321, 326),),
    "camel": ((354, 354),),
    "car": (
        (407, 407),
        (436, 436),
        (468, 468),
        (511, 511),
        (609, 609),
        (627, 627),
        (656, 656),
        (751, 751),
        (817, 817),
    ),
    "cat": ((281, 285),),
    "chicken": ((7, 8),),
    "clock": ((409, 409), (530, 530), (892, 892)),
    "cow": ((345, 345),),
    "crab": ((118, 121),),
    "dog": ((151, 268),),
    "drum": ((541, 541),),
    "duck": ((97, 98),),
    "elephant": ((101, 101), (385, 386)),
    "fly": ((308, 308),),
    "fox": ((277, 280),),
    "frog": ((30, 32),),
    "goat": ((348, 350),),
    "guitar": ((402, 402), (546, 546)),
    "horse": ((339, 339),),
    "lizard": ((38, 48),),
    "monkey": ((369, 382),),
    "piano": ((579, 579), (881, 881)),
    "pig": ((341, 342),),
    "rabbit": ((330, 332),),
    "shark": ((2, 4),),
    "sheep": ((348, 349),),
    "snake": ((52, 68),),
    "spider": ((72, 77),),
    "train": ((466, 466), (547, 547), (705, 705), (820, 820)),
    "truck": ((555, 555), (569, 569), (675, 675), (717, 717), (864, 864), (867, 867)),
    "turtle": ((33, 37),),
    "wolf": ((269, 272),),
}

# ImageNet means something else by these.
_FALSE_FRIENDS = {"mouse", "star", "jacket", "saw", "crane", "screen", "nail", "drumstick"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """One picture; ``classes`` are the ImageNet classes that its caption names, maybe none."""

    path: Path
    name: str
    classes: frozenset[int]


def stamps() -> list[Stamp]:
    """All photographs of things, by file name."""
    root, known = datasets.find("stamps"), _classes()
    found = []
    for path in sorted(root.rglob("*.png")):
        caption = path.with_suffix(".txt")
        if caption.exists() and _DRAWINGS.isdisjoint(path.relative_to(root).parts):
            first = caption.read_text("utf-8", "replace").partition("\n")[0]
            name = re.sub(r"^(an?|the|some) ", "", first.strip().lower().rstrip(".!"))
            classes = (
                set()
                if name in _FALSE_FRIENDS
                else known.get(name) or known.get(name.removesuffix("s"), set())
            )
            found.append(Stamp(path=path, name=name, classes=frozenset(classes)))
    return found


def _classes() -> dict[str, set[int]]:
    """Name -> classes: every synonym, the last word of it ("tabby cat" is a cat), and the broader words."""
    names = json.loads((datasets.find("classes") / "imagenet1k_label_to_names.json").read_text("utf-8"))
    known: dict[str, set[int]] = {}
    for index, synonyms in names.items():
        for name in synonyms.lower().split(", "):
            for key in {name, name.split()[-1]}:
                known.setdefault(key, set()).add(int(index))
    for name, runs in _BROADER.items():
        known[name] = {i for first, last in runs for i in range(first, last + 1)}
    return known


def scene(
    stamp: Stamp, view: int, rng: np.random.Generator, *, backgrounds: Sequence[Path], size: int
) -> Image.Image:
    """A stamp in a picture of ``size``: view 0 fills it before grey, others are smaller before a blurred photograph."""
    thing = _cut_out(stamp.path, size)
    if view % 2:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    edge = size * (0.95 if view == 0 else rng.uniform(0.65, 0.95))
    width, height = (max(1, round(side * edge / max(thing.size))) for side in thing.size)
    thing = thing.resize((width, height), Image.Resampling.BICUBIC)
    if view == 0:
        picture = Image.new("RGBA", (size, size), (200, 200, 200, 255))
    else:
        picture = _blurred(backgrounds[int(rng.integers(len(backgrounds)))], size).copy()
    picture.alpha_composite(thing, ((size - width) // 2, (size - height) // 2))
    return picture.convert("RGB")


@cache
def _cut_out(path: Path, size: int) -> Image.Image:
    """The picture, not larger than it is ever shown: reading a stamp takes longer than classifying it."""
    with Image.open(path) as file:
        picture = file.convert("RGBA")
    picture.thumbnail((size, size), Image.Resampling.BICUBIC)
    return picture


@cache
def _blurred(path: Path, size: int) -> Image.Image:
    with Image.open(path) as file:
        picture = file.convert("RGB").resize((size, size)).filter(ImageFilter.GaussianBlur(size / 40))
    return picture.convert("RGBA")


def split_photos() -> tuple[list[Path], list[Path]]:
    """Backgrounds for the evaluation, and others for calibration."""
    paths = photos()
    return paths[::2], paths[1::2]
