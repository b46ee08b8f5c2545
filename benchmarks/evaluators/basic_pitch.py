"""Basic Pitch: frame-level F1 of the notes, on chords whose notes are known because they are synthesised here.

A tone is a fundamental with decaying partials, slightly stretched as on strings, with an attack and a decay; the
chords are random and overlap. The truth is exact, the timbre simpler than that of real instruments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

METRIC = "note F1"
_RATE, _LENGTH, _HOP = 22050, 43844, 256
_FRAMES, _LOWEST, _NOTES = 172, 21, 88
_THRESHOLD = 0.3


def samples(n: int = 64) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Two seconds of sound, and which notes sound when, ``[172, 88]``."""
    return _windows(n, seed=0)


def score(outputs: dict[str, np.ndarray], label: np.ndarray) -> tuple[int, int, int]:
    """Notes found and true, found, and true, counted over frames."""
    found = outputs["StatefulPartitionedCall:1"][0] > _THRESHOLD
    return int((found & label).sum()), int(found.sum()), int(label.sum())


def aggregate(scores: Sequence[tuple[int, int, int]]) -> float:
    """F1 over all frames of all windows."""
    both, found, true = np.asarray(scores).sum(0)
    return 2 * float(both) / float(found + true)


def calibration(n: int = 16) -> Iterator[dict[str, np.ndarray]]:
    """Other chords."""
    for feeds, _ in _windows(n, seed=1):
        yield feeds


def _windows(n: int, *, seed: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    rng = np.random.default_rng(seed)
    for _ in range(n):
        sound, truth = np.zeros(_LENGTH), np.zeros((_FRAMES, _NOTES), bool)
        for _ in range(int(rng.integers(3, 9))):
            note = int(rng.integers(40, 85))
            begin = int(_RATE * rng.uniform(0, 1.5))
            end = min(_LENGTH, begin + int(_RATE * rng.uniform(0.3, 1.0)))
            sound[begin:end] += _tone(rng, note, end - begin)
            truth[begin // _HOP : end // _HOP, note - _LOWEST] = True
        sound += rng.normal(0, 0.002, _LENGTH)
        sound *= 0.7 / max(np.abs(sound).max(), 1e-9)
        yield {"serving_default_input_2:0": sound.astype(np.float32)[None, :, None]}, truth


def _tone(rng: np.random.Generator, note: int, length: int) -> np.ndarray:
    time = np.arange(length) / _RATE
    pitch, slope = 440 * 2 ** ((note - 69) / 12), rng.uniform(0.9, 1.8)
    sound = np.zeros(length)
    for k in range(1, 9):
        frequency = k * pitch * np.sqrt(1 + 2e-4 * k * k)
        if frequency < _RATE / 2:
            sound += (
                k**-slope
                * np.exp(-k * time)
                * np.sin(2 * np.pi * frequency * time + rng.uniform(0, 2 * np.pi))
            )
    fade = np.minimum(1, np.minimum(time / 0.01, (length / _RATE - time) / 0.03))
    return np.asarray(rng.uniform(0.3, 1.0) * fade * sound)
