"""Words rendered in the fonts of this system and a network that reads them: the second task for the training recipes.

Words are those of the language reference that Python brings (``pydoc_data.topics``), three to eight letters; those of the
test are never trained on. Fonts: DejaVu where the system has it, and Pillow's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from optkit.benchmarks.digits import Loader, fit

HEIGHT, WIDTH, LONGEST = 16, 96, 8
_FONTS = Path("/usr/share/fonts/truetype/dejavu")
_KINDS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "DejaVuSans-Bold.ttf")
_TEST, _EACH = 400, 4


class Reader(nn.Module):
    """Convolutions down to a line of 24 places, and two transformer blocks over them; class 0 is CTC's blank."""

    def __init__(self, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(_layer(1, 32), nn.MaxPool2d(2), _layer(32, width), nn.MaxPool2d(2))
        self.line = nn.Sequential(_layer(width, width), nn.Conv2d(width, width, (HEIGHT // 4, 1)))
        self.places = nn.Parameter(torch.randn(WIDTH // 4, width) * 0.02)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(blocks)))
        self.head = nn.Linear(width, 27)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of letters ``[batch, 24, 27]`` for pictures ``[batch, 1, 16, 96]``."""
        line = self.line(self.stem(x)).squeeze(2).transpose(1, 2)
        scores: torch.Tensor = self.head(self.blocks(line + self.places))
        return scores


def _layer(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class _Block(nn.Module):
    """Attention and a feed-forward layer, norms before them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (
            f(y).unflatten(2, (self.heads, self.head_dim)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(2, 3) / math.sqrt(self.head_dim)).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@dataclass(frozen=True, slots=True)
class Words:
    """Pictures ``[n, 1, 16, 96]``, dark on light from 0 to 1, and their letters ``[n, 8]`` from 1, zeros behind the end."""

    x: torch.Tensor
    y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @staticmethod
    def load() -> Words:
        """The same pictures each time, as far as the system has the same fonts."""
        from pydoc_data import topics

        found: set[str] = set()
        for text in topics.topics.values():
            found |= set(re.findall(rf"\b[a-z]{{3,{LONGEST}}}\b", text))
        random = np.random.default_rng(0)
        words = random.permutation(sorted(found)).tolist()
        test, train = words[:_TEST], words[_TEST:]
        x, y = _drawn([w for w in train for _ in range(_EACH)], random)
        test_x, test_y = _drawn([w for w in test for _ in range(2)], random)
        return Words(x, y, test_x, test_y)


def _drawn(words: Sequence[str], random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    from PIL import Image, ImageDraw, ImageFont

    files = [_FONTS / k for k in _KINDS if (_FONTS / k).is_file()]
    fonts: list[Any] = [ImageFont.truetype(str(f), s) for f in files for s in (11, 12, 13)]
    fonts += [ImageFont.load_default(s) for s in (12, 14)]
    pictures = np.empty((len(words), 1, HEIGHT, WIDTH), np.float32)
    letters = np.zeros((len(words), LONGEST), np.int64)
    for i, word in enumerate(words):
        fitting = [f for f in fonts if f.getlength(word) < WIDTH - 4]
        font = fitting[random.integers(len(fitting))]
        picture = Image.new("L", (WIDTH, HEIGHT), 255)
        left = random.uniform(1, WIDTH - 2 - font.getlength(word))
        ImageDraw.Draw(picture).text(
            (left, random.uniform(-2, 1)), word, fill=int(random.integers(0, 90)), font=font
        )
        noisy = np.asarray(picture, np.float32) / 255 + random.normal(0, 0.12, (HEIGHT, WIDTH))
        pictures[i, 0] = noisy.clip(0, 1)
        letters[i, : len(word)] = [ord(c) - 96 for c in word]
    return torch.as_tensor(pictures), torch.as_tensor(letters)


def batches(data: Words) -> Loader:
    """Shuffled, as they are: the words lie in different places already."""
    return Loader(data, shift=0)


def loss(scores: torch.Tensor, letters: torch.Tensor) -> torch.Tensor:
    """CTC (Graves et al. 2006)."""
    steps = torch.full((len(scores),), scores.shape[1])
    found: torch.Tensor = F.ctc_loss(
        scores.float().log_softmax(-1).transpose(0, 1),
        letters,
        steps,
        (letters > 0).sum(1),
        zero_infinity=True,
    )
    return found


def read(scores: np.ndarray) -> np.ndarray:
    """Letters ``[n, 8]`` of scores ``[n, places, 27]``: the likeliest of each place, once a run, without blanks."""
    best = scores.argmax(-1)
    found = np.zeros((len(best), LONGEST), np.int64)
    for row, line in zip(found, best, strict=True):
        kept = [c for i, c in enumerate(line.tolist()) if c and (i == 0 or c != line[i - 1])][:LONGEST]
        row[: len(kept)] = kept
    return found


def right(module: nn.Module, data: Words) -> np.ndarray:
    """Which test pictures the module reads without a mistake."""
    was = module.training
    module.eval()
    with torch.no_grad():
        scores = torch.cat([module(x) for x in data.test_x.split(100)]).numpy()
    module.train(was)
    found: np.ndarray = (read(scores) == data.test_y.numpy()).all(1).astype(np.float64)
    return found


def train(module: nn.Module, data: Words, epochs: int) -> nn.Module:
    """Train a float network."""
    return fit(module.train(), batches(data), loss, epochs, clip=1.0).eval()
