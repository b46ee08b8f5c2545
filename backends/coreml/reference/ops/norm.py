"""Normalizations and softmax."""

from __future__ import annotations

import math

import numpy as np

from optkit.backends.coreml.reference.ops.elementwise import along
from optkit.backends.coreml.reference.ops.table import operation

Array = np.ndarray


@operation("batch_norm", over=True)
def batch_norm(
    x: Array, mean: Array, variance: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5,
    out: Array | None = None,
) -> Array:  # fmt: skip
    """``gamma * (x - mean) / sqrt(variance + epsilon) + beta`` for each channel."""
    scale = (1 if gamma is None else gamma) / np.sqrt(variance + np.float32(epsilon))
    shift = (0 if beta is None else beta) - mean * scale
    out = np.multiply(x, along(scale, x), out=out)
    return np.add(out, along(shift, x), out=out)


# Elements at a time, so that squares take no memory to speak of.
_PIECE = 1 << 16


def normalized(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    """Mean 0 and variance 1 along ``axes``."""
    centred = x - x.mean(axes, keepdims=True, dtype=np.float64).astype(np.float32)
    before = min(axes)
    if axes != tuple(range(before, x.ndim)) or not centred.flags.c_contiguous:
        variance = np.square(centred).mean(axes, keepdims=True, dtype=np.float64).astype(np.float32)
        centred /= np.sqrt(variance + np.float32(epsilon))
        return centred
    rows = centred.reshape(math.prod(x.shape[:before]), -1)
    some = max(1, _PIECE // rows.shape[1])
    for start in range(0, len(rows), some):
        part = rows[start : start + some]
        variance = np.square(part).mean(1, keepdims=True, dtype=np.float64).astype(np.float32)
        part /= np.sqrt(variance + np.float32(epsilon))
    return centred


@operation("instance_norm")
def instance_norm(
    x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5
) -> Array:
    """Over the spatial axes of each channel of each image."""
    out = normalized(x, tuple(range(2, x.ndim)), epsilon)
    if gamma is not None:
        out *= along(gamma, x)
    if beta is not None:
        out += along(beta, x)
    return out


@operation("layer_norm")
def layer_norm(
    x: Array, axes: Array | None = None, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5
) -> Array:  # fmt: skip
    """Over ``axes``; gamma and beta have their sizes."""
    chosen = tuple(range(x.ndim)) if axes is None else tuple(int(a) % x.ndim for a in np.reshape(axes, -1))
    out = normalized(x, chosen, epsilon)
    shape = [n if i in chosen else 1 for i, n in enumerate(x.shape)]
    if gamma is not None:
        out *= np.reshape(gamma, shape)
    if beta is not None:
        out += np.reshape(beta, shape)
    return out


@operation("l2_norm")
def l2_norm(x: Array, epsilon: float = 1e-6) -> Array:
    """Divided by the root of the sum of squares over the last three axes."""
    axes = tuple(range(max(0, x.ndim - 3), x.ndim))
    return x / np.sqrt(np.square(x).sum(axes, keepdims=True) + np.float32(epsilon))


@operation("local_response_norm")
def local_response_norm(
    x: Array, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Array:
    """``x / (k + alpha / size * sum of squares of the channels around)^beta``."""
    channels = x.shape[1]
    before, after = (size - 1) // 2, size // 2
    squares = np.square(x)
    total = np.zeros_like(x)
    for offset in range(-before, after + 1):
        low, high = max(0, -offset), min(channels, channels - offset)
        total[:, low:high] += squares[:, low + offset : high + offset]
    return x / (np.float32(k) + np.float32(alpha / size) * total) ** np.float32(beta)


@operation("softmax", over=True)
def softmax(x: Array, axis: int = -1, out: Array | None = None) -> Array:
    """``exp(x)`` over its sum along an axis."""
    out = np.asarray(np.subtract(x, x.max(axis, keepdims=True), out=out))
    np.exp(out, out=out)
    out /= out.sum(axis, keepdims=True)
    return out
