"""Networks over sequences with random weights: a recognizer of text lines with LSTMs, and a decoder with a cache.

Shi et al., "An End-to-End Trainable Neural Network for Image-based Sequence Recognition", 2015, arXiv:1507.05717, table 1,
at half its width; and a decoder as of Touvron et al., "LLaMA", 2023, arXiv:2302.13971, section 2.2, whose cache has a fixed
size and is an input and an output, as what Core ML keeps as a state has to be.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CLASSES = 97
WIDTH, LAYERS, HEADS, PLACES, WORDS = 256, 4, 8, 64, 2000


class Recognizer(nn.Module):
    """``[batch, 1, 32, w]`` -> ``[batch, w / 4, classes]``."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 128, 128, 256)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)
        )
        self.last = nn.Conv2d(256, 256, (2, 1))
        self.first = nn.LSTM(256, 128, bidirectional=True, batch_first=True)
        self.second = nn.LSTM(256, 128, bidirectional=True, batch_first=True)
        self.head = nn.Linear(256, _CLASSES)

    def forward(self, line: Tensor) -> Tensor:
        """Scores of every class at every step."""
        x = line
        for convolution, pool in zip(
            self.convolutions, ((2, 2), (2, 2), (1, 1), (2, 1), (2, 1)), strict=True
        ):
            x = F.max_pool2d(F.relu(convolution(x)), pool)
        x = self.last(x).squeeze(2).transpose(1, 2)
        x, _ = self.first(x)
        x, _ = self.second(x)
        scores: Tensor = self.head(x)
        return scores


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 6 * WIDTH, bias=False), nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.before, self.between = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(
        self, x: Tensor, here: Tensor, turn: tuple[Tensor, Tensor], keys: Tensor, values: Tensor
    ) -> tuple[Tensor, ...]:
        """One token; ``here`` is 1 at its place in the cache and 0 elsewhere."""
        q, k, v = self.qkv(_norm(x, self.before)).reshape(1, 3, HEADS, WIDTH // HEADS).unbind(1)
        q, k = (_turned(t, turn) for t in (q, k))
        place = here.reshape(1, 1, PLACES, 1)
        keys = keys * (1 - place) + k[:, :, None] * place
        values = values * (1 - place) + v[:, :, None] * place
        seen = here.flip(0).cumsum(0).flip(0).reshape(1, 1, 1, PLACES)
        scores = q[:, :, None] @ keys.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        weights = (scores + (1 - seen) * -10000.0).softmax(-1)
        x = x + self.out((weights @ values).reshape(1, WIDTH))
        gate, up = self.up(_norm(x, self.between)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up), keys, values


def _norm(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * scale


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding; Su et al., "RoFormer", 2021, arXiv:2104.09864, eq. 34."""
    half = x.shape[-1] // 2
    return x * turn[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * turn[1]


class Decoder(nn.Module):
    """A token ``[1]``, its place ``[1]`` and the cache -> ``[1, words]`` and the next cache."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        self.end = nn.Parameter(torch.ones(WIDTH))

    def forward(self, token: Tensor, place: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """Scores of the next word."""
        size = WIDTH // HEADS
        angles = place.float() / 10000 ** (torch.arange(0, size, 2) / size)
        turn = torch.cat([angles, angles]).cos(), torch.cat([angles, angles]).sin()
        here = (torch.arange(PLACES) == place).float()
        x, after = self.words(token), list[Tensor]()
        for i, layer in enumerate(self.layers):
            x, keys, values = layer(x, here, turn, cache[2 * i], cache[2 * i + 1])
            after += [keys, values]
        return _norm(x, self.end) @ self.words.weight.T, *after


def recognizer(path: Path) -> None:
    """Write the recognizer of text lines to ``path``."""
    _export(Recognizer, (torch.zeros(1, 1, 32, 128),), path, ["line"], ["scores"])


def decoder(path: Path) -> None:
    """Write one step of the decoder to ``path``; its caches are ``in_0`` and so on, and ``out_0`` the next."""
    cache = [torch.zeros(1, HEADS, PLACES, WIDTH // HEADS) for _ in range(2 * LAYERS)]
    names = [[f"{way}_{i}" for i in range(2 * LAYERS)] for way in ("in", "out")]
    given = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), *cache)
    _export(Decoder, given, path, ["token", "place", *names[0]], ["scores", *names[1]])


def _export(
    make: Callable[[], nn.Module],
    given: tuple[Tensor, ...],
    path: Path,
    inputs: list[str],
    outputs: list[str],
) -> None:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Of the exporter's age, and of sizes that become constants, as they should.
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        torch.onnx.export(
            make().eval(), given, str(path), input_names=inputs, output_names=outputs, opset_version=17, dynamo=False
        )  # fmt: skip
