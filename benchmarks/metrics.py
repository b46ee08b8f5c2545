"""The scores that the evaluators share, on plain sequences and arrays."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def edits(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Insertions, deletions and replacements that turn ``a`` into ``b`` (Levenshtein, 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def greedy_ctc(steps: np.ndarray, characters: Sequence[str], blank: int = 0) -> str:
    """Text of ``steps`` ``[time, classes]``: the best class a step, repeats merged, blanks dropped.

    Class ``i`` is ``characters[i]``; ``characters[blank]`` is not read.
    """
    best = steps.argmax(-1)
    changed = np.concatenate([[True], best[1:] != best[:-1]])
    return "".join(characters[i] for i in best[changed & (best != blank)])


def reciprocal_ranks(queries: np.ndarray, documents: np.ndarray, depth: int = 10) -> np.ndarray:
    """``1 / rank`` of document ``i`` for query ``i`` by dot product, 0 beyond ``depth``; ``[pairs]``.

    Documents that are equal to the right one do not push it back.
    """
    similarity = queries @ documents.T
    ahead = (similarity > np.diagonal(similarity)[:, None]).sum(1)
    return np.where(ahead < depth, 1 / (ahead + 1), 0.0)


def area_under_roc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order, ties counting half (Mann and Whitney, 1947)."""
    values, where = np.unique(scores, return_inverse=True)
    positives = np.bincount(where[truth], minlength=len(values))
    negatives = np.bincount(where[~truth], minlength=len(values))
    below = np.cumsum(negatives) - negatives
    total = int(positives.sum()) * int(negatives.sum())
    if total == 0:
        raise ValueError("one of the two classes is missing")
    return float((positives * (below + negatives / 2)).sum() / total)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks, equal values sharing the mean of theirs (Spearman, 1904)."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    _, where, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[where]
