"""Ranges of activations from a stream of batches, in memory that does not grow with their number."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np

from optkit.formats import Format
from optkit.passes.quantization.through import Function, felt

Method = Literal["min-max", "percentile", "entropy", "mse"]
_Loss = Callable[[np.ndarray, np.ndarray, float, float, Format], float]

BINS = 2048
# Values of a tensor that enter the histogram a batch, evenly spread: a 2048-bin histogram of 64 Ki values places the
# 99.99th percentile within a bin, and counting them costs less than the convolution that made them.
SAMPLE = 1 << 14
# Of the distance of an end from 0, what a search tries.
_SHARES = np.linspace(1.0, 0.2, 65)
# Points that stand for the values of a bin where rounding counts: a step may be no wider than a bin.
_POINTS = 4


class Range:
    """Smallest and largest value seen."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf

    def add(self, x: np.ndarray) -> None:
        """Take in one batch, any shape; NaN makes the range NaN."""
        if x.size:
            self.low, self.high = float(np.minimum(self.low, x.min())), float(np.maximum(self.high, x.max()))

    @property
    def finite(self) -> bool:
        """Whether something was seen and all of it was a number."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    def by(self, method: Method, percentile: float) -> Range:
        """The same observation, read by another method; a range alone knows only ``min-max``."""
        assert method == "min-max", method
        return self

    def limits(self, fmt: Format, function: Function | None = None) -> tuple[float, float]:
        """The range to quantize.

        Args:
            function: What is applied to every element behind the quantizer; where it is flat, no range is needed.
        """
        return self._felt(function)

    def _felt(self, function: Function | None) -> tuple[float, float]:
        limits = self.low, self.high
        return limits if function is None or not self.finite else felt(*limits, function)


class Histogram(Range):
    """A range and a histogram whose bins double in width when a value falls outside.

    Bin edges stay multiples of the bin width, so that doubling merges whole pairs and 0 stays an edge.

    Args:
        method: ``percentile``, ``entropy`` or ``mse``.
        percentile: Share of the values, in percent, that the range keeps.
    """

    def __init__(self, method: Method, percentile: float) -> None:
        super().__init__()
        self._method, self._percentile = method, percentile
        self._width = 0.0
        self._first = 0  # index of the first bin: its lower edge is first * width
        self._zeros = 0  # values seen before the first that is not 0 and decides the width
        self.counts = np.zeros(BINS, np.int64)

    def add(self, x: np.ndarray) -> None:
        """Take in one batch, any shape."""
        super().add(x)
        if not x.size or not self.finite:
            return
        flat = x.ravel()
        if flat.size > SAMPLE:
            flat = np.ascontiguousarray(flat[:: _stride(flat.size)])
        low, high = float(flat.min()), float(flat.max())
        if self._width == 0.0:
            if low == high == 0.0:
                self._zeros += flat.size
                return
            # A quarter of the bins is left free on each side for what later batches bring.
            self._width = float(2.0 ** np.ceil(np.log2(max(high - low, abs(high), abs(low)) / (BINS // 2))))
            self._first = int(np.floor(min(low, 0.0) / self._width)) - BINS // 4
            self.counts[-self._first] = self._zeros
        while not (self._first * self._width <= low and high < (self._first + BINS) * self._width):
            self._double(low)
        # A power of two divides float64 exactly, denormals of float32 included.
        place = flat.astype(np.float64)
        place *= 1 / self._width
        np.floor(place, out=place)
        place -= self._first
        self.counts += np.bincount(place.astype(np.intp), minlength=BINS)

    def _double(self, low: float) -> None:
        counts = np.zeros(BINS + 2, np.int64)
        odd = self._first % 2
        counts[odd : odd + BINS] = self.counts
        merged = counts.reshape(-1, 2).sum(1)  # BINS / 2 + 1 bins of twice the width
        self._width *= 2
        start = (self._first - odd) // 2
        # Old bins go to the end where the new values are below them, and to the start where they are above.
        room = BINS - len(merged)
        first = start - room if low < self._first * self._width / 2 else start
        self.counts = np.zeros(BINS, np.int64)
        self.counts[start - first : start - first + len(merged)] = merged
        self._first = first

    def by(self, method: Method, percentile: float) -> Range:
        """The same observation, read by another method."""
        if method == "min-max":
            plain = Range()
            plain.low, plain.high = self.low, self.high
            return plain
        other = copy.copy(self)
        other._method, other._percentile = method, percentile
        return other

    def limits(self, fmt: Format, function: Function | None = None) -> tuple[float, float]:
        """The range to quantize by the method; errors count behind ``function``."""
        low, high = self._felt(function)
        if not self.finite or not self.counts.any():
            return low, high
        if self._method == "percentile":
            left, right = self._by_percentile()
            return max(low, left), min(high, right)
        together = [(min(low, 0.0) * share, max(high, 0.0) * share) for share in _SHARES]
        if self._method == "entropy":
            return self._best(fmt, _divergence, together, points=1)
        best = partial(self._best, fmt, partial(_squared_error, function=function), points=_POINTS)
        left, right = best(together)
        if fmt.symmetric:
            return left, right
        # One end after the other: what lies below 0 is often of another kind than what is above.
        left, right = best([(left, right), *((min(low, 0.0) * share, right) for share in _SHARES)])
        return best([(left, right), *((left, max(high, 0.0) * share) for share in _SHARES)])

    @property
    def edges(self) -> np.ndarray:
        """``[BINS + 1]`` edges of the bins."""
        return (self._first + np.arange(BINS + 1)) * self._width

    def _by_percentile(self) -> tuple[float, float]:
        share = np.cumsum(self.counts) / self.counts.sum()
        tail = (1 - self._percentile / 100) / 2
        edges = self.edges
        low = edges[int(np.searchsorted(share, tail, side="right"))]
        high = edges[min(int(np.searchsorted(share, 1 - tail)) + 1, BINS)]
        return max(float(low), self.low), min(float(high), self.high)

    def _best(
        self, fmt: Format, loss: _Loss, ends: Sequence[tuple[float, float]], *, points: int
    ) -> tuple[float, float]:
        """The first of the ranges with the smallest loss, where each bin is that many points."""
        used = self.counts > 0
        x = self.edges[:-1][used, None] + self._width * (np.arange(points) + 0.5) / points
        counts = np.repeat(self.counts[used] / points, points)
        losses = [loss(x.ravel(), counts, low, high, fmt) for low, high in ends]
        least = min(losses) * (1 + 1e-9)
        return next(e for e, found in zip(ends, losses, strict=True) if found <= least)


def _stride(size: int) -> int:
    """The smallest step that leaves at most ``SAMPLE`` of ``size`` values and meets every index along every axis."""
    step = -(-size // SAMPLE)
    while math.gcd(step, size) != 1:
        step += 1
    return step


def _on_grid(x: np.ndarray, low: float, high: float, fmt: Format) -> np.ndarray:
    step = (max(-low, high) / fmt.high if fmt.symmetric else (high - low) / fmt.steps) or 1.0
    if not fmt.integer:
        return np.asarray(np.clip(x / step, fmt.low, fmt.high).astype(fmt.dtype.numpy()), np.float64) * step
    low, high = (-fmt.high * step, fmt.high * step) if fmt.symmetric else (low, high)
    return np.clip(np.round(x / step) * step, low, high)


def _squared_error(
    x: np.ndarray, counts: np.ndarray, low: float, high: float, fmt: Format, *, function: Function | None
) -> float:
    """Sum of squared rounding and clipping errors (Banner et al. 2018, arXiv:1810.05723, measured, not modelled).

    Differs from the source: errors are those behind the function that the quantized values go into.
    """
    # Within a bin, values are spread evenly: the rounding error of a step much wider than a bin comes out right.
    y = _on_grid(x, low, high, fmt)
    error = x - y if function is None else function(x) - function(y)
    return float(counts @ error**2)


def _divergence(x: np.ndarray, counts: np.ndarray, low: float, high: float, fmt: Format) -> float:
    """KL divergence of the clipped and quantized distribution from the seen one (Migacz, GTC 2017, slides 19-35).

    Differs from the source: the range may be asymmetric, and empty bins are left out of both distributions.
    """
    clipped = np.clip(x, low, high)
    level = np.round(_on_grid(x, low, high, fmt) / (((high - low) / fmt.steps) or 1.0)).astype(np.int64)
    _, group = np.unique(level, return_inverse=True)
    seen = counts.copy()
    outside = clipped != x
    # Clipped values count at the ends of the range in the reference, as in the source.
    for side in (x < low, x > high):
        if side.any():
            inside = np.flatnonzero(~outside)
            if not len(inside):
                return np.inf
            seen[inside[0] if side[0] else inside[-1]] += counts[side].sum()
    seen[outside] = 0
    total, size = np.bincount(group, np.where(outside, 0, counts)), np.bincount(group, ~outside)
    spread = np.where(outside, 0, total[group] / np.maximum(size[group], 1))
    p, q = seen / seen.sum(), spread / max(spread.sum(), 1e-30)
    used = (p > 0) & (q > 0)
    return float(np.sum(p[used] * np.log(p[used] / q[used]))) + float(p[(p > 0) & (q == 0)].sum()) * 10


def observer(method: Method, percentile: float) -> Range:
    """A fresh observer."""
    return Range() if method == "min-max" else Histogram(method, percentile)
