from __future__ import annotations

import pytest

from optkit import sentences
from optkit.report import AccuracyRecord


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (1200, "about 1,200 samples would decide"),
        (None, "more samples would decide"),
        # A drop of 0.00990 where 0.00989 is allowed.
        (41_210_897, "so near to it that more samples would hardly decide"),
    ],
)
def test_an_open_verdict_says_how_many_samples_would_decide_or_that_none_would(needed, words):
    record = AccuracyRecord(
        metric="accuracy", reference=0.9, candidate=0.895, drop=0.005, ci95=(-0.01, 0.02), n=300, method="paired t",
        budget="1%", met="inconclusive", needed=needed,
    )  # fmt: skip
    assert words in sentences.accuracy(record)[1]
