"""Magika: content type of real files of this machine, the truth being the extension (those that name one type).

Which files there are differs from machine to machine, and so does the figure; on one machine they are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache

import numpy as np

from optkit.benchmarks import suite
from optkit.benchmarks.disk_files import bytes_at_both_ends, typed_files

METRIC = "accuracy"
_PER_TYPE = 40


def samples(per_type: int = _PER_TYPE) -> Iterator[tuple[dict[str, np.ndarray], str]]:
    """The two ends of a file, and its type."""
    for kind, path in typed_files(per_type):
        yield {"bytes": bytes_at_both_ends(path)[None]}, kind


def score(outputs: dict[str, np.ndarray], label: str) -> float:
    """1 for the right type."""
    (probabilities,) = outputs.values()
    return float(_types()[int(probabilities[0].argmax())] == label)


def calibration(per_type: int = 2) -> Iterator[dict[str, np.ndarray]]:
    """Files that no sample reads."""
    for _, path in typed_files(per_type, skip=_PER_TYPE):
        yield {"bytes": bytes_at_both_ends(path)[None]}


@cache
def _types() -> list[str]:
    config = json.loads(suite.find("magika", "config.min.json").read_text("utf-8"))
    types: list[str] = config["target_labels_space"]
    return types
