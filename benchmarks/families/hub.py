"""Models of transformers and diffusers from their configurations, and the inputs that they take."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from optkit.benchmarks.families.catalogue import Built, Dynamic

BATCH, LENGTH = 2, 12


def model(kind: str, config: Any, library: str = "transformers") -> nn.Module:
    """A model with random weights: ``kind`` names its class."""
    made: nn.Module = getattr(importlib.import_module(library), kind)(config)
    return made


def config(kind: str, **fields: Any) -> Any:
    """A configuration of transformers."""
    return getattr(importlib.import_module("transformers"), kind)(**fields)


def image(size: int, channels: int = 3, batch: int = BATCH) -> torch.Tensor:
    """Normal numbers, ``[batch, channels, size, size]``."""
    return torch.randn(batch, channels, size, size)


def tokens(vocabulary: int, length: int = LENGTH, batch: int = BATCH) -> torch.Tensor:
    """Random tokens, ``[batch, length]``."""
    return torch.randint(3, vocabulary, (batch, length))


def mask(*shape: int) -> torch.Tensor:
    """All of it counts but the first of the last row, as a tokenizer pads to the left."""
    ones = torch.ones(*(shape or (BATCH, LENGTH)), dtype=torch.int64)
    ones[-1, 0] = 0
    return ones


def vision(module: nn.Module, size: int, **more: Any) -> Built:
    """A network of one image."""
    return Built(
        module=module, inputs={"pixel_values": image(size), **more}, dynamic={"pixel_values": {0: "batch"}}
    )


def caches(layers: int, heads: int, width: int, past: int = 8, batch: int = BATCH) -> Any:
    """A cache of transformers that holds ``past`` tokens of each layer."""
    cache = importlib.import_module("transformers").DynamicCache()
    for layer in range(layers):
        cache.update(torch.randn(batch, heads, past, width), torch.randn(batch, heads, past, width), layer)
    return cache


def cached(layers: int, name: str = "past_key_values", axis: str = "past") -> dict[str, dict[int, str]]:
    """The free axes of such a cache."""
    return {
        f"{name}.{layer}.{part}": {0: "batch", 2: axis}
        for layer in range(layers)
        for part in ("key", "value")
    }


TEXT: Dynamic = {
    "input_ids": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "sequence"},
}
