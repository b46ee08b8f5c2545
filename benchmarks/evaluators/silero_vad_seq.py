"""Silero VAD over whole recordings: area under the ROC curve over frames of 32 ms.

Real speech (studio prompts of Debian's asterisk-core-sounds-en-wav) with pauses, under white and brown noise at 20 to
0 dB; a frame is speech where the clean prompt is audible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from optkit.benchmarks.metrics import area_under_roc
from optkit.benchmarks.speech import recordings, with_context

METRIC = "ROC AUC"


def samples(n: int = 48) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """A recording of ten seconds, and which frames are speech."""
    for recording in recordings(n, seed=0, held_out=False):
        yield _feeds(recording.frames), recording.speech


def score(outputs: dict[str, np.ndarray], label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability and truth of every frame."""
    return next(iter(outputs.values())).reshape(-1), label


def aggregate(scores: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Area under the curve over the frames of all recordings."""
    probabilities, truth = (np.concatenate(parts) for parts in zip(*scores, strict=True))
    return area_under_roc(probabilities, truth)


def calibration(n: int = 16) -> Iterator[dict[str, np.ndarray]]:
    """Recordings of prompts that no sample plays."""
    for recording in recordings(n, seed=1, held_out=True):
        yield _feeds(recording.frames)


def _feeds(frames: np.ndarray) -> dict[str, np.ndarray]:
    rest = np.zeros((1, 1, 128), np.float32)
    return {"input": with_context(frames), "h": rest, "c": rest}
