"""The evaluators' scores, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.benchmarks.metrics import area_under_roc, edits, greedy_ctc, rank_correlation, reciprocal_ranks

TEXT = st.text("abc", max_size=8)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("abc", "abc", 0),
    ],
)
def test_edit_distance_of_known_pairs(a: str, b: str, distance: int) -> None:
    assert edits(a, b) == distance


@given(TEXT, TEXT, TEXT)
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert edits(a, b) == edits(b, a)
    assert (edits(a, b) == 0) == (a == b)
    assert edits(a, c) <= edits(a, b) + edits(b, c)


def test_ctc_merges_repeats_and_drops_blanks() -> None:
    # blank a a blank a b b: the blank between keeps the second a.
    classes = [0, 1, 1, 0, 1, 2, 2]
    assert greedy_ctc(np.eye(3)[classes], ("", "a", "b")) == "aab"


def test_ctc_of_blanks_is_empty() -> None:
    assert greedy_ctc(np.eye(3)[[0, 0]], ("", "a", "b")) == ""


def test_reciprocal_rank_counts_the_documents_ahead() -> None:
    queries = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    documents = np.array([[1.0, 0.0], [0.0, 2.0], [0.5, 0.4]])
    # query 0: document 0 is first; 1: first; 2: documents 1 (2.0) and 0 (1.0) are ahead of 0.9.
    assert reciprocal_ranks(queries, documents) == pytest.approx([1, 1, 1 / 3])


def test_rank_beyond_the_depth_counts_nothing() -> None:
    queries = np.ones((3, 1))
    documents = np.array([[1.0], [2.0], [3.0]])
    assert reciprocal_ranks(queries, documents, depth=2) == pytest.approx([0, 1 / 2, 1])


def test_an_equal_document_does_not_push_back() -> None:
    assert reciprocal_ranks(np.ones((2, 1)), np.ones((2, 1))) == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("scores", "truth", "area"),
    [
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([4, 3, 2, 1], [0, 0, 1, 1], 0.0),
        ([5, 5, 5, 5], [0, 1, 0, 1], 0.5),
        ([1, 2, 2, 3], [0, 0, 1, 1], 0.875),
    ],
)
def test_area_under_the_curve(scores: list[float], truth: list[int], area: float) -> None:
    assert area_under_roc(np.array(scores), np.array(truth, bool)) == pytest.approx(area)


def test_one_class_has_no_curve() -> None:
    with pytest.raises(ValueError, match="missing"):
        area_under_roc(np.array([1.0]), np.array([True]))


@pytest.mark.parametrize(
    ("a", "b", "correlation"),
    [
        ([1, 2, 3], [10, 20, 900], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        # ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * (1 + 1) / (4 * 15)
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        # a tie shares rank 1.5: covariance 1.5 over sqrt(2 * 1.5)
        ([1, 2, 3], [5, 5, 6], 1.5 / 3**0.5),
    ],
)
def test_rank_correlation(a: list[float], b: list[float], correlation: float) -> None:
    assert rank_correlation(np.array(a), np.array(b)) == pytest.approx(correlation)
