"""Sessions that go wrong on purpose, and the check that must notice."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.data import TensorSpec
from optkit.errors import ModelError
from optkit.freshness import check, trials

INPUTS = (
    TensorSpec(name="x", dtype=np.dtype(np.float32), shape=("batch", "length", 4)),
    TensorSpec(name="mask", dtype=np.dtype(np.int64), shape=("batch", "length")),
)


def _feeds(batch: int, length: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(length).normal(size=(batch, length, 4)).astype(np.float32)
    return {"x": x, "mask": np.ones((batch, length), np.int64)}


def _reference(feeds):
    return {"y": feeds["x"] * 2 + 1, "n": feeds["mask"].sum(axis=1)}


def _trials(batch=2, length=6, reference=_reference, inputs=INPUTS):
    return trials(reference, inputs, [_feeds(batch, length)])


class _Session:
    """Computes as the reference, but for what ``fault(number of the run, outputs, outputs of the run before)`` changes."""

    def __init__(self, fault=lambda run, now, before: now):
        self.runs, self.before, self.fault, self.shapes = 0, {}, fault, []

    def run(self, feeds):
        now = self.fault(self.runs, _reference(feeds), self.before)
        self.runs, self.before = self.runs + 1, now
        self.shapes.append(feeds["x"].shape)
        return now


def _shapes(*args, **kwargs):
    return [t.feeds["x"].shape for t in _trials(*args, **kwargs)]


# Trials


def test_the_batch_becomes_1_and_then_the_length_is_halved():
    assert _shapes(2, 6) == [(2, 6, 4), (1, 6, 4), (2, 3, 4)]


def test_a_batch_of_1_becomes_2_and_a_length_of_1_doubles():
    assert _shapes(1, 1) == [(1, 1, 4), (2, 1, 4), (1, 2, 4)]


def test_of_two_free_axes_the_longer_changes_and_others_of_its_size_with_it():
    inputs = tuple(
        TensorSpec(name=name, dtype=np.dtype(np.float32), shape=("n", "height", axis))
        for name, axis in (("x", "width"), ("mask", "s95"))
    )
    feeds = {s.name: np.ones((1, 6, 20), np.float32) for s in inputs}
    found = trials(lambda feeds: {"y": feeds["x"] * feeds["mask"]}, inputs, [feeds])
    assert [t.feeds["mask"].shape for t in found] == [(1, 6, 20), (2, 6, 20), (1, 6, 10)]


def test_where_the_reference_refuses_half_a_multiple_of_32_is_tried():
    def picky(feeds):
        if feeds["x"].shape[1] % 32:
            raise ModelError("32 at a time")
        return _reference(feeds)

    assert _shapes(2, 96, picky) == [(2, 96, 4), (1, 96, 4), (2, 64, 4)]


def test_shapes_that_the_reference_refuses_are_left_out():
    def picky(feeds):
        if feeds["x"].shape != (2, 6, 4):
            raise ModelError("no")
        return _reference(feeds)

    assert _shapes(2, 6, picky) == [(2, 6, 4)]


@pytest.mark.parametrize("nothing", [lambda y: y * np.nan, lambda y: y[:, :0]])
def test_shapes_of_which_the_reference_makes_nothing_are_left_out(nothing):
    def lenient(feeds):
        found = _reference(feeds)
        return {**found, "y": nothing(found["y"])} if feeds["x"].shape[1] < 6 else found

    assert _shapes(2, 6, lenient) == [(2, 6, 4), (1, 6, 4), (2, 32, 4)]


def test_with_fixed_shapes_the_other_input_is_another_batch_or_the_same_backwards():
    fixed = tuple(TensorSpec(name=s.name, dtype=s.dtype, shape=(2, 6, 4)[: len(s.shape)]) for s in INPUTS)
    one, other = _feeds(2, 6), _feeds(2, 6)
    other["x"] = other["x"] + 1
    found = trials(_reference, fixed, [one, other])
    assert [t.feeds["x"] is f["x"] for t, f in zip(found, (one, other), strict=True)] == [True, True]
    found = trials(_reference, fixed, [one])
    np.testing.assert_array_equal(found[1].feeds["x"], one["x"][::-1, ::-1, ::-1])


# Check


@pytest.mark.parametrize("lossy", [False, True])
def test_a_sound_session_runs_in_the_order_a_b_a_c(lossy):
    session = _Session()
    check(session.run, _trials(), name="it", lossy=lossy)
    assert session.shapes == [(2, 6, 4), (1, 6, 4), (2, 6, 4), (2, 3, 4)]


def _from(number, fault):
    return lambda run, now, before: fault(now, before) if run >= number else now


FAULTS = {
    "stale": (_from(1, lambda now, before: {**now, "y": before["y"]}), "output 'y' with x .1, 6, 4., mask .1, 6. came out as .2, 6, 4., the reference gives .1, 6, 4."),
    "empty": (_from(1, lambda now, before: {**now, "n": now["n"][:0]}), "output 'n' .* came out as .0., the reference gives .1."),
    "missing": (_from(0, lambda now, before: {"y": now["y"]}), "output 'n' .* came out as nothing"),
    "another after B": (_from(2, lambda now, before: {**now, "y": now["y"] * 1.01}), "output 'y' .* is not what the same input gave before"),
    "nan": (_from(3, lambda now, before: {**now, "y": now["y"] * np.nan}), "output 'y' with x .2, 3, 4.* is finite at other places than the reference"),
}  # fmt: skip


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_runtime_may_do_without_an_error_is_an_error_that_names_the_output(fault, lossy):
    planted, message = FAULTS[fault]
    with pytest.raises(ModelError, match=f"it: {message}"):
        check(_Session(planted).run, _trials(), name="it", lossy=lossy)


def test_an_output_of_the_same_shape_that_is_the_one_before_is_called_stale():
    fixed = tuple(TensorSpec(name=s.name, dtype=s.dtype, shape=(2, 6, 4)[: len(s.shape)]) for s in INPUTS)
    found = trials(_reference, fixed, [_feeds(2, 6)])
    session = _Session(_from(1, lambda now, before: {**now, "y": before["y"]}))
    with pytest.raises(ModelError, match=r"output 'y' .* still holds what the call before gave"):
        check(session.run, found, name="it", lossy=False)


def test_wrong_numbers_are_an_error_where_the_graph_is_exact_alone():
    planted = _from(0, lambda now, before: {**now, "y": now["y"] * 1.2})
    with pytest.raises(ModelError, match="differs from the reference by 20% of its size") as found:
        check(_Session(planted).run, _trials(), name="it", lossy=False)
    assert "another --backend" in str(found.value.hint) and "report it" in str(found.value.hint)
    check(_Session(planted).run, _trials(), name="it", lossy=True)


def test_a_lossy_session_that_is_right_at_the_shape_of_the_data_alone_is_an_error():
    planted = _from(3, lambda now, before: {**now, "y": -2 * now["y"]})
    with pytest.raises(ModelError, match=r"with x .2, 3, 4.* differs from the reference by 300%") as found:
        check(_Session(planted).run, _trials(), name="it", lossy=True)
    assert str(found.value.hint).startswith("-p fp32 keeps the numbers")


def test_a_lossy_session_that_gives_the_same_for_all_inputs_is_left_to_the_metric():
    planted = _from(0, lambda now, before: {"y": np.zeros_like(now["y"]), "n": np.zeros_like(now["n"])})
    check(_Session(planted).run, _trials(), name="it", lossy=True)


def test_what_the_reference_draws_at_random_is_not_compared():
    random = np.random.default_rng(0)

    def drawing(feeds):
        return {"y": random.normal(size=feeds["x"].shape), "n": feeds["mask"].sum(axis=1)}

    found = _trials(reference=drawing)
    assert found[0].steady == {"n"}
    check(_Session().run, found, name="it", lossy=False)


def test_what_stops_a_session_names_the_shape():
    def stops(run, now, before):
        if run == 1:
            raise ModelError("no kernel")
        return now

    with pytest.raises(ModelError, match=r"it: does not run with x .1, 6, 4., mask .1, 6.: no kernel"):
        check(_Session(stops).run, _trials(), name="it", lossy=True)


def test_rounding_around_zero_is_no_difference():
    zeros = _trials(reference=lambda feeds: {"y": np.zeros(feeds["x"].shape, np.float32)})
    check(lambda feeds: {"y": np.full(feeds["x"].shape, 1e-8, np.float32)}, zeros, name="it", lossy=False)


# Sizes that the numbers decide

OUTPUTS = (
    TensorSpec(name="y", dtype=np.dtype(np.float32), shape=("batch", "2*length", 4)),
    TensorSpec(name="n", dtype=np.dtype(np.int64), shape=(None,)),
)


def _counted(fault=None):
    found = trials(_reference, INPUTS, [_feeds(2, 6)], OUTPUTS)
    return _Session(_from(0, fault) if fault else lambda run, now, before: now), found


def test_an_axis_with_no_symbol_of_an_input_is_the_numbers_to_decide():
    assert _counted()[1][0].decided == {"y": frozenset(), "n": frozenset({0})}


def test_a_lossy_session_may_count_otherwise_where_the_numbers_decide_a_size_and_nowhere_else():
    session, found = _counted(lambda now, before: {**now, "n": np.append(now["n"], now["n"])})
    check(session.run, found, name="it", lossy=True)
    with pytest.raises(ModelError, match=r"output 'n' .* came out as"):
        check(
            _counted(lambda now, before: {**now, "n": np.append(now["n"], 1)})[0].run,
            found,
            name="it",
            lossy=False,
        )
    for wrong in (lambda now: {**now, "y": now["y"][:, :2]}, lambda now: {**now, "n": now["n"][:0]}):
        session, _ = _counted(lambda now, before, wrong=wrong: wrong(now))
        with pytest.raises(ModelError, match="came out as"):
            check(session.run, found, name="it", lossy=True)


def test_another_size_that_is_that_of_the_call_before_is_called_stale():
    found = trials(_reference, INPUTS, [_feeds(2, 6)], OUTPUTS)
    session = _Session(_from(1, lambda now, before: {**now, "n": before["n"]}))
    with pytest.raises(ModelError, match=r"output 'n' .* still holds what the call before gave"):
        check(session.run, found, name="it", lossy=True)
