"""Silero VAD as it streams: area under the ROC curve over frames of 32 ms.

The recordings are those of silero_vad_seq. A sample is one frame; the recurrent state that comes with it is the one
that the original model reached there, so that samples stay independent. Errors that build up over time in a
compiled model are therefore not in this figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnxruntime as ort

from optkit.benchmarks import suite
from optkit.benchmarks.metrics import area_under_roc
from optkit.benchmarks.speech import RATE, recordings, with_context

METRIC = "ROC AUC"


def samples(n: int = 12) -> Iterator[tuple[dict[str, np.ndarray], bool]]:
    """Frames of ``n`` recordings, and whether each is speech."""
    return _stream(n, seed=0, held_out=False)


def score(outputs: dict[str, np.ndarray], label: bool) -> tuple[float, bool]:
    """Probability and truth of one frame."""
    return float(outputs["output"].reshape(-1)[0]), label


def aggregate(scores: Sequence[tuple[float, bool]]) -> float:
    """Area under the curve over all frames."""
    probabilities, truth = zip(*scores, strict=True)
    return area_under_roc(np.array(probabilities), np.array(truth))


def calibration(n: int = 2) -> Iterator[dict[str, np.ndarray]]:
    """Frames of recordings of prompts that no sample plays."""
    for feeds, _ in _stream(n, seed=1, held_out=True):
        yield feeds


def _stream(n: int, *, seed: int, held_out: bool) -> Iterator[tuple[dict[str, np.ndarray], bool]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(suite.find("silero_vad"), options, providers=["CPUExecutionProvider"])
    rate = np.array(RATE, np.int64)
    for recording in recordings(n, seed=seed, held_out=held_out):
        state = np.zeros((2, 1, 128), np.float32)
        for frame, truth in zip(with_context(recording.frames), recording.speech, strict=True):
            feeds = {"input": frame[None], "state": state, "sr": rate}
            yield feeds, bool(truth)
            state = session.run(["stateN"], feeds)[0]
