"""Recordings with speech at known times: studio prompts, pauses between them, and noise over all of it.

The prompts are Debian's asterisk-core-sounds-en-wav (one speaker, 8 kHz), brought to 16 kHz.
"""

from __future__ import annotations

import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optkit.benchmarks import datasets

RATE, FRAME, CONTEXT = 16000, 512, 64
_SILENT_DB = -45.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Speech under noise.

    Attributes:
        frames: Samples at 16 kHz, ``[frames, 512]``.
        speech: Whether each frame is speech, ``[frames]``.
        decibels: Power of the speech over that of the noise.
    """

    frames: np.ndarray
    speech: np.ndarray
    decibels: float


def recordings(
    n: int, *, seed: int, held_out: bool, seconds: float = 10.0, decibels: Sequence[float] = (20, 10, 5, 0)
) -> Iterator[Recording]:
    """``n`` recordings, at the levels of ``decibels`` in turn, under white noise and brown.

    A frame is speech where the clean prompt is louder than -45 dB of full scale. A quarter of the prompts is held
    out from evaluations.
    """
    rng = np.random.default_rng(seed)
    prompts = [path for i, path in enumerate(_prompts()) if (i % 4 == 0) == held_out]
    length = int(seconds * RATE) // FRAME * FRAME
    for i in range(n):
        clean = np.zeros(length, np.float32)
        at = int(RATE * rng.uniform(0.2, 1.2))
        while at < length:
            prompt = _read(prompts[int(rng.integers(len(prompts)))])[: length - at]
            clean[at : at + len(prompt)] = prompt * np.float32(rng.uniform(0.3, 0.7))
            at += len(prompt) + int(RATE * rng.uniform(0.4, 1.6))
        power = (clean.reshape(-1, FRAME).astype(np.float64) ** 2).mean(1)
        speech = 10 * np.log10(power + 1e-12) > _SILENT_DB
        ratio = decibels[i % len(decibels)]
        level = power[speech].mean() / 10 ** (ratio / 10)
        noise = _noise(rng, length, brown=bool(i // len(decibels) % 2)) * np.sqrt(level)
        frames = (clean + noise).astype(np.float32).reshape(-1, FRAME)
        yield Recording(frames=frames, speech=speech, decibels=ratio)


def with_context(frames: np.ndarray) -> np.ndarray:
    """``[frames, 512]`` -> ``[frames, 576]``: the end of the frame before stands in front of each."""
    before = np.concatenate([np.zeros((1, CONTEXT), np.float32), frames[:-1, -CONTEXT:]])
    return np.concatenate([before, frames], axis=1)


def _prompts() -> list[Path]:
    paths = []
    for path in sorted(datasets.find("prompts").glob("*.wav")):
        with wave.open(str(path)) as file:
            if 1 <= file.getnframes() / file.getframerate() <= 6:
                paths.append(path)
    return paths


def _read(path: Path) -> np.ndarray:
    """A prompt at 16 kHz with its peak at 1."""
    with wave.open(str(path)) as file:
        x = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float64)
        factor = RATE // file.getframerate()
    # Band-limited interpolation: the spectrum stays, the new upper half is empty.
    x = np.fft.irfft(np.fft.rfft(x), factor * len(x))
    return np.asarray(x / np.abs(x).max(), np.float32)


def _noise(rng: np.random.Generator, length: int, *, brown: bool) -> np.ndarray:
    """White or brown noise of power 1; brown without what lies below 40 Hz."""
    x = rng.normal(size=length)
    if brown:
        frequencies = np.fft.rfftfreq(length, 1 / RATE)
        spectrum = np.fft.rfft(x)
        x = np.fft.irfft(np.where(frequencies > 40, spectrum / np.maximum(frequencies, 1), 0), length)
    return np.asarray(x / np.sqrt((x**2).mean()))
