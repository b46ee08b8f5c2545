"""What compile does when nobody says what the inputs look like."""

from __future__ import annotations

import numpy as np
import pytest

import optkit
from optkit.bench import NOISE, Speedup, Timing
from optkit.errors import DataError
from optkit.sentences import faster
from optkit.testing import parse

# A window of five values needs an axis of at least five: one, the size of a free axis that nothing is known of, will not do.
WINDOW = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 1, T] x) => (float[N, 1, U] y) <float[1, 1, 5] w = {1, 2, 3, 2, 1}> { y = Conv(x, w) }
"""
NOISY = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 4] x) => (float[N, 4] y) { r = RandomNormalLike(x) y = Add(x, r) }
"""
PICKY = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, T] x) => (float[N, U] y) <int64[2] shape = {0, 7919}> { y = Reshape(x, shape) }
"""


def test_free_axes_get_a_size_that_the_model_runs_with(tmp_path):
    _, report = optkit.compile(parse(WINDOW), out=tmp_path / "out")
    assert report.manifest.fidelity.inputs == "inputs drawn from the input specification"
    assert report.manifest.fidelity.met


@pytest.mark.parametrize("data", [None, "random"])
def test_half_precision_is_checked_on_sizes_that_the_model_runs_with(data, tmp_path):
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[N, 1, H, W] x) => (float[N, 1, U, V] y) { y = Conv(x, w) }
    """
    model = parse(text, w=np.ones((1, 1, 7, 7), np.float32))
    asked = {"target": "h100", "recipe": "tensorrt-fp16", "overrides": ["options.proxy=false"]}
    _, report = optkit.compile(model, data=data, out=tmp_path / "out", **asked)
    assert report.manifest.achieved.formats == {"fp16": 1.0}
    assert report.manifest.data is None or report.manifest.data.random


def test_data_that_is_drawn_has_the_sizes_that_the_options_ask_for():
    from optkit.reference import trial_batches

    found = trial_batches(parse(WINDOW), 2, seed=0, sizes={"T": 9})
    assert found.random and [batch["x"].shape for batch in found] == [(2, 1, 9)] * 2


def test_a_model_that_draws_random_numbers_is_not_compared_and_the_manifest_says_so(tmp_path):
    _, report = optkit.compile(parse(NOISY), out=tmp_path / "out")
    assert report.manifest.fidelity is None
    assert any("draws random numbers" in note for note in report.manifest.notes)


def test_a_model_that_runs_with_no_drawn_input_asks_for_data(tmp_path):
    with pytest.raises(DataError, match="runs with none of the inputs drawn") as error:
        optkit.compile(parse(PICKY), out=tmp_path / "out")
    assert "--calib" in str(error.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (1 - NOISE / 2, 1 - NOISE / 4, "as fast as"),
        (1 + NOISE / 4, 1 + NOISE / 2, "as fast as"),
        (1.10, 1.14, "1.12x faster than"),
        (0.85, 0.95, "1.11x slower than"),
        (0.70, 1.30, "neither faster nor slower for certain (0.70 to 1.30x) than"),
    ],
)
def test_what_two_sessions_of_one_file_differ_by_is_no_difference(low, high, word):
    from optkit.report import Latency

    ratio = (low + high) / 2
    latency = Latency(
        reference_ms=1, candidate_ms=1 / ratio, candidate_p99_ms=1, wall_reference_ms=1, wall_candidate_ms=1,
        speedup=ratio, ci95=(low, high), runs=9, threads=1, loaded=False, inputs="x [1]",
    )  # fmt: skip
    assert faster(latency) == word


def test_noise_is_not_a_missed_limit():
    from optkit.candidate import Built
    from optkit.recipe import Recipe
    from optkit.search import _too_slow

    timing = Timing(median=1.0, p99=1.0, wall=1.0, runs=9, warmup=2)

    def slow(high: float, wanted: float) -> bool:
        speed = Speedup(
            reference=timing, candidate=timing, ratio=high, ci95=(high - 0.01, high), threads=1, loaded=False
        )
        built = Built.__new__(Built)
        built.speedup = speed
        return bool(_too_slow(built, Recipe.load({"recipe": 1, "limits": {"min_speedup": wanted}})))

    assert not slow(1 - NOISE / 2, 1.0)
    assert slow(1 - 2 * NOISE, 1.0)
    assert slow(1.99, 2.0)
