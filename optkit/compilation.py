"""One model on its way to one target: building, timing and judging candidates."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from optkit.backends import BACKENDS
from optkit.bench import Speedup, race, speedup
from optkit.candidate import Built
from optkit.data import CalibrationData, specs
from optkit.errors import BackendUnavailableError, DataError
from optkit.evaluate import Budget, Comparison, Evaluator, admitted, compare, fidelity
from optkit.freshness import Trial, check, trials
from optkit.frontend import Loaded
from optkit.graph import walk, weight_bytes
from optkit.legalize import has_doubles, legalize
from optkit.passes.base import Context, Pass, Progress
from optkit.pipeline import run_passes
from optkit.planning import estimate
from optkit.readback import saturation, scheme, weight_bytes_by_type
from optkit.recipe import Limits, Recipe
from optkit.reference import LARGE, ReferenceSession, trial_batches, unsound
from optkit.report import PassRecord
from optkit.targets import Target

if TYPE_CHECKING:
    from optkit.backends.base import Backend, Executed, Session

# Smallest, usual and largest size of an axis.
Span = tuple[int, int, int]
# Batches that timing and the smoke run take in turn.
_TIMED_BATCHES = 4


def available(name: str) -> Backend:
    """The backend called ``name``, ready to work.

    Raises:
        BackendUnavailableError: It can't work on this machine; says what is missing.
    """
    engine: Backend = BACKENDS[name]()
    if (reason := engine.available()) is not None:
        raise BackendUnavailableError(f"backend {engine.name}: {reason}")
    return engine


class Compilation:
    """One model on its way to one target: what building, timing and judging candidates share.

    The reference is ONNX Runtime, fp32, with its default settings, on the file as it was given.

    Attributes:
        wanted: Sizes that the backend's options give to free axes.
        given: All calibration batches; ``data`` are those that passes may see, ``held_out`` the others.
        inputs: What fidelity is measured on, in words.
        evaluation_seconds: CPU time that the evaluator took for the reference.
    """

    def __init__(
        self,
        loaded: Loaded,
        target: Target,
        backend: Backend,
        data: CalibrationData | None,
        evaluator: Evaluator | None,
        *,
        seed: int,
        folder: Path,
        progress: Progress,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        chosen = backend.options.model_validate(options or {})
        self.wanted = dict(backend.sizes(loaded.model, chosen))
        self._fed = partial(backend.fed, chosen)
        self.loaded, self.target, self.backend, self.evaluator = loaded, target, backend, evaluator
        self.seed, self.folder, self.progress = seed, folder, progress
        if data is not None and data.random:
            data = data.mapped(partial(self._fed, drawn=True))
        data = None if data is None else data.remembered()
        self.given = self.data = self.held_out = data
        self.inputs = "calibration data"
        # With an evaluator too, so that what it is for does not change what is built.
        if data is not None and len(data) >= 4:
            self.data, self.held_out = data.split()
            self.inputs = "held-out calibration data"
        if data is None or data.random:
            self.inputs = "inputs drawn from the input specification"
        if data is None and loaded.examples and not self.wanted:
            self.inputs = "example inputs"
        self._cleaned: dict[str, tuple[ir.Model, list[PassRecord], dict[str, float], dict[Any, Any]]] = {}
        self._built = 0
        self.evaluation_seconds = 0.0
        self._engines = {backend.name: backend}

    @cached_property
    def unseen(self) -> CalibrationData:
        """Inputs that calibration does not see: held-out batches, or inputs drawn from the input specification.

        Raises:
            DataError: The reference runs with none of the sizes tried for the free axes of drawn inputs.
        """
        if self.held_out is not None:
            return self.held_out
        if self.loaded.examples and not self.wanted:
            examples = [self._fed(feeds, drawn=False) for feeds in self.loaded.examples]
            return CalibrationData(examples, name="example inputs").check(self.loaded.model)
        found = trial_batches(self.loaded.model, 4, seed=self.seed, sizes=self.wanted, run=self.reference.run)
        return found.mapped(partial(self._fed, drawn=True))

    @property
    def repeatable(self) -> bool:
        """Whether the reference gives the same outputs for the same inputs; a model that draws random numbers does not."""
        first = self.trials[0]
        return first.steady == first.expected.keys()

    def engine(self, recipe: Recipe) -> Backend:
        """The backend that ``recipe`` names, else the one of the compilation."""
        name = recipe.backend or self.backend.name
        if name not in self._engines:
            self._engines[name] = available(name)
        return self._engines[name]

    def resolved(self, recipe: Recipe) -> tuple[Backend, Any]:
        """The backend of ``recipe``, and the recipe's options as that backend's own type."""
        engine = self.engine(recipe)
        return engine, engine.options.model_validate(recipe.options)

    @cached_property
    def reference(self) -> ReferenceSession:
        """The session that everything is held against."""
        return ReferenceSession(
            self.loaded.original,
            large=weight_bytes(self.loaded.model) > LARGE,
            disabled=unsound(self.loaded.model),
            precise=not self.target.saturates,
        )

    @property
    def reference_scores(self) -> list[Any]:
        """The evaluator's scores of the reference, once."""
        return self._judged[0]

    @cached_property
    def _judged(self) -> tuple[list[Any], list[dict[str, tuple[int, ...]]]]:
        """Scores of the reference, and the shapes of the samples."""
        assert self.evaluator is not None
        shapes = []

        def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            shapes.append({name: array.shape for name, array in feeds.items()})
            return self.reference.run(feeds)

        start = time.process_time()
        with self.progress.task("evaluate reference") as task:
            scores = self.evaluator.scores(run, progress=task.advance)
        self.evaluation_seconds = time.process_time() - start
        return scores, shapes

    @cached_property
    def feeds(self) -> list[dict[str, np.ndarray]]:
        """What timing runs on: the first batches of the data at hand."""
        source: Iterable[Mapping[str, np.ndarray]]
        if self.data is not None:
            source = self.data
        elif self.evaluator is not None:
            source = (feeds for feeds, _ in self.evaluator.pairs())
        else:
            source = self.unseen
        feeds = [dict(batch) for batch, _ in zip(source, range(_TIMED_BATCHES), strict=False)]
        if not feeds:
            raise DataError("there are no batches to run")
        return feeds

    @cached_property
    def usual_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the inputs in more than half of the batches that calibrate; None where there are no such."""
        if self.data is None or self.data.random:
            return None
        seen = Counter(tuple((k, v.shape) for k, v in sorted(batch.items())) for batch in self.data)
        shapes, count = seen.most_common(1)[0]
        return dict(shapes) if count * 2 > len(self.data) else None

    @cached_property
    def sizes(self) -> Mapping[str, Sequence[Span]]:
        """Smallest, median and largest size of every axis in all batches, held out or not, by input; empty without such."""
        if self.given is None or self.given.random:
            return {}
        return _spans({name: array.shape for name, array in batch.items()} for batch in self.given)

    @cached_property
    def all_sizes(self) -> Mapping[str, Sequence[Span]]:
        """The same with what the evaluator's samples have; usual is what is in the data."""
        found = self.sizes
        if self.evaluator is None:
            return found
        judged = _spans(self._judged[1])
        return judged | {
            name: [(min(a[0], b[0]), a[1], max(a[2], b[2])) for a, b in zip(axes, judged[name], strict=True)]
            for name, axes in found.items()
        }

    @cached_property
    def probes(self) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
        """A few inputs that calibration has not seen, and what the reference gives for them."""
        evaluator = self.evaluator
        source = self.unseen if evaluator is None else (feeds for feeds, _ in evaluator.pairs())
        feeds = [dict(batch) for batch, _ in zip(source, range(_TIMED_BATCHES), strict=False)]
        return feeds, [self.reference.run(batch) for batch in feeds]

    @cached_property
    def trials(self) -> list[Trial]:
        """What every candidate must get through before it is timed."""
        inputs, outputs = specs(self.loaded.model)
        return trials(self.reference.run, inputs, self.feeds, outputs)

    def context(self, engine: Backend, memo: dict[Any, Any]) -> Context:
        """What passes get to know."""
        return Context(
            target=self.target,
            data=self.data,
            placements=engine.placements,
            seed=self.seed,
            progress=self.progress,
            memo=memo,
        )

    def prepare(
        self, passes: Sequence[Pass]
    ) -> tuple[ir.Model, list[PassRecord], dict[str, float], dict[Any, Any]]:
        """A copy of the model after ``passes``, which are exact; carried out once for all recipes that start alike."""
        key = repr([(p.name, p.model_dump()) for p in passes])
        if key not in self._cleaned:
            model = self.loaded.model.clone()
            records, seconds = run_passes(model, passes, self.context(self.backend, {}))
            self._cleaned[key] = (model, records, seconds, {})
        model, records, seconds, memo = self._cleaned[key]
        return model.clone(), list(records), dict(seconds), memo

    @property
    def notes(self) -> tuple[str, ...]:
        """What loading did, what is computed otherwise, and what could not be compared."""
        found = list(self.loaded.notes)
        if self.backend.doubles_in_floats and has_doubles(self.loaded.model):
            found.append("what it computes in float64 is computed in float32")
        if self.evaluator is None and not self.repeatable:
            found.append("it draws random numbers, so its outputs were not compared with the reference's")
        return tuple(found)

    def exact(self, recipe: Recipe) -> tuple[Pass, ...]:
        """The passes of ``recipe`` before the first that changes numbers."""
        return tuple(itertools.takewhile(lambda p: p.exact, recipe.passes))

    def transform(self, recipe: Recipe) -> tuple[ir.Model, list[PassRecord], dict[str, float]]:
        """The graph after the recipe's passes."""
        exact = self.exact(recipe)
        model, records, seconds, memo = self.prepare(exact)
        more, times = run_passes(model, recipe.passes[len(exact) :], self.context(self.engine(recipe), memo))
        for name, value in times.items():
            seconds[name] = seconds.get(name, 0.0) + value
        return model, [*records, *more], seconds

    def build(self, name: str, recipe: Recipe) -> Built:
        """Carry ``recipe`` out in a fresh folder, load what was written, and run it at several shapes.

        Raises:
            ModelError: The written file does not load or run, or an output is missing, stale or wrong.
        """
        with self.progress.task(f"build {name}"):
            model, records, seconds = self.transform(recipe)
        engine, given = self.resolved(recipe)
        legalize(model, engine, self.target, name=self.loaded.name)
        self._built += 1
        folder = self.folder / f"{self._built:03d}-{name}"
        folder.mkdir()
        options = engine.fit(given, self.usual_shapes)
        if sizes := self.all_sizes if engine.fixes else self.sizes:
            options = engine.span(model, options, sizes)
        recipe = recipe.model_copy(
            update={
                "options": options.model_dump(mode="json"),
                "target": self.target.name,
                "backend": engine.name,
            }
        )
        engine.lower(model, self.target, options, folder)
        lossy = engine.exact(options) != options or any(
            r.changes for r, p in zip(records, recipe.passes, strict=True) if not p.exact
        )
        size = engine.size(folder)
        built = Built(
            name=name,
            recipe=recipe,
            folder=folder,
            records=records,
            seconds=seconds,
            bytes=size,
            lossy=lossy,
            scheme=scheme(model),
            weights=engine.weights(folder) or weight_bytes_by_type(model),
            rounds=any(n.op_type == "QuantizeLinear" for n in walk(self.loaded.model)),
            narrows=engine.narrows(options),
            saturation=saturation(model, self.target, engine),
        )
        with self.session(built) as session:
            first, *others = self.trials
            fitting = [first, *(t for t in others if session.takes(t.feeds))]
            check(session.run, fitting, name=name, lossy=built.differs)
        if not self.target.runs_here:
            shapes = {name: array.shape for name, array in self.feeds[0].items()}
            if self.data is None or self.data.random:
                # What was drawn is as small as it may be.
                shapes |= engine.usual(model, options)
            built.estimate = engine.estimate(model, self.target, options) or estimate(
                model, self.target, shapes
            )
        return built

    def session(self, built: Built, threads: int = 1) -> Session:
        """Open what was built, on one thread unless said otherwise."""
        engine, options = self.resolved(built.recipe)
        return engine.predict(built.folder, self.target, options, threads=threads)

    def finishes(self, built: Built) -> bool:
        """Whether what is left to do on the device is done now, because it is at hand."""
        engine, options = self.resolved(built.recipe)
        return engine.finishes(options)

    def measure(self, built: Built, *, rounds: int, budget: float, hopeless: float = 0.0) -> Speedup | None:
        """Time ``built`` in turn with the reference, briefly where it is ``hopeless``; None for a target that is not at hand."""
        if not self.target.runs_here:
            return None
        with self.progress.task(f"time {built.name}"), self.session(built) as session:
            return speedup(
                self.reference.run, session.run, self.feeds, rounds=rounds, budget=budget, seed=self.seed, hopeless=hopeless
            )  # fmt: skip

    def race(self, built: Sequence[Built], *, rounds: int, budget: float) -> list[Speedup]:
        """Time several that run here in turn with one another and the reference."""
        with (
            self.progress.task(f"time {' and '.join(dict.fromkeys(b.name for b in built))}"),
            ExitStack() as stack,
        ):
            runs = [stack.enter_context(self.session(b)).run for b in built]
            return race(self.reference.run, runs, self.feeds, rounds=rounds, budget=budget, seed=self.seed)

    def closeness(self, built: Built) -> float:
        """SQNR in dB of the outputs on a few unseen inputs: cheap, and enough to prefer one of two that are as fast."""
        feeds, answers = self.probes
        expected = iter(answers)
        with self.session(built) as session:
            return fidelity(lambda _: next(expected), session.run, feeds).sqnr

    def judge(self, built: Built, limits: Limits) -> None:
        """Fill in accuracy where there is an evaluator, else fidelity."""
        if self.evaluator is None and not self.repeatable:
            return
        with self.session(built) as session:
            if self.evaluator is not None:
                budget = None if limits.max_drop is None else Budget.parse(limits.max_drop)
                built.accuracy = self._accuracy(built, session, budget)
            else:
                built.fidelity = fidelity(self.reference.run, session.run, self.unseen)

    def _accuracy(self, built: Built, session: Session, budget: Budget | None) -> Comparison:
        evaluator, before = self.evaluator, self.reference_scores
        assert evaluator is not None
        after: list[Any] = []
        probe = max(32, len(before) // 5)
        with self.progress.task(f"evaluate {built.name}", len(before)) as task:
            for score in evaluator.stream(admitted(session), progress=task.advance):
                after.append(score)
                if len(after) == probe and budget is not None and probe < len(before):
                    early = compare(evaluator, before[:probe], after, budget, seed=self.seed)
                    if early.ci95[0] > 3 * budget.absolute(early.reference):
                        return early
        return compare(evaluator, before, after, budget, seed=self.seed)

    def executed(self, built: Built, feeds: Mapping[str, np.ndarray] | None = None) -> Sequence[Executed]:
        """What the runtime really ran, for the first inputs or for others."""
        engine, options = self.resolved(built.recipe)
        return engine.executed(built.folder, self.target, options, self.feeds[0] if feeds is None else feeds)


def _spans(batches: Iterable[Mapping[str, tuple[int, ...]]]) -> dict[str, list[Span]]:
    """Smallest, median and largest size of each axis, by input, of batches of such shapes."""
    seen: dict[str, list[tuple[int, ...]]] = {}
    for shapes in batches:
        for name, shape in shapes.items():
            seen.setdefault(name, []).append(shape)
    columns = {name: [sorted(axis) for axis in zip(*shapes, strict=True)] for name, shapes in seen.items()}
    return {name: [(c[0], c[len(c) // 2], c[-1]) for c in axes] for name, axes in columns.items()}
