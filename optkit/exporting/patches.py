"""Images whose patches are drawn at random, with all of them in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def in_place(module: torch.nn.Module) -> Iterator[None]:
    """ViLT of transformers takes every patch once, in an order drawn at random; here in the order of the image.

    Attention does not depend on the order, since places are added to the patches before. Where an image has more patches
    than ``max_image_length``, the draw decides which of them count at all: then the module's own code stays.
    """
    found = [
        m for m in module.modules() if hasattr(type(m), "visual_embed") and hasattr(m, "patch_embeddings")
    ]
    try:
        for owner in found:
            owner.__dict__["visual_embed"] = _embed(owner, owner.visual_embed)
        yield
    finally:
        for owner in found:
            owner.__dict__.pop("visual_embed", None)


def _embed(owner: Any, drawn: Callable[..., Any]) -> Callable[..., Any]:
    def embed(pixel_values: Tensor, pixel_mask: Tensor, max_image_length: int | None = 200) -> Any:
        patches = owner.patch_embeddings(pixel_values)
        rows, columns = patches.shape[-2:]
        most = -1 if max_image_length is None else int(max_image_length)
        if 0 <= most < rows * columns:
            return drawn(pixel_values, pixel_mask, max_image_length=max_image_length)
        mask = torch.nn.functional.interpolate(pixel_mask[:, None].float(), size=(rows, columns))[:, 0].long()
        table = owner.position_embeddings[0, 1:]
        side = owner.config.image_size // owner.config.patch_size
        down = _bilinear(mask[:, :, 0].sum(1), rows, side)
        across = _bilinear(mask[:, 0, :].sum(1), columns, side)
        lines = (down @ table.view(side, -1)).unflatten(2, (side, -1))
        places = across[:, None] @ lines
        first = owner.cls_token.expand(patches.shape[0], -1, -1)
        first_place = owner.position_embeddings[:, :1].expand(patches.shape[0], -1, -1)
        x = torch.cat([first, patches.flatten(2).transpose(1, 2)], 1) + torch.cat(
            [first_place, places.flatten(1, 2)], 1
        )
        seen = torch.cat([torch.ones_like(mask[:, 0, :1]), mask.flatten(1)], 1)
        index = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
        index = index.reshape(1, -1, 2).expand(patches.shape[0], -1, -1)
        return owner.dropout(x), seen, (index, (rows, columns))

    return embed


def _bilinear(counts: Tensor, size: int, side: int) -> Tensor:
    """Weights of ``side`` places for the first ``counts`` of ``size``, corners on corners; zero behind: ``[batch, size, side]``."""
    step = torch.arange(size, device=counts.device)
    at = step * ((side - 1) / (counts - 1).clamp(min=1))[:, None]
    near = (1 - (at[..., None] - torch.arange(side, device=counts.device)).abs()).clamp(min=0)
    return near * (step < counts[:, None])[..., None]
