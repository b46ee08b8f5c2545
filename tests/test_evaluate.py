from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from optkit.errors import DataError, UsageError
from optkit.evaluate import Budget, Evaluator, compare, fidelity

MEAN = Evaluator(samples=list, score=lambda outputs, label: 0.0, metric="points")
POOLED = Evaluator(
    samples=list,
    score=lambda outputs, label: 0.0,
    aggregate=lambda scores: float(np.mean(scores)),
    metric="pooled",
)
PERCENT = Budget.parse("1%")


# Budgets


@pytest.mark.parametrize(
    ("text", "amount", "relative"),
    [
        ("1%", 0.01, True),
        (" 0.5 % ", 0.005, True),
        ("0.01", 0.01, False),
        (0.01, 0.01, False),
        (2, 2.0, False),
        ("1e-3", 0.001, False),
        ("0", 0.0, False),
        ("0%", 0.0, True),
    ],
)
def test_a_percentage_is_relative_and_a_number_absolute(text, amount, relative):
    assert Budget.parse(text) == Budget(amount=amount, relative=relative)


@pytest.mark.parametrize("text", ["", "%", "1%%", "-1%", "-0.1", "nan", "inf", "inf%", "one", "1 percent"])
def test_other_budgets_are_refused(text):
    with pytest.raises(UsageError, match="neither a percentage nor a number") as caught:
        Budget.parse(text)
    assert "1%" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "reference", "expected"), [("1%", 0.8, 0.008), ("1%", -2.0, 0.02), ("0.01", 0.8, 0.01)]
)
def test_a_relative_budget_is_a_share_of_the_references_metric(text, reference, expected):
    assert Budget.parse(text).absolute(reference) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["1%", "0.5%", "0.01", "2"])
def test_budgets_are_shown_as_they_were_written(text):
    assert str(Budget.parse(text)) == text
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


# Intervals


@pytest.mark.parametrize(
    ("worse", "better", "n", "low", "high"),
    [
        # (b - c + 0) / (n + 2) -+ 1.96 sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2), by hand
        (0, 0, 20, -0.089089, 0.089089),
        (0, 0, 1000, -0.001956, 0.001956),
        (9, 16, 100, -0.165697, 0.028443),
        (5, 0, 50, 0.007605, 0.184703),
    ],
)
def test_right_or_wrong_scores_get_the_interval_of_agresti_and_min(worse, better, n, low, high):
    reference = [1] * worse + [0] * better + [1] * (n - worse - better)
    candidate = [0] * worse + [1] * better + [1] * (n - worse - better)
    found = compare(MEAN, reference, candidate, None)
    assert found.method == "Agresti-Min"
    assert found.ci95 == pytest.approx((low, high), abs=2e-6)
    assert found.drop == pytest.approx((worse - better) / n)
    assert (found.n, found.verdict, found.budget) == (n, None, None)


# 97.5th percentiles of Student's t, from tables.
STUDENT = {
    1: 12.7062,
    2: 4.3027,
    3: 3.1824,
    4: 2.7764,
    5: 2.5706,
    9: 2.2622,
    29: 2.0452,
    99: 1.9842,
    999: 1.9623,
}


@pytest.mark.parametrize(("freedom", "t"), STUDENT.items())
def test_other_scores_get_students_interval_of_the_paired_differences(freedom, t):
    n = freedom + 1
    reference = np.random.default_rng(freedom).normal(size=n).tolist()
    candidate = (np.asarray(reference) - np.random.default_rng(1).normal(0.1, 0.3, n)).tolist()
    found = compare(MEAN, reference, candidate, None)
    d = np.subtract(reference, candidate)
    half = t * math.sqrt(((d - d.mean()) ** 2).sum() / freedom / n)
    assert found.method == "paired t"
    # The expansion is within 1 % at 3 degrees of freedom and better beyond.
    assert found.ci95 == pytest.approx((d.mean() - half, d.mean() + half), rel=0.01, abs=0.01 * half)


def test_one_sample_decides_nothing():
    found = compare(MEAN, [0.5], [0.5], PERCENT)
    assert found.ci95 == (-math.inf, math.inf)
    assert (found.verdict, found.needed) == ("inconclusive", None)


def test_equal_scores_that_are_not_right_or_wrong_have_an_interval_of_one_point():
    found = compare(MEAN, [0.5, 0.7, 0.9], [0.5, 0.7, 0.9], PERCENT)
    assert found.ci95 == (0, 0)
    assert found.verdict == "met"


def test_equal_right_or_wrong_scores_of_few_samples_are_not_taken_for_certainty():
    assert compare(MEAN, [1] * 20, [1] * 20, PERCENT).verdict == "inconclusive"
    assert compare(MEAN, [1] * 400, [1] * 400, PERCENT).verdict == "met"


@pytest.mark.parametrize(
    ("reference", "candidate", "constant"),
    [
        ([0] * 20, [0] * 20, True),
        ([0.5] * 20, [0.5] * 20, True),
        ([1] * 20, [1] * 20, False),  # all right, twice
        ([0] * 20, [0] * 19 + [1], False),
        ([0.5] * 20, [0.4] * 20, False),
        ([0.5], [0.5], False),
    ],
)
def test_a_score_that_is_the_same_in_every_sample_is_said_to_be(reference, candidate, constant):
    found = compare(MEAN, reference, candidate, PERCENT)
    assert found.constant is constant
    assert not (constant and found.needed)


def test_an_aggregate_gets_a_bootstrap_that_pairs_and_is_the_same_each_time():
    random = np.random.default_rng(0)
    reference = random.normal(10, 5, 200)
    candidate = reference - random.normal(0.2, 0.1, 200)
    found = compare(POOLED, reference.tolist(), candidate.tolist(), None)
    assert found.method == "paired bootstrap"
    # Of the mean of paired differences: 1.96 * 0.1 / sqrt(200) on each side. Unpaired it would be 50 times as wide.
    d = reference - candidate
    half = 1.96 * d.std(ddof=1) / math.sqrt(200)
    assert found.ci95 == pytest.approx((d.mean() - half, d.mean() + half), abs=0.25 * half)
    assert compare(POOLED, reference.tolist(), candidate.tolist(), None) == found
    assert compare(POOLED, reference.tolist(), candidate.tolist(), None, seed=1) != found


def test_a_metric_that_drawing_samples_twice_makes_easier_has_the_drop_amid_its_interval():
    # Retrieval: a query finds its document unless it takes the neighbour's for it, which must be there for that. Of 160
    # documents about 101 are different ones in a draw of 160 with replacement.
    def found_first(scores):
        there = {document for document, _ in scores}
        return sum(not (confused and document ^ 1 in there) for document, confused in scores) / len(scores)

    retrieval = Evaluator(samples=list, score=lambda o, label: 0, aggregate=found_first, metric="recall")
    found = compare(
        retrieval, [(i, False) for i in range(160)], [(i, i % 3 == 0) for i in range(160)], PERCENT
    )
    assert found.drop == pytest.approx(54 / 160)
    low, high = found.ci95
    assert 0.4 < (found.drop - low) / (high - low) < 0.6
    # As wide as that of the resampled: a binomial share's at least.
    assert high - low > 2 * 1.96 * math.sqrt(0.2 * 0.8 / 160)


def test_the_interval_always_holds_the_drop():
    spread = Evaluator(
        samples=list,
        score=lambda outputs, label: 0,
        aggregate=lambda scores: float(np.max(scores)),
        metric="max",
    )
    for seed in range(20):
        random = np.random.default_rng(seed)
        a, b = random.exponential(size=10).tolist(), random.exponential(size=10).tolist()
        found = compare(spread, a, b, None)
        assert found.ci95[0] <= found.drop <= found.ci95[1]


@pytest.mark.parametrize("n", [10, 40, 200])
@pytest.mark.parametrize("kind", ["right or wrong", "points"])
def test_the_interval_holds_the_true_drop_nineteen_times_of_twenty(kind, n):
    random = np.random.default_rng(n)
    trials, held = 600, 0
    for _ in range(trials):
        if kind == "points":
            reference = random.normal(0.8, 0.1, n)
            candidate, true = reference - random.normal(0.03, 0.1, n), 0.03
        else:
            cell = random.choice(4, n, p=[0.7, 0.12, 0.08, 0.1])  # both right, worse, better, both wrong
            reference, candidate, true = np.isin(cell, (0, 1)) * 1, np.isin(cell, (0, 2)) * 1, 0.04
        low, high = compare(MEAN, reference.tolist(), candidate.tolist(), None).ci95
        held += low <= true <= high
    # 95 % of 600, less 2.5 standard deviations of a count.
    assert held / trials >= 0.927


# Verdicts


def _verdict(drop: float, spread: float, budget: str, n: int = 10_000):
    """A comparison whose drop is exactly ``drop``, with an upper bound about ``spread`` above it."""
    reference = np.full(n, 0.5)
    wobble = np.where(np.arange(n) % 2, 1, -1) * spread * math.sqrt(n) / 1.96
    return compare(MEAN, reference.tolist(), (reference - drop - wobble).tolist(), Budget.parse(budget))


@pytest.mark.parametrize(
    ("drop", "spread", "budget", "verdict"),
    [
        (0.0, 0.0, "0", "met"),
        (0.0, 0.0, "0%", "met"),
        (0.01, 0.0, "0.01", "met"),  # on the edge
        (0.005, 0.0, "1%", "met"),  # 1 % of 0.5
        (0.0050001, 0.0, "1%", "missed"),
        (0.011, 0.0, "0.01", "missed"),
        (0.011, 0.5, "0.01", "missed"),  # beyond it, however unsure
        (0.009, 0.0005, "0.01", "met"),
        (0.009, 0.002, "0.01", "inconclusive"),
        (-0.5, 0.001, "0", "met"),
        (-0.001, 0.01, "0", "inconclusive"),
    ],
)
def test_a_verdict_is_met_by_the_upper_bound_and_missed_by_the_drop(drop, spread, budget, verdict):
    found = _verdict(drop, spread, budget)
    assert found.drop == pytest.approx(drop, abs=1e-12)
    assert found.verdict == verdict
    assert found.budget == str(Budget.parse(budget))
    assert (found.needed is None) == (verdict != "inconclusive")


def test_as_many_samples_as_were_said_to_be_needed_decide():
    found = _verdict(0.006, 0.008, "0.01", n=1000)
    assert found.verdict == "inconclusive"
    assert found.needed == pytest.approx(1000 * (0.008 / 0.004) ** 2, rel=0.01)
    # The spread of a mean falls with the root of the number.
    more = _verdict(
        0.006, 0.008 * math.sqrt(1000 / (found.needed * 1.01)), "0.01", n=int(found.needed * 1.01) // 2 * 2
    )
    assert more.verdict == "met"


def test_samples_that_cannot_decide_give_no_number():
    # Exactly on the limit more samples never help.
    assert _verdict(0.01, 0.01, "0.01").needed is None


def test_different_numbers_of_samples_are_refused():
    with pytest.raises(DataError, match="3 samples the first time, 2 the second"):
        compare(MEAN, [1, 2, 3], [1, 2], PERCENT)


# Metrics that are not numbers


def _correlation(scores):
    x, y = np.asarray(scores).T
    with np.errstate(all="ignore"):
        return float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std()))


CORRELATION = Evaluator(
    samples=list, score=lambda outputs, label: 0, aggregate=_correlation, metric="correlation"
)


def test_a_metric_that_the_candidate_makes_undefined_is_missed():
    x = np.random.default_rng(0).normal(size=50)
    good = list(zip(x, x, strict=True))
    ruined = [(a, 0.0) for a in x]
    found = compare(CORRELATION, good, ruined, PERCENT)
    assert math.isnan(found.candidate)
    assert found.verdict == "missed"
    assert found.drop == math.inf
    assert compare(CORRELATION, good, ruined, Budget.parse("100")).verdict == "missed"


def test_a_metric_that_is_undefined_for_the_reference_is_the_evaluators_mistake():
    with pytest.raises(DataError, match="evaluator correlation: aggregate\\(\\) gives nan for the reference"):
        compare(CORRELATION, [(1, 2), (1, 2)], [(1, 2), (1, 3)], PERCENT)


def test_draws_that_do_not_define_the_metric_are_left_out():
    def area(scores):
        """Share of (positive, negative) pairs in the right order; like scikit-learn's, it raises with one class."""
        positive, negative = [s for s, y in scores if y], [s for s, y in scores if not y]
        if not (positive and negative):
            raise ValueError("only one class")
        return float(np.mean([p > q for p in positive for q in negative]))

    evaluator = Evaluator(samples=list, score=lambda outputs, label: 0, aggregate=area, metric="area")
    scores = [(0.9, 1), (0.2, 0), (0.1, 0), (0.3, 0), (0.4, 0), (0.8, 1)]
    found = compare(evaluator, scores, scores, PERCENT)
    assert found.ci95 == (0, 0)
    # One positive in 60: a third of the draws has none, and says nothing. With none at all it is a mistake.
    rare = [(0.9, 1)] + [(0.1, 0)] * 2
    assert compare(evaluator, rare, rare, None).drop == 0
    with pytest.raises(DataError, match="only one class"):
        compare(evaluator, rare[1:], rare[1:], None)


# Evaluator files

GOOD = """
import numpy as np
METRIC = "hits"
def samples():
    for i in range(4):
        yield {"x": np.full((1,), i, np.float32)}, i
def score(outputs, label):
    return float(outputs["y"][0] == label)
"""


def _file(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(text)
    return path


def _run(feeds):
    return {"y": feeds["x"]}


def test_a_file_gives_samples_score_and_name(tmp_path):
    evaluator = Evaluator.load(_file(tmp_path, GOOD))
    assert evaluator.metric == "hits"
    assert evaluator.aggregate is None
    ticks = []
    assert evaluator.scores(_run, progress=lambda: ticks.append(1)) == [1.0] * 4
    assert len(ticks) == 4
    # Anew each time.
    assert evaluator.scores(lambda f: {"y": f["x"] + 1}) == [0.0] * 4
    assert evaluator.total([1.0, 0.0]) == 0.5


def test_the_metric_is_named_after_the_file_where_nothing_else_is_said(tmp_path):
    assert Evaluator.load(_file(tmp_path, GOOD.replace("METRIC", "OTHER"), "recall.py")).metric == "recall"


def test_an_aggregate_makes_the_metric_and_frees_the_scores(tmp_path):
    text = (
        GOOD.replace("return float(", "return (") + "\ndef aggregate(scores):\n    return sum(scores) * 10\n"
    )
    evaluator = Evaluator.load(_file(tmp_path, text))
    assert evaluator.total(evaluator.scores(_run)) == 40


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("def samples(): yield 1", ["does not define score()"]),
        ("score = samples = 3", ["does not define samples() and score()"]),
        ("import no_such_module_z", ["ModuleNotFoundError", "no_such_module_z"]),
        ("def f(:", ["SyntaxError"]),
        ("1 / 0", ["ZeroDivisionError"]),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_name(tmp_path, text, parts):
    path = _file(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        Evaluator.load(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.py: no such file"):
        Evaluator.load(tmp_path / "gone.py")


def test_what_lies_beside_the_file_can_be_imported_also_later(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    _file(tmp_path, "VALUE = 1\n", "beside_the_evaluator.py")
    _file(tmp_path, "VALUE = 2\n", "beside_the_evaluator_later.py")
    text = "import beside_the_evaluator\n" + GOOD.replace(
        "def samples():\n", "def samples():\n    import beside_the_evaluator_later\n"
    )
    assert Evaluator.load(_file(tmp_path, text)).scores(_run) == [1.0] * 4


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("range(4)", "range(0)"), ["samples() yields nothing"]),
        (("}, i\n", "}\n"), ["sample 0 is not a pair"]),
        (('{"x": np.full((1,), i, np.float32)}, i', "i, i"), ["sample 0 is not a pair"]),
        (
            ("return float", "return float('nan') or float"),
            ["the score of sample 0 is nan", "not a finite number"],
        ),
        (("return float", "return 'good' or float"), ["the score of sample 0 is 'good'"]),
        (("== label", "== label[0]"), ["score() of sample 0", "TypeError"]),
        (("range(4)", "range(4 / 0)"), ["samples() at sample 0", "ZeroDivisionError"]),
        (('outputs["y"]', 'outputs["z"]'), ["score() of sample 0", "KeyError: 'z'", "the outputs are y"]),
        (
            ("return float(", "return np.ones((300, 4)) + ("),
            ["the score of sample 0 is an array of shape [300, 4]", "gives one float"],
        ),
    ],
)
def test_mistakes_in_an_evaluator_name_the_sample(tmp_path, change, parts):
    assert change[0] in GOOD
    evaluator = Evaluator.load(_file(tmp_path, GOOD.replace(*change)))
    with pytest.raises(DataError) as caught:
        evaluator.scores(_run)
    for part in ("evaluator hits", *parts):
        assert part in f"{caught.value} | {caught.value.hint}"


# Fidelity


def _fidelity(expected, found):
    """Lists of outputs by name, one a batch."""
    left, right = iter(expected), iter(found)
    return fidelity(lambda _: next(left), lambda _: next(right), [{}] * len(expected))


def _outputs(*batches, name="y"):
    return [{name: np.asarray(b)} for b in batches]


def test_cosine_and_noise_are_those_of_the_formulas():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 3, 4, 5)).astype(np.float32)
    noisy = [x + random.normal(0, 0.1, x.shape).astype(np.float32) for x in (a, b)]
    found = _fidelity(_outputs(a, b), _outputs(*noisy))
    x, y = np.float64([a.ravel(), b.ravel()]), np.float64([n.ravel() for n in noisy])
    cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert found.cosine == pytest.approx(cosines.mean())
    assert found.sqnr == pytest.approx(10 * math.log10((x**2).sum() / ((x - y) ** 2).sum()))
    assert found.agreement == np.mean(
        [p.argmax(-1) == q.argmax(-1) for p, q in zip((a, b), noisy, strict=True)]
    )
    assert (found.n, found.shapes_equal) == (2, True)


def test_the_largest_difference_is_a_share_of_the_range_in_its_batch():
    wide, narrow = np.float32([-3.0, 0.0, 5.0]), np.float32([-0.5, 0.0, 0.5])
    expected = [*_outputs(wide), *_outputs(narrow)]
    found = [*_outputs(wide + np.float32([0, 0.4, 0])), *_outputs(narrow + np.float32([0, 0, -0.25]))]
    assert _fidelity(expected, found).largest == pytest.approx(0.25)
    assert _fidelity(expected[:1], found[:1]).largest == pytest.approx(0.05)
    assert _fidelity(expected, expected).largest == 0
    # Without a range, against the size; what is no longer finite is as far as can be.
    flat = np.full(3, 2.0, np.float32)
    assert _fidelity(_outputs(flat), _outputs(flat + np.float32([0, 1, 0]))).largest == pytest.approx(0.5)
    assert _fidelity(_outputs(wide), _outputs(wide * np.nan)).largest == np.inf


def test_outputs_without_a_number_are_no_agreement():
    nothing = np.full((2, 3), np.nan, np.float32)
    with pytest.raises(DataError, match="nothing to compare"):
        _fidelity(_outputs(nothing, nothing), _outputs(nothing, nothing))
    some = np.where(np.eye(2, 3) > 0, 1, nothing)
    assert _fidelity(_outputs(nothing, some), _outputs(nothing, some)).cosine == pytest.approx(1)


def test_the_worst_output_counts():
    good, bad = np.float32([1, 2, 3]), np.float32([3, -2, 1])
    found = _fidelity([{"a": good, "b": good}], [{"a": good, "b": bad}])
    assert found.cosine == pytest.approx(2 / 14)
    assert found.sqnr < 0


def test_equal_outputs_have_no_noise():
    found = _fidelity(_outputs(np.float32([[1, 2]])), _outputs(np.float32([[1, 2]])))
    assert (found.cosine, found.sqnr, found.agreement) == (pytest.approx(1), 200, 1)
    assert _fidelity(_outputs(np.zeros(3, np.float32)), _outputs(np.zeros(3, np.float32))).cosine == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_longer_finite_are_the_worst(bad):
    found = _fidelity(_outputs(np.float32([1, 2, 3])), _outputs(np.float32([1, bad, 3])))
    assert (found.cosine, found.sqnr) == (0, -200)


@pytest.mark.parametrize("mask", [np.nan, np.inf, -np.inf])
def test_values_that_were_infinite_or_nan_and_stay_so_do_not_count(mask):
    found = _fidelity(_outputs(np.float32([1, mask, 3])), _outputs(np.float32([1, mask, 3])))
    assert (found.cosine, found.sqnr) == (pytest.approx(1), 200)
    changed = _fidelity(_outputs(np.float32([1, mask, 3])), _outputs(np.float32([1, 2, 3])))
    assert (changed.cosine, changed.sqnr) == (0, -200)


def test_a_model_with_integer_outputs_alone_is_judged_by_the_share_of_equal_ones():
    found = _fidelity(_outputs([1, 2, 3, 4]), _outputs([1, 2, 3, 5]))
    assert (found.cosine, found.agreement) == (0.75, 0.75)
    assert _fidelity(_outputs([1, 2]), _outputs([1, 2])).cosine == 1


def test_integers_beside_floats_count_as_agreement():
    found = _fidelity(
        [{"a": np.float32([1, 2]), "b": np.array([1, 2])}], [{"a": np.float32([1, 2]), "b": np.array([1, 3])}]
    )
    assert (found.cosine, found.agreement) == (pytest.approx(1), 0.5)


def test_other_shapes_are_said_and_not_compared():
    found = _fidelity([{"a": np.zeros(3, np.float32)}], [{"a": np.zeros(4, np.float32)}])
    assert not found.shapes_equal
    assert found.cosine == 0
    both = _fidelity(
        [{"a": np.zeros(3, np.float32), "b": np.ones(2)}], [{"a": np.zeros(4, np.float32), "b": np.ones(2)}]
    )
    assert not both.shapes_equal
    assert both.cosine == pytest.approx(1)


def test_outputs_without_elements_are_equal():
    empty = np.zeros((0, 4), np.float32)
    assert _fidelity(_outputs(empty), _outputs(empty)).cosine == 1


def test_nothing_to_compare_is_refused():
    with pytest.raises(DataError, match="no batches"):
        fidelity(_run, _run, [])
