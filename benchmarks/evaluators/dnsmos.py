"""DNSMOS: rank correlation of the predicted quality with the true level of the noise, over real prompts.

The prompts are those of the Silero evaluators, under noise at 32 levels from -5 to 35 dB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from optkit.benchmarks.metrics import rank_correlation
from optkit.benchmarks.speech import recordings

METRIC = "Spearman"
_SAMPLES = 144160
_LEVELS = tuple(np.linspace(-5, 35, 32).round(2).tolist())


def samples(n: int = 128) -> Iterator[tuple[dict[str, np.ndarray], float]]:
    """Nine seconds of noisy speech, and its speech-to-noise ratio in dB."""
    return _clips(n, seed=2, held_out=False)


def score(outputs: dict[str, np.ndarray], label: float) -> tuple[float, float]:
    """Predicted overall quality, and the true ratio."""
    (quality,) = outputs.values()
    return float(quality[0, 2]), label


def aggregate(scores: Sequence[tuple[float, float]]) -> float:
    """Rank correlation of the two."""
    quality, ratio = np.asarray(scores).T
    return rank_correlation(quality, ratio)


def calibration(n: int = 10) -> Iterator[dict[str, np.ndarray]]:
    """Clips of prompts that no sample plays."""
    for feeds, _ in _clips(n, seed=3, held_out=True):
        yield feeds


def _clips(n: int, *, seed: int, held_out: bool) -> Iterator[tuple[dict[str, np.ndarray], float]]:
    # A few clips are spread over all levels, and half of them have the other kind of noise.
    levels = _LEVELS[:: max(1, 2 * len(_LEVELS) // n)]
    for recording in recordings(n, seed=seed, held_out=held_out, decibels=levels):
        yield {"input_1": recording.frames.reshape(1, -1)[:, :_SAMPLES]}, recording.decibels
