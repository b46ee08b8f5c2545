"""Accuracy by the user's own metric, compared sample by sample, with an interval that says how sure it is."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from optkit.data import TensorSpec, validate
from optkit.errors import DataError, OptkitError, UsageError

if TYPE_CHECKING:
    from optkit.backends.base import Session

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
Verdict = Literal["met", "missed", "inconclusive"]

# Resamples of the bootstrap: its 2.5 % tails then rest on 25 draws each.
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Samples and a score.

    Attributes:
        samples: Called anew for each evaluation; yields ``(feeds, label)``.
        score: ``score(outputs, label)``: higher is better. Any value, where ``aggregate`` is given.
        aggregate: ``aggregate(scores) -> float``; None means the mean.
        metric: What the number is called.
    """

    samples: Callable[[], Iterable[tuple[Mapping[str, np.ndarray], Any]]]
    score: Callable[[dict[str, np.ndarray], Any], Any]
    aggregate: Callable[[Sequence[Any]], float] | None = None
    metric: str = "score"

    @staticmethod
    def load(path: str | Path) -> Evaluator:
        """Read an evaluator file: ``samples``, ``score``, and optionally ``aggregate`` and ``METRIC``.

        Raises:
            UsageError: The file is missing, does not run, or lacks a function.
        """
        path = Path(path)
        module = load_python(path, "evaluator")
        missing = [name for name in ("samples", "score") if not callable(getattr(module, name, None))]
        if missing:
            raise UsageError(
                f"{path}: the evaluator does not define {' and '.join(f'{m}()' for m in missing)}",
                hint="define samples() yielding (feeds, label), and score(outputs, label) -> float, higher is better",
            )
        return Evaluator(
            samples=module.samples,
            score=module.score,
            aggregate=getattr(module, "aggregate", None),
            metric=str(getattr(module, "METRIC", path.stem)),
        )

    def scores(self, run: Run, *, progress: Callable[[], None] = lambda: None) -> list[Any]:
        """One score a sample, in order.

        Raises:
            DataError: There are no samples, a score is not a finite number, or the evaluator's code fails.
        """
        return [score for score in self.stream(run, progress=progress)]

    def stream(self, run: Run, *, progress: Callable[[], None] = lambda: None) -> Iterator[Any]:
        """Scores as they come."""
        for index, (feeds, label) in enumerate(self.pairs()):
            outputs = run(feeds)
            with self._own_code(f"score() of sample {index}", outputs):
                score = self.score(outputs, label)
            if self.aggregate is None and not (
                isinstance(score, int | float | np.number | np.bool_) and math.isfinite(score)
            ):
                raise DataError(
                    f"evaluator {self.metric}: the score of sample {index} is {_shown(score)}, not a finite number",
                    hint="score(outputs, label) gives one float, higher is better",
                )
            progress()
            yield score

    def pairs(self) -> Iterator[tuple[Mapping[str, np.ndarray], Any]]:
        """The samples, one by one.

        Raises:
            DataError: There are none, one is not a pair, or the evaluator's code fails.
        """
        with self._own_code("samples()"):
            samples = iter(self.samples())
        for index in itertools.count():
            with self._own_code(f"samples() at sample {index}"):
                sample = next(samples, None)
            if sample is None and index == 0:
                raise DataError(f"evaluator {self.metric}: samples() yields nothing")
            if sample is None:
                return
            if not (isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], Mapping)):
                raise DataError(f"evaluator {self.metric}: sample {index} is not a pair (feeds, label)")
            yield sample

    def checked(self, inputs: Sequence[TensorSpec]) -> Evaluator:
        """The same, with the feeds of every sample checked against the model's inputs and brought to their types."""

        def samples() -> Iterator[tuple[Mapping[str, np.ndarray], Any]]:
            for index, (feeds, label) in enumerate(self.pairs()):
                yield validate(feeds, inputs, where=f"evaluator {self.metric}: sample {index}"), label

        return replace(self, samples=samples)

    @contextlib.contextmanager
    def _own_code(self, what: str, outputs: Mapping[str, np.ndarray] | None = None) -> Iterator[None]:
        """The user's own code runs inside and may raise anything; the message must say that it was theirs, and where.

        Args:
            outputs: What it is given: where it asks for another, the hint names these.
        """
        try:
            yield
        except OptkitError:
            raise
        except Exception as error:
            files = {
                getattr(getattr(f, "__code__", None), "co_filename", None)
                for f in (self.score, self.aggregate)
            }
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
            place = f", line {lines[-1]}" if lines else ""
            raise DataError(
                f"evaluator {self.metric}: {what}{place}: {type(error).__name__}: {error}",
                hint=_lacking(error, outputs),
            ) from error

    def total(self, scores: Sequence[Any]) -> float:
        """The metric of all scores."""
        if self.aggregate is None:
            return float(np.mean(scores))
        with self._own_code("aggregate()"):
            return float(self.aggregate(scores))


def _shown(score: object) -> str:
    """A score in few characters."""
    shape = getattr(score, "shape", ())
    return f"an array of shape {list(shape)}" if len(shape) else textwrap.shorten(repr(score), 80)


def _lacking(error: Exception, outputs: Mapping[str, np.ndarray] | None) -> str | None:
    """What the outputs are, where one was asked for that is not among them."""
    if outputs is None or not isinstance(error, KeyError) or not error.args or error.args[0] in outputs:
        return None
    return f"the outputs are {', '.join(outputs)}"


def admitted(session: Session) -> Run:
    """Runs what the artifact itself could run, where a session that stands in for it would run more."""

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        session.admit(feeds)
        return session.run(feeds)

    return run


def load_python(path: Path, what: str) -> ModuleType:
    """Run a Python file that the user named; what it imports from its own folder is found.

    Raises:
        UsageError: It does not exist or raises.
    """
    if not path.is_file():
        raise UsageError(f"{what} {path}: no such file", hint=f"give the Python file that defines the {what}")
    name = f"optkit_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{what} {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # As with `python file.py`, modules beside the file can be imported, also later, from inside a function.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{what} {path}: {type(error).__name__}: {error}") from error
    return module


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much of the metric may be lost.

    Attributes:
        amount: 0.01 for one percent, or for 0.01 points of the metric.
        relative: Whether ``amount`` is a share of the reference's metric.
    """

    amount: float
    relative: bool

    @staticmethod
    def parse(text: str | float | Budget) -> Budget:
        """``"1%"`` is relative, ``0.01`` absolute.

        Raises:
            UsageError: Not a number, or negative.
        """
        if isinstance(text, Budget):
            return text
        shown = str(text).strip()
        try:
            amount = float(shown.removesuffix("%")) / (100 if shown.endswith("%") else 1)
        except ValueError:
            amount = math.nan
        if not (math.isfinite(amount) and amount >= 0):
            raise UsageError(
                f"max-drop {shown!r} is neither a percentage nor a number",
                hint="write 1% (of the reference's metric) or 0.01 (absolute)",
            )
        return Budget(amount=amount, relative=shown.endswith("%"))

    def absolute(self, reference: float) -> float:
        """The budget in units of the metric."""
        return self.amount * abs(reference) if self.relative else self.amount

    def __str__(self) -> str:
        return f"{self.amount * 100:g}%" if self.relative else f"{self.amount:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Reference against candidate on the same samples.

    Attributes:
        drop: ``reference - candidate``, in units of the metric; negative where the candidate is better.
        ci95: 95 % interval of the drop.
        n: Samples.
        method: How the interval was made.
        verdict: Against the budget, or None without one.
        needed: About how many samples would decide an inconclusive verdict.
        constant: Every sample scored the same for both, and that is not the 1 of a right answer: the score may not look at
            the outputs, and more of the same samples decide nothing.
    """

    metric: str
    reference: float
    candidate: float
    drop: float
    ci95: tuple[float, float]
    n: int
    method: str
    budget: str | None = None
    verdict: Verdict | None = None
    needed: int | None = None
    constant: bool = False


def compare(
    evaluator: Evaluator,
    reference: Sequence[Any],
    candidate: Sequence[Any],
    budget: Budget | None,
    *,
    seed: int = 0,
) -> Comparison:
    """Judge ``candidate`` by paired scores.

    The interval is, for right-or-wrong scores, the adjusted interval of Agresti and Min (2005, Statistics in Medicine
    24:729-740: half an observation is added to each cell of the 2x2 table, so that no difference seen in few samples is
    not taken for certainty); for other scores Student's t of the paired differences; and for metrics with an
    ``aggregate`` the percentiles of a bootstrap that draws the same samples for both, moved so that their median is the
    drop that was seen.

    Raises:
        DataError: The two have different numbers of samples.
    """
    if len(reference) != len(candidate):
        raise DataError(
            f"evaluator {evaluator.metric}: {len(reference)} samples the first time, {len(candidate)} the second",
            hint="samples() must yield the same samples each time",
        )
    constant = False
    before, after, n = evaluator.total(reference), evaluator.total(candidate), len(reference)
    if not math.isfinite(before):
        raise DataError(f"evaluator {evaluator.metric}: aggregate() gives {before} for the reference")
    # A metric that the candidate makes undefined, a correlation of constants say, is lost altogether.
    drop = before - after if math.isfinite(after) else math.inf
    if evaluator.aggregate is not None:
        method, interval = "paired bootstrap", _bootstrap(evaluator, reference, candidate, drop, seed)
    else:
        x, y = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
        constant = bool(n > 1 and x[0] != 1 and (x == x[0]).all() and (y == x[0]).all())
        if np.isin(x, (0, 1)).all() and np.isin(y, (0, 1)).all():
            method, interval = "Agresti-Min", _matched_proportions(x, y)
        else:
            method, interval = "paired t", _paired_t(x - y)
    low, high = min(interval[0], drop), max(interval[1], drop)
    verdict: Verdict | None = None
    needed = None
    if budget is not None:
        limit = budget.absolute(before)
        slack = 1e-12 * max(1.0, abs(before))
        verdict = "met" if high <= limit + slack else "missed" if drop > limit + slack else "inconclusive"
        if verdict == "inconclusive" and not constant and limit > drop and math.isfinite(high):
            needed = math.ceil(n * ((high - drop) / (limit - drop)) ** 2)
    return Comparison(
        metric=evaluator.metric, reference=before, candidate=after, drop=drop, ci95=(low, high), n=n, method=method,
        budget=None if budget is None else str(budget), verdict=verdict, needed=needed, constant=constant,
    )  # fmt: skip


def _matched_proportions(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    n = len(x) + 2.0
    worse, better = float(((x == 1) & (y == 0)).sum()) + 0.5, float(((x == 0) & (y == 1)).sum()) + 0.5
    center = (worse - better) / n
    half = 1.959964 * math.sqrt(max(worse + better - (worse - better) ** 2 / n, 0.0)) / n
    return center - half, center + half


def _paired_t(difference: np.ndarray) -> tuple[float, float]:
    n, mean = len(difference), float(difference.mean())
    if n < 2:
        return -math.inf, math.inf
    half = _student(n - 1) * float(difference.std(ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def _student(freedom: int) -> float:
    """97.5th percentile of Student's t (Cornish-Fisher expansion, Abramowitz and Stegun 26.7.5; exact for 1 and 2)."""
    if freedom <= 2:
        return (12.706205, 4.302653)[freedom - 1]
    z = 1.959964
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / float(freedom) ** power for power, term in enumerate(terms))


def _bootstrap(
    evaluator: Evaluator, reference: Sequence[Any], candidate: Sequence[Any], drop: float, seed: int
) -> tuple[float, float]:
    rng, n = np.random.default_rng(seed), len(reference)
    drops = []
    for _ in range(_RESAMPLES):
        chosen = rng.integers(n, size=n)
        before = _resampled(evaluator, [reference[i] for i in chosen])
        if math.isfinite(before):
            after = _resampled(evaluator, [candidate[i] for i in chosen])
            drops.append(before - after if math.isfinite(after) else math.inf)
    if len(drops) < _RESAMPLES / 2:
        return -math.inf, math.inf
    # Without interpolation, which has no answer between two infinite drops.
    low, high = np.percentile(drops, 2.5, method="lower"), np.percentile(drops, 97.5, method="higher")
    # Samples that are drawn twice make some metrics easier: fewer different documents to tell apart. What resampling shifts,
    # the interval is shifted back by.
    shift = drop - float(np.median(drops))
    return (float(low) + shift, float(high) + shift) if math.isfinite(shift) else (float(low), float(high))


def _resampled(evaluator: Evaluator, scores: Sequence[Any]) -> float:
    """The metric, or NaN where these samples do not define it: the area under a curve of one class, say."""
    try:
        return evaluator.total(scores)
    except DataError:
        return math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How close the candidate's outputs are to the fp32 reference's on unseen inputs; never an accuracy.

    Attributes:
        cosine: Smallest, over the float outputs, of the mean over batches of the cosine; 0 where one is no longer finite.
            For a model with integer outputs alone, the share of them that are equal.
        sqnr: Signal to quantization noise, dB, smallest over the float outputs.
        agreement: Share of rows along the last axis with the same largest element, and of equal integers; None for
            outputs that have neither.
        n: Batches.
        largest: Largest difference in a float output, as a share of the range of the reference's in that batch.
        shapes_equal: Whether all shapes were equal; where not, the other numbers cover the outputs that were.
    """

    cosine: float
    sqnr: float
    agreement: float | None
    n: int
    largest: float
    shapes_equal: bool


def fidelity(reference: Run, candidate: Run, batches: Iterable[Mapping[str, np.ndarray]]) -> Fidelity:
    """Run both on every batch and compare output by output.

    Raises:
        DataError: There is no batch, or no number in all that the reference computes.
    """
    cosines: dict[str, list[float]] = {}
    equal: list[float] = []
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    same = rows = n = numbers = missing = 0
    largest, shapes_equal = 0.0, True
    for feeds in batches:
        n += 1
        expected, found = reference(feeds), candidate(feeds)
        for name, a in expected.items():
            b = found[name]
            if a.shape != b.shape:
                shapes_equal = False
                continue
            if not a.size:
                continue
            if a.dtype.kind != "f":
                numbers += a.size
                matches = int((a == b).sum())
                rows, same = rows + a.size, same + matches
                equal.append(matches / a.size)
                continue
            if a.ndim >= 2 and a.shape[-1] >= 2:
                rows, same = rows + math.prod(a.shape[:-1]), same + int((a.argmax(-1) == b.argmax(-1)).sum())
            x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
            finite = np.isfinite(x)
            numbers, missing = numbers + int(finite.sum()), missing + int((~finite).sum())
            # Masks and padding may be infinite or NaN: as long as they stay so, the other values count.
            kept = np.array_equal(x[~finite], y[~finite], equal_nan=True) and bool(
                np.isfinite(y[finite]).all()
            )
            x, y = (x[finite], y[finite]) if kept else (x[finite], np.full(finite.sum(), np.nan))
            if x.size and not np.array_equal(x, y):
                # What is constant in the batch is held against its size.
                apart, size = float(np.abs(x - y).max()), float(np.ptp(x)) or float(np.abs(x).max())
                largest = max(largest, apart / size if size and math.isfinite(apart) else math.inf)
            norm = float(np.linalg.norm(x) * np.linalg.norm(y))
            alike = float(np.array_equal(x, y)) if not norm else float(x @ y) / norm
            cosines.setdefault(name, []).append(alike)
            signal[name] = signal.get(name, 0.0) + float(x @ x)
            noise[name] = noise.get(name, 0.0) + float((x - y) @ (x - y))
    if not n:
        raise DataError("there are no batches to compare the outputs on")
    if missing and not numbers:
        raise DataError(
            "all that the reference computes is NaN or infinite: there is nothing to compare",
            hint="--calib DATA gives inputs from which it computes numbers",
        )
    ratio = [_decibels(signal[name], noise[name]) for name in signal]
    # Where all outputs are integers, class numbers say, the share of equal ones takes the place of the cosine.
    means = [float(np.mean(c)) for c in cosines.values()] or [float(np.mean(equal)) if equal else 1.0]
    cosine = min(means) if all(map(math.isfinite, means)) and (shapes_equal or cosines or equal) else 0.0
    return Fidelity(
        cosine=cosine, sqnr=min(ratio, default=200.0), agreement=same / rows if rows else None, n=n, largest=largest, shapes_equal=shapes_equal,
    )  # fmt: skip


def _decibels(signal: float, noise: float) -> float:
    """SQNR, with 200 dB standing for no noise at all."""
    if noise == 0:
        return 200.0
    return (
        -200.0
        if signal == 0 or not math.isfinite(noise)
        else max(-200.0, min(200.0, 10 * math.log10(signal / noise)))
    )
