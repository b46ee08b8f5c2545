from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.formats import FORMATS
from optkit.passes.quantization import observers
from optkit.passes.quantization.observers import BINS, SAMPLE, Histogram, Range, observer
from optkit.qdq import dequantize, quantize, scale_zero

U8, S8 = FORMATS["u8"], FORMATS["s8"]
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)

NUMBERS = st.one_of(
    st.floats(-10, 10, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from(
        [
            float(np.float32(x))
            for x in (0, -0.0, 1, -1, 1024, LARGEST, -LARGEST, SMALLEST, -SMALLEST, 1e-40, 1e30)
        ]
    ),
)
BATCHES = st.lists(
    st.lists(NUMBERS, min_size=1, max_size=6).map(lambda x: np.array(x, np.float32)), min_size=1, max_size=6
)


def _fed(batches, method="percentile", percentile=100.0):
    histogram = Histogram(method, percentile)
    for batch in batches:
        histogram.add(batch)
    return histogram


# The range


@given(batches=BATCHES)
@settings(deadline=None)
def test_min_max_is_exact(batches):
    seen = observer("min-max", 100.0)
    for batch in batches:
        seen.add(batch)
    x = np.concatenate(batches)
    assert seen.limits(U8) == (x.min(), x.max())
    assert seen.finite


@pytest.mark.parametrize("method", ["min-max", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_range_that_held_nan_or_infinity_is_not_finite_whenever_it_came(method, bad):
    good, evil = np.ones(3, np.float32), np.array([1, bad, 2], np.float32)
    for batches in ([evil, good], [good, evil], [good, evil, good]):
        seen = observer(method, 99.0)
        for batch in batches:
            seen.add(batch)
        assert not seen.finite


@pytest.mark.parametrize("method", ["min-max", "percentile", "mse", "entropy"])
def test_nothing_seen_is_not_finite_and_empty_batches_add_nothing(method):
    seen = observer(method, 99.0)
    seen.add(np.zeros((0, 3), np.float32))
    assert not seen.finite
    seen.add(np.float32([1, 2]))
    seen.add(np.zeros((0, 3), np.float32))
    assert (seen.low, seen.high) == (1, 2)


# The histogram


@given(batches=BATCHES)
@settings(max_examples=400, deadline=None)
def test_the_histogram_is_the_one_of_all_data_at_once_however_the_batches_come(batches):
    histogram = _fed(batches)
    x = np.concatenate(batches).astype(np.float64)
    if not x.any():
        assert histogram.limits(U8) == (0, 0)
        return
    edges = histogram.edges
    # Widths are powers of two and edges their multiples, so all of this is exact.
    expected = np.zeros(BINS, np.int64)
    for value in x:
        (index,) = np.flatnonzero((edges[:-1] <= value) & (value < edges[1:]))
        expected[index] += 1
    assert np.array_equal(histogram.counts, expected)


@pytest.mark.parametrize(
    "batches",
    [
        [[1, 2], [-5, 3]],
        [[-1, -2], [-700, -0.5]],
        [[1, 2], [900, 5], [1e6, 1]],
        [[0.1, 0.2], [-30, 40], [-5000, 6000]],
        [[7, 7], [7, 7]],
        [[0, 0], [0, 0], [1, 2]],
        [[1e-40, 2e-40], [-1e-39, 1]],
        [[LARGEST, -LARGEST], [1, 2]],
        [[1, 2], [-LARGEST, 3]],
    ],
    ids=["both", "negative", "positive", "outwards", "constant", "zeros first", "denormal", "huge", "mask"],
)
def test_every_value_is_counted_whatever_its_size(batches):
    batches = [np.array(b, np.float32) for b in batches]
    for order in (batches, batches[::-1]):
        histogram = _fed(order)
        assert histogram.counts.sum() == sum(map(len, batches))
        assert histogram.limits(U8) == (min(b.min() for b in batches), max(b.max() for b in batches))


@given(batches=BATCHES)
@settings(deadline=None)
def test_zero_is_an_edge_and_bins_are_at_least_as_fine_as_the_range_allows(batches):
    histogram = _fed(batches)
    if histogram.counts.any():
        edges, x = histogram.edges, np.concatenate(batches).astype(np.float64)
        width = edges[1] - edges[0]
        assert width > 0
        assert np.array_equal(edges / width, np.round(edges / width))
        # Doubling stops as soon as both ends fit; 0 need not be among the values, and takes its share of the bins.
        reach = max(x.max(), 0) - min(x.min(), 0)
        assert width <= reach / (BINS / 8)


def test_memory_does_not_grow_with_the_number_of_batches():
    random = np.random.default_rng(0)
    histogram, sizes = Histogram("mse", 99.99), set()
    for _ in range(50):
        histogram.add(random.normal(size=1000).astype(np.float32))
        arrays = [v for v in vars(histogram).values() if isinstance(v, np.ndarray)]
        assert not [v for v in vars(histogram).values() if isinstance(v, list | dict | tuple)]
        assert all(a.base is None for a in arrays)
        sizes.add(sum(a.nbytes for a in arrays) + sum(map(sys.getsizeof, vars(histogram))))
    assert len(sizes) == 1


def test_an_observer_keeps_no_batch_alive():
    batch = np.ones(SAMPLE * 2, np.float32)
    seen = observer("mse", 99.99)
    before = sys.getrefcount(batch)
    seen.add(batch)
    assert sys.getrefcount(batch) == before


def test_large_tensors_are_sampled_from_all_channels_alike():
    # Channels last, as in transformers: one channel of 1024 is ten times as large.
    x = np.ones((512, 1024), np.float32)
    x[:, 5] = 10
    histogram = _fed([x])
    edges = histogram.edges
    large = histogram.counts[np.flatnonzero(edges[:-1] <= 9.9).max() :].sum()
    # 1 of 1024; the sample takes neither none nor many more of them.
    assert histogram.counts.sum() <= SAMPLE
    assert 0.5 / 1024 < large / histogram.counts.sum() < 2 / 1024


# Percentiles


@given(
    seed=st.integers(0, 1000),
    percentile=st.sampled_from([90.0, 99.0, 99.75, 100.0]),
    kind=st.sampled_from(["normal", "relu", "negative", "constant"]),
)
@settings(max_examples=60, deadline=None)
def test_percentiles_are_those_of_the_data_within_a_bin(seed, percentile, kind):
    x = np.random.default_rng(seed).normal(size=(8, 2000)).astype(np.float32)
    x = {"normal": x, "relu": np.maximum(x, 0), "negative": -np.abs(x), "constant": np.full_like(x, 3.5)}[
        kind
    ]
    histogram = _fed(x, percentile=percentile)
    low, high = histogram.limits(U8)
    tail = (100 - percentile) / 2
    width = histogram.edges[1] - histogram.edges[0]
    # Definitions of a percentile differ by one place in the sorted values.
    ordered = np.sort(x, axis=None).astype(np.float64)
    k = round(ordered.size * tail / 100)
    assert ordered[max(k - 1, 0)] - width <= low <= ordered[k + 1] + width
    assert ordered[-k - 2] - width <= high <= ordered[min(-k, -1)] + width
    assert x.min() <= low <= high <= x.max()


# Ranges that minimise a loss


def _candidates(x):
    return [(min(x.min(), 0.0) * s, max(x.max(), 0.0) * s) for s in np.linspace(1.0, 0.2, 65)]


def _true_error(x, low, high, fmt):
    scale, zero = scale_zero(low, high, fmt)
    found = dequantize(quantize(x, scale, zero, fmt), scale, zero)
    return float(((x.astype(np.float64) - found) ** 2).sum())


SHAPES = {
    "normal": lambda r: r.normal(size=40_000),
    "laplace": lambda r: r.laplace(size=40_000),
    "relu": lambda r: np.maximum(r.normal(size=40_000), 0),
    "uniform": lambda r: r.uniform(-1, 3, size=40_000),
    "outliers": lambda r: np.concatenate([r.normal(size=40_000), [60, -45, 80]]),
    "one side": lambda r: np.concatenate([r.exponential(size=40_000), [200]]),
    "two peaks": lambda r: np.concatenate([r.normal(-3, 0.1, 20_000), r.normal(5, 0.1, 20_000)]),
    "negative": lambda r: -r.exponential(size=40_000),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("fmt", [U8, S8], ids=["u8", "s8"])
def test_mse_finds_the_range_with_the_least_squared_error(kind, fmt):
    x = SHAPES[kind](np.random.default_rng(0)).astype(np.float32)
    low, high = _fed(np.array_split(x, 7), "mse").limits(fmt)
    best = min(_true_error(x, *limits, fmt) for limits in _candidates(x))
    # Bins stand for the values in them: what that costs stays below 5 % of the least error.
    assert _true_error(x, low, high, fmt) <= 1.05 * best


def test_mse_moves_each_end_on_its_own():
    # A crowd below 0 and a lone outlier above: both ends together would cut the crowd to keep the step small.
    random = np.random.default_rng(0)
    x = np.concatenate([random.uniform(-4, 0, 300_000), random.exponential(0.5, 300_000), [60.0]])
    x = x.astype(np.float32)
    low, high = _fed(np.array_split(x, 50), "mse").limits(U8)
    assert low < -3.8
    assert high < 40
    assert _true_error(x, low, high, U8) < 0.7 * min(_true_error(x, *c, U8) for c in _candidates(x))


def test_mse_counts_errors_behind_the_function():
    def hard_swish(x):
        return x * np.clip(x / 6 + 0.5, 0, 1)

    x = np.random.default_rng(0).normal(-4, 5, 60_000).astype(np.float32)
    seen = _fed(np.array_split(x, 7), "mse")

    def error(limits):
        scale, zero = scale_zero(*limits, U8)
        y = dequantize(quantize(x, scale, zero, U8), scale, zero)
        return float(((hard_swish(x) - hard_swish(y)) ** 2).sum())

    assert error(seen.limits(U8, hard_swish)) < 0.5 * error(seen.limits(U8))


def test_mse_cuts_lone_outliers_off_and_keeps_all_of_a_uniform_range():
    random = np.random.default_rng(0)
    # Rounding 3 million values on a range of 46 costs more than clipping one by 30.
    batches = [random.normal(size=60_000).astype(np.float32) for _ in range(50)]
    batches[3][7] = 40
    assert 5 < _fed(batches, "mse").limits(U8)[1] < 30
    uniform = random.uniform(-1, 1, 60_000).astype(np.float32)
    assert _fed([uniform], "mse").limits(U8) == (uniform.min(), uniform.max())


def _divergence(counts, edges, low, high, fmt):
    """The definition, a bin at a time: clip, share each level's mass among its seen bins, compare."""
    step = (high - low) / fmt.steps
    centers = (edges[:-1] + edges[1:]) / 2
    bins = [(c, int(n)) for c, n in zip(centers.tolist(), counts.tolist(), strict=True) if n]
    inside = [(c, n) for c, n in bins if low <= c <= high]
    if not inside:
        return np.inf
    p = [float(n) for _, n in inside]
    p[0] += sum(n for c, n in bins if c < low)
    p[-1] += sum(n for c, n in bins if c > high)
    levels = [round(c / step) for c, _ in inside]
    mass = {
        level: [n for (_, n), other in zip(inside, levels, strict=True) if other == level] for level in levels
    }
    q = [sum(mass[level]) / len(mass[level]) for level in levels]
    return sum(a / sum(p) * np.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("kind", SHAPES)
def test_entropy_finds_the_range_with_the_least_divergence(kind):
    x = SHAPES[kind](np.random.default_rng(0)).astype(np.float32)
    histogram = _fed(np.array_split(x, 7), "entropy")
    losses = [_divergence(histogram.counts, histogram.edges, *c, U8) for c in _candidates(x)[::8]]
    found = _divergence(histogram.counts, histogram.edges, *histogram.limits(U8), U8)
    assert found <= min(losses) * (1 + 1e-9)


def test_entropy_cuts_lone_outliers_off():
    x = np.concatenate([np.random.default_rng(0).normal(size=60_000), [40.0, -40.0]]).astype(np.float32)
    low, high = _fed([x], "entropy").limits(U8)
    assert -20 < low < -3
    assert 3 < high < 20


@given(batches=BATCHES, method=st.sampled_from(["percentile", "mse", "entropy"]))
@settings(deadline=None)
def test_every_method_gives_a_range_within_what_was_seen(batches, method):
    low, high = _fed(batches, method, 99.0).limits(U8)
    x = np.concatenate(batches)
    assert np.isfinite([low, high]).all()
    assert min(x.min(), 0.0) <= low <= high <= max(x.max(), 0.0)


def test_the_sample_of_a_batch_is_bounded_at_all_sizes():
    for size in (SAMPLE - 1, SAMPLE, SAMPLE + 1, 2 * SAMPLE, 3 * SAMPLE + 7, 10 * SAMPLE):
        histogram = _fed([np.ones(size, np.float32)])
        assert SAMPLE // 3 < histogram.counts.sum() <= SAMPLE


def test_plain_ranges_have_no_histogram():
    assert type(observer("min-max", 99.0)) is Range
    assert len(observer("mse", 99.0).counts) == observers.BINS
