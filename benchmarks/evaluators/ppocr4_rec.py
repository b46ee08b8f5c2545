"""PP-OCRv4 text recognition: character accuracy on rendered lines whose text is known.

The truth is exact, since the lines are drawn here; spaces are not counted, because the model leaves them out at will.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import onnx_ir as ir

from optkit.benchmarks import suite
from optkit.benchmarks.lines import lines, tensor
from optkit.benchmarks.metrics import edits, greedy_ctc

METRIC = "character accuracy"
# PaddleOCR's recognizer: this height, and this width at least, filled up with zeros.
_HEIGHT, _WIDTH = 48, 320


def samples(n: int = 300) -> Iterator[tuple[dict[str, np.ndarray], str]]:
    """Picture of a line, and its text."""
    for text, feeds in _lines(n, seed=0, held_out=False):
        yield feeds, text.replace(" ", "")


def score(outputs: dict[str, np.ndarray], label: str) -> tuple[int, int]:
    """Wrong characters and characters of one line."""
    (steps,) = outputs.values()
    return edits(label, greedy_ctc(steps[0], alphabet()).replace(" ", "")), len(label)


def aggregate(scores: Sequence[tuple[int, int]]) -> float:
    """``1 - wrong / all`` over all lines together."""
    wrong, total = np.asarray(scores).sum(0)
    return 1 - float(wrong) / float(total)


def calibration(n: int = 48) -> Iterator[dict[str, np.ndarray]]:
    """Lines of text that no sample shows."""
    for _, feeds in _lines(n, seed=1, held_out=True):
        yield feeds


def _lines(n: int, *, seed: int, held_out: bool) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    for text, picture in lines(n, seed=seed, held_out=held_out):
        # Steps of 32 columns, so that a recording of the shapes stays short.
        width = max(_WIDTH, -(-round(picture.width * _HEIGHT / picture.height) // 32) * 32)
        yield text, {"x": tensor(picture, _HEIGHT, width)}


@cache
def alphabet() -> tuple[str, ...]:
    """Character of every class; class 0 is CTC's blank, the last one the space."""
    model = ir.load(suite.find("ppocr4_rec"))
    return ("", *model.metadata_props["character"].splitlines(), " ")
