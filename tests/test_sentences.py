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


def test_an_accuracy_of_a_score_that_never_varies_says_that_nothing_is_known():
    record = AccuracyRecord(
        metric="accuracy", reference=0, candidate=0, drop=0, ci95=(-0.01, 0.01), n=300, method="Agresti-Min", budget="1%",
        met="inconclusive", needed=None, constant=True,
    )  # fmt: skip
    _, verdict, why = sentences.accuracy(record)
    assert "would decide" not in verdict
    assert "every sample scored 0 for both" in why
