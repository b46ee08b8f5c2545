"""Evaluators: the same samples every time, none of them seen in calibration, and scores worked out by hand.

Nothing is downloaded: what needs a model or data that was not fetched is skipped and says so.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from types import ModuleType

import numpy as np
import pytest

from optkit.benchmarks import datasets, suite
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.errors import DataError, ModelError
from optkit.evaluate import load_python

pytest.importorskip("PIL", reason="the evaluators draw with Pillow: pip install 'optkit[benchmarks]'")

Feeds = dict[str, np.ndarray]


def _load(name: str) -> ModuleType:
    entry = SUITE[name]
    try:
        suite.find(name)
        for dataset in entry.data:
            datasets.find(dataset)
    except (ModelError, DataError) as error:
        pytest.skip(f"{error}; {error.hint}")
    if name == "minilm_l6":
        pytest.importorskip("tokenizers")
    return load_python(EVALUATORS / entry.evaluator, "evaluator")


def _digests(batches: Iterable[Feeds]) -> list[str]:
    return [hashlib.sha256(b"".join(x.tobytes() for x in feeds.values())).hexdigest() for feeds in batches]


ACCURATE = [name for name, entry in SUITE.items() if entry.accurate]


@pytest.mark.parametrize("name", SUITE)
def test_calibration_is_the_same_every_time_and_has_no_evaluation_sample(name: str) -> None:
    evaluator = _load(name)
    calibration = _digests(evaluator.calibration())
    assert calibration == _digests(evaluator.calibration())
    if SUITE[name].accurate:
        samples = _digests(feeds for feeds, _ in evaluator.samples())
        assert set(samples).isdisjoint(calibration)
        again = _digests(feeds for feeds, _ in itertools.islice(evaluator.samples(), 8))
        assert again == samples[:8]


@pytest.mark.parametrize("name", ACCURATE)
def test_the_original_model_scores_well(name: str) -> None:
    """On a few samples: the pictures, sounds and texts are what the model expects."""
    import onnxruntime as ort

    evaluator = _load(name)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(suite.find(name), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    scores = []
    for feeds, label in itertools.islice(evaluator.samples(), 624 if name == "silero_vad" else 24):
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        scores.append(evaluator.score(outputs, label))
    aggregate = getattr(evaluator, "aggregate", np.mean)
    # Far above chance everywhere: 0.001 to 0.5, and voice activity (chance 0.5) is near 1.
    assert aggregate(scores) > (0.9 if name.startswith("silero") else 0.4)


def test_character_accuracy_is_over_all_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = load_python(EVALUATORS / "ppocr4_rec.py", "evaluator")
    monkeypatch.setattr(evaluator, "alphabet", lambda: ("", "a", "b", " "))
    steps = np.eye(4)[[1, 0, 3, 2]][None]  # "a", blank, space, "b"
    assert evaluator.score({"y": steps}, "ab") == (0, 2)
    assert evaluator.score({"y": steps}, "b") == (1, 1)
    assert evaluator.aggregate([(0, 2), (1, 1)]) == pytest.approx(1 - 1 / 3)


def test_text_f1_weighs_columns_found_against_strays() -> None:
    evaluator = load_python(EVALUATORS / "ppocr4_det.py", "evaluator")
    found = np.zeros((1, 1, 8, 10), np.float32)
    found[..., 2, 1:4] = 0.9  # three of six columns of the box
    found[..., 7, 0] = 0.9  # one stray pixel
    # recall 3/6, precision 3/4: 2 * 0.5 * 0.75 / 1.25
    assert evaluator.score({"map": found}, [(1, 1, 7, 4)]) == pytest.approx(0.6)
    assert evaluator.score({"map": np.zeros_like(found)}, [(1, 1, 7, 4)]) == 0


def test_retrieval_ranks_in_both_directions() -> None:
    evaluator = load_python(EVALUATORS / "minilm_l6.py", "evaluator")
    # Two batches of one pair; by dot product, queries over documents:  1 0 / 1 0.1
    first = evaluator.score({"v": np.array([[1.0, 0.0], [1.0, 0.0]])}, None)
    second = evaluator.score({"v": np.array([[1.0, 0.1], [0.0, 1.0]])}, None)
    # Queries: 1, 1/2 (the first document is ahead). Documents: 1 (equal does not count), 1.
    assert evaluator.aggregate([first, second]) == pytest.approx((1 + 1 / 2 + 1 + 1) / 4)


def test_retrieval_is_within_pools_of_one_size() -> None:
    evaluator = load_python(EVALUATORS / "minilm_l6.py", "evaluator")
    # 33 pairs: the last one is alone in its pool, and first.
    vectors = np.stack([np.zeros((33, 2)), np.ones((33, 2))])
    vectors[0, :32] = 1
    vectors[1, :32, 0] = np.arange(32, 0, -1)  # documents by length: query i finds i others ahead
    ranks = [1 / (i + 1) if i < 10 else 0 for i in range(32)]
    assert evaluator.aggregate([vectors]) == pytest.approx((sum(ranks) + 32 + 1 + 1) / 66)


def test_any_class_that_the_caption_names_is_right() -> None:
    evaluator = load_python(EVALUATORS / "efficientnet_lite0.py", "evaluator")
    logits = np.array([[0.0, 3.0, 1.0]])
    assert evaluator.score({"logits": logits}, frozenset({1, 2})) == 1
    assert evaluator.score({"logits": logits}, frozenset({2})) == 0


def test_voice_scores_are_pooled_over_recordings() -> None:
    evaluator = load_python(EVALUATORS / "silero_vad_seq.py", "evaluator")
    first = evaluator.score({"p": np.array([[0.1], [0.4]])}, np.array([False, False]))
    second = evaluator.score({"p": np.array([[0.35], [0.8]])}, np.array([True, True]))
    assert evaluator.aggregate([first, second]) == pytest.approx(0.75)


def test_notes_are_counted_over_all_windows() -> None:
    evaluator = load_python(EVALUATORS / "basic_pitch.py", "evaluator")
    truth = np.zeros((172, 88), bool)
    truth[:2, 5] = True
    found = np.zeros((1, 172, 88), np.float32)
    found[0, 1:4, 5] = 0.9  # one of two right, two strays
    counts = evaluator.score({"StatefulPartitionedCall:1": found}, truth)
    assert counts == (1, 3, 2)
    assert evaluator.aggregate([counts, (3, 3, 4)]) == pytest.approx(2 * 4 / (6 + 6))


def test_quality_is_ranked_against_the_noise() -> None:
    evaluator = load_python(EVALUATORS / "dnsmos.py", "evaluator")
    scores = [
        evaluator.score({"q": np.array([[0, 0, q]])}, level)
        for q, level in [(1.5, -5.0), (3.0, 35.0), (2.0, 10.0)]
    ]
    assert evaluator.aggregate(scores) == pytest.approx(1)


def test_calibration_of_dnsmos_hears_both_kinds_of_noise() -> None:
    """The prompts have nothing above 4 kHz: there white noise is as strong everywhere, and brown falls by the square."""
    evaluator = _load("dnsmos")
    slopes = []
    for feeds in evaluator.calibration():
        power = np.abs(np.fft.rfft(feeds["input_1"][0])) ** 2
        frequencies = np.fft.rfftfreq(feeds["input_1"].shape[1], 1 / 16000)
        near = power[(frequencies > 4200) & (frequencies < 5000)].mean()
        slopes.append(power[frequencies > 5000].mean() / near)
    assert sum(slope > 0.9 for slope in slopes) >= 3
    assert sum(slope < 0.6 for slope in slopes) >= 3
