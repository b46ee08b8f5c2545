"""A vision transformer of the shape of ViT-S/16 with random weights; nothing is learnt, it is there to be timed.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, arXiv:2010.11929, section 3.1; the small size is that of
Touvron et al., "DeiT", 2020, arXiv:2012.12877, table 1. Attention is written out, as most exports have it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from optkit.benchmarks.builders.vision import Residual, write

_WIDTH, _LAYERS, _HEADS, _PATCH, _SIZE = 384, 12, 6, 16, 224


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = self.qkv(x).reshape(batch, tokens, 3, _HEADS, _WIDTH // _HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(_WIDTH // _HEADS)).softmax(-1)
        y: Tensor = self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, _WIDTH))
        return y


class VisionTransformer(nn.Module):
    """``[batch, 3, 224, 224]`` -> ``[batch, 1000]``."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, _WIDTH, _PATCH, _PATCH)
        self.token = nn.Parameter(torch.randn(1, 1, _WIDTH) * 0.02)
        self.places = nn.Parameter(torch.randn(1, (_SIZE // _PATCH) ** 2 + 1, _WIDTH) * 0.02)
        self.layers = nn.Sequential(*(self._layer() for _ in range(_LAYERS)))
        self.norm, self.head = nn.LayerNorm(_WIDTH, 1e-6), nn.Linear(_WIDTH, 1000)

    @staticmethod
    def _layer() -> nn.Module:
        feed = (nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH))
        return nn.Sequential(
            Residual(nn.LayerNorm(_WIDTH, 1e-6), _Attention()), Residual(nn.LayerNorm(_WIDTH, 1e-6), *feed)
        )

    def forward(self, image: Tensor) -> Tensor:
        """The class token's row of the last layer, projected."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        y: Tensor = self.head(self.norm(self.layers(x))[:, 0])
        return y


def build(folder: Path, path: Path) -> None:
    """Write the model to ``path``; ``folder`` is not needed."""
    write(VisionTransformer, path, size=_SIZE, output="logits")
