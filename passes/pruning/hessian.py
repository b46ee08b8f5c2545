"""SparseGPT: remove weights one input at a time and let those that follow make up for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from optkit.passes.base import Context, call
from optkit.passes.modes import evaluating

# Columns whose masks are chosen together, and the share of the mean diagonal that is added to it: both as in the paper.
_BLOCK = 128
_DAMPING = 0.01


def hessians(module: nn.Module, context: Context, paths: Sequence[str]) -> dict[str, torch.Tensor]:
    """``X X^T`` of the inputs of each layer over the example batches; grouped convolutions have none."""
    training = context.training
    assert training is not None
    found: dict[str, torch.Tensor] = {}
    hooks = []

    def watch(path: str) -> Any:
        def hook(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = _columns(layer, inputs[0].detach()).double()
            found[path] = found.get(path, torch.zeros((), dtype=torch.float64, device=x.device)) + x @ x.T

        return hook

    for path in paths:
        layer: Any = module.get_submodule(path)
        if isinstance(layer, nn.Linear) or (
            isinstance(layer, nn.Conv2d) and layer.groups == 1 and not isinstance(layer.padding, str)
        ):
            hooks.append(layer.register_forward_pre_hook(watch(path)))
    try:
        with evaluating(module), torch.no_grad():
            for batch in training.batches:
                call(module, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return found


def _columns(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """``[inputs, samples]``."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.movedim(1, 0).flatten(1)


def sparsegpt(
    weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, pattern: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new weights and which of them stay.

    Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1, in float64.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``.
    """
    w, h = weight.double().clone(), hessian.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(_DAMPING * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    keep = torch.ones_like(w, dtype=torch.bool)
    n, m = (int(x) for x in pattern.split(":")) if pattern != "any" else (0, 0)
    for start in range(0, w.shape[1], _BLOCK):
        end = min(start + _BLOCK, w.shape[1])
        if not m:
            saliency = (w[:, start:end] / inverse.diagonal()[start:end]).square()
            gone = int(saliency.numel() * sparsity)
            if gone:
                lost = saliency.flatten().topk(gone, largest=False).indices
                part = torch.ones(saliency.numel(), dtype=torch.bool, device=w.device)
                part[lost] = False
                keep[:, start:end] = part.reshape(saliency.shape)
        for j in range(start, end):
            if m and j % m == 0:
                saliency = (w[:, j : j + m] / inverse.diagonal()[j : j + m]).square()
                lost = saliency.topk(m - n, dim=1, largest=False).indices
                keep[:, j : j + m] = torch.ones_like(saliency, dtype=torch.bool).scatter_(1, lost, False)
            error = torch.where(keep[:, j], 0.0, w[:, j]) / inverse[j, j]
            w[:, j:] -= error[:, None] * inverse[j, j:]
            w[~keep[:, j], j] = 0
    return w.to(weight.dtype), keep
