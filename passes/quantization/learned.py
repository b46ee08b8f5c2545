"""Rounding to a grid whose step is learned.

Esser et al., "Learned Step Size Quantization", 2020, arXiv:1902.08153, eq. 1 to 3 and section 2.2, for ``s = exp(t)``, forward
and backward in one node each. Of the values, backward keeps one buffer, which tells what is inside the grid and has what the step's
gradient is made of; bounds are numbers of the host: on processors, kernels that take bounds as tensors, or make masks of bools, take
several times as long as those here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

# The smallest normal float32: steps never get below.
TINY = float(np.finfo(np.float32).tiny)
# The factor of a norm is taken to be no smaller in a dead channel, so that it can be divided by.
_LEAST = 1e-8
# More than any error of rounding, and less than what is between one and an end of the grid.
_HALF = 0.75


def rounded(
    x: torch.Tensor,
    t: torch.Tensor,
    zero: int,
    low: int,
    high: int,
    axis: int | None,
    rectified: bool = False,
) -> torch.Tensor:
    """``x`` on the grid of integers from ``low`` to ``high``, of which ``zero`` stands for 0.

    Args:
        t: Logarithm of the step, of one element, or with ``axis`` ``[C]`` for ``C = x.shape[axis]``.
        rectified: Round ``relu(x)``: the end of the grid at 0 does what the activation would, in the same node.
    """
    if rectified and x.dtype not in (torch.float32, torch.float64):
        # The end of the grid is told from half a step beyond it, which shorter floats do not have.
        x, rectified = x.relu(), False
    apply: Any = _Round.apply
    found: torch.Tensor = apply(x, t, zero, low, high, axis, rectified)
    return found


def rounded_folded(
    w: torch.Tensor, t: torch.Tensor, gamma: torch.Tensor | None, std: torch.Tensor, high: int, axis: int
) -> torch.Tensor:
    """Weights rounded as the deployed layer will have them, times its norm's factor, and divided by it again.

    Args:
        t: Logarithms of the steps ``[C]`` of the folded weights, ``C = w.shape[axis]``, symmetric up to ``high``.
        gamma: What the norm multiplies by after division by ``std`` ``[C]``; None: 1.
    """
    apply: Any = _RoundFolded.apply
    found: torch.Tensor = apply(w, t, gamma, std, high, axis)
    return found


def spread(x: torch.Tensor, axis: int | None, rank: int) -> torch.Tensor:
    """``[C]`` along ``axis`` of ``rank`` axes; without one, a scalar."""
    shape = [] if axis is None else [1] * rank
    if axis is not None:
        shape[axis] = -1
    return x.reshape(shape)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, t: torch.Tensor, zero: int, low: int, high: int, axis: int | None, rectified: bool
    ) -> torch.Tensor:  # fmt: skip
        s = t.exp().clamp_min_(TINY)
        along = s if axis is None and x.ndim else spread(s, axis, x.ndim)
        v = x / along
        r = v.round()
        ends = 0 if rectified else low - zero, high - zero
        ctx.save_for_backward(_error(v, r, *ends, rectified=rectified), s)
        ctx.moved, ctx.axis, ctx.share = _moved(*ends), axis, _share(x, t, high)
        return r.mul_(along)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        error, s = ctx.saved_tensors
        gx, gs = _gradients(grads[0], error, ctx.moved, ctx.axis)
        # d/dt = s d/ds.
        return gx, torch.mul(s, gs).mul_(ctx.share), None, None, None, None, None


class _RoundFolded(torch.autograd.Function):
    """As ``_Round`` of ``w * f``, divided by ``f = gamma / std``: rounding with the step ``s = exp(t) / |f|``."""

    @staticmethod
    def forward(
        ctx: Any, w: torch.Tensor, t: torch.Tensor, gamma: torch.Tensor | None, std: torch.Tensor, high: int, axis: int
    ) -> torch.Tensor:  # fmt: skip
        size = torch.ones_like(std) if gamma is None else gamma.abs().clamp_min_(_LEAST)
        s = t.exp().mul_(std).div_(size).clamp_min_(TINY)
        along = spread(s, axis, w.ndim)
        v = w / along
        r = v.round()
        ctx.save_for_backward(_error(v, r, -high, high), s, gamma, size)
        ctx.moved, ctx.axis, ctx.share = _moved(-high, high), axis, _share(w, t, high)
        return r.mul_(along)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        error, s, gamma, size = ctx.saved_tensors
        gw, gs = _gradients(grads[0], error, ctx.moved, ctx.axis)
        # d/dt = s d/ds; log s falls as log |gamma| rises, whose share is the plain gradient.
        gs = gs.mul_(s)
        turned = None if gamma is None else torch.mul(gs, gamma.sign()).div_(size).neg_()
        return gw, gs.mul_(ctx.share), turned, None, None, None


def _share(x: torch.Tensor, t: torch.Tensor, high: int) -> float:
    """By how much the gradient of a step is multiplied, section 2.2."""
    return 1 / math.sqrt(max(x.numel() // t.numel(), 1) * high)


def _error(v: torch.Tensor, r: torch.Tensor, low: int, high: int, *, rectified: bool = False) -> torch.Tensor:
    """Inside the grid the error of rounding ``v`` to ``r``, moved by `_moved`; outside its end. Both arguments are overwritten."""
    moved = _moved(low, high)
    v = v.sub_(moved) if moved else v
    # What rounds to an end is inside; a ReLU's values are where they are above 0, whatever they round to. Moved, those below 2^-24 are 0.
    mask, least, most = (v, -moved, _beyond(high, v.dtype) - moved) if rectified else (r, low - 1, high + 1)
    torch.ops.aten.hardtanh_backward.grad_input(v, mask, least, most, grad_input=v)
    return torch.sub(r.clamp_(low, high), v, out=v)


def _moved(low: int, high: int) -> int:
    """What is added to errors, which are at most a half, so that no end of the grid is among them."""
    if low < 0 < high:
        return 0
    return 3 if high == 1 else 1


def _gradients(
    grad: torch.Tensor, error: torch.Tensor, moved: int, axis: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the values, and of the step or steps, which get the error of rounding inside the grid and its end outside."""
    gx = torch.ops.aten.hardtanh_backward(grad, error, moved - _HALF, moved + _HALF)
    if axis is None and error.is_contiguous() and grad.is_contiguous():
        gs = torch.dot(error.view(-1), grad.view(-1))
    else:
        gs = torch.mul(error, grad).sum([i for i in range(grad.ndim) if i != axis])
    if moved:
        gs = gs.sub_(gx.sum([i for i in range(grad.ndim) if i != axis]), alpha=moved)
    return gx, gs


def _beyond(high: int, dtype: torch.dtype) -> float:
    """The smallest float that rounds to more than ``high``; ties go to even.

    Not cached: torch.compile refuses functions with a cache.
    """
    kind = np.float32 if dtype == torch.float32 else np.float64
    half = kind(high + 0.5)
    return float(half if high % 2 else np.nextafter(half, kind(np.inf)))
