"""Rounding to a grid whose step is learned.

Esser et al., "Learned Step Size Quantization", 2020, arXiv:1902.08153, eq. 1 to 3 and section 2.2, for ``s = exp(t)``, forward
and backward in one node each. Of the values, backward keeps one buffer; bounds are numbers of the host: on processors,
kernels that take bounds as tensors, or make masks of bools, take several times as long as those here.
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
        s = spread(t, axis, x.ndim).exp().clamp_min_(TINY)
        v = x / s
        ctx.save_for_backward(v, s)
        ctx.low, ctx.high, ctx.axis, ctx.rectified = (
            0 if rectified else low - zero,
            high - zero,
            axis,
            rectified,
        )
        ctx.share, ctx.steps = _share(x, t, high), t.shape
        return v.round().clamp_(ctx.low, ctx.high).mul_(s)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        v, s = ctx.saved_tensors
        gx, gs = _gradients(grads[0], v, ctx.low, ctx.high, ctx.axis, rectified=ctx.rectified)
        # d/dt = s d/ds.
        return gx, (gs * ctx.share * s.reshape(gs.shape)).reshape(ctx.steps), None, None, None, None, None


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
        ctx.save_for_backward(v, s, gamma, size)
        ctx.high, ctx.axis, ctx.share = high, axis, _share(w, t, high)
        return v.round().clamp_(-high, high).mul_(along)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        v, s, gamma, size = ctx.saved_tensors
        gw, gs = _gradients(grads[0], v, -ctx.high, ctx.high, ctx.axis)
        # d/dt = s d/ds; log s falls as log |gamma| rises, whose share is the plain gradient.
        gs = gs.mul_(s)
        turned = None if gamma is None else torch.mul(gs, gamma.sign()).div_(size).neg_()
        return gw, gs.mul_(ctx.share), turned, None, None, None


def _share(x: torch.Tensor, t: torch.Tensor, high: int) -> float:
    """By how much the gradient of a step is multiplied, section 2.2."""
    return 1 / math.sqrt(max(x.numel() // t.numel(), 1) * high)


def _gradients(
    grad: torch.Tensor, v: torch.Tensor, low: int, high: int, axis: int | None, *, rectified: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the values, and of the step or steps, which get the error of rounding inside the grid and its end outside."""
    inside = torch.ops.aten.hardtanh_backward
    r = v.round()
    if rectified:
        end = _beyond(high, v.dtype)
        gx, kept = inside(grad, v, 0.0, end), inside(v, v, 0.0, end)
    else:
        gx, kept = inside(grad, r, low - 1, high + 1), inside(v, r, low - 1, high + 1)
    error = r.clamp_(low, high).sub_(kept)
    if axis is not None:
        return gx, error.mul_(grad).sum([i for i in range(v.ndim) if i != axis])
    if error.is_contiguous() and grad.is_contiguous():
        return gx, torch.dot(error.view(-1), grad.view(-1))
    return gx, error.mul_(grad).sum()


def _beyond(high: int, dtype: torch.dtype) -> float:
    """The smallest float that rounds to more than ``high``; ties go to even."""
    kind = np.float32 if dtype == torch.float32 else np.float64
    half = kind(high + 0.5)
    return float(half if high % 2 else np.nextafter(half, kind(np.inf)))
