"""What was asked for: arguments and recipes, resolved and checked before work begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from optkit.artifact import MANIFEST
from optkit.compilation import Compilation, available
from optkit.data import CalibrationData, specs
from optkit.errors import BackendUnavailableError, DataError, RecipeError, UnknownNameError, UsageError
from optkit.evaluate import Budget, Evaluator
from optkit.formats import Precision
from optkit.frontend import Loaded, is_torch, read
from optkit.passes.base import Context, Progress
from optkit.recipe import Goal, Recipe, shipped, validated
from optkit.reference import exchanged, trial_batches
from optkit.targets import Target
from optkit.targets import target as find_target

if TYPE_CHECKING:
    from optkit.backends.base import Backend

Batches = (
    CalibrationData
    | Iterable[Mapping[str, np.ndarray]]
    | Callable[[], Iterable[Mapping[str, np.ndarray]]]
    | str
    | Path
)
# Batches of ``--calib random``.
_DRAWN = 16
# With an evaluator and no limit of the caller's: MLPerf's "99" class, so that a ruined metric never ships.
_MAX_DROP = "1%"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for: resolved, and checked as far as that is possible before work begins.

    Attributes:
        recipe: With the caller's options on top.
        data: Checked as it is read.
        candidates: Recipes to try, by name; empty where ``recipe`` itself says what to do.
        closed: Candidates that need calibration data, which is not there.
    """

    recipe: Recipe
    target: Target
    backend: Backend
    loaded: Loaded
    data: CalibrationData | None
    evaluator: Evaluator | None
    candidates: tuple[tuple[str, Recipe], ...]
    closed: tuple[str, ...]

    def work(self, folder: Path, progress: Progress) -> Compilation:
        """The compilation that carries this out in ``folder``."""
        return Compilation(
            self.loaded, self.target, self.backend, self.data, self.evaluator, seed=self.recipe.seed, folder=folder, progress=progress,
            options=self.recipe.options,
        )  # fmt: skip


def request(
    source: Any,
    *,
    inputs: Any = None,
    dynamic_shapes: Sequence[str] | Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    target: str | Target | None = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    precision: str | None = None,
    data: Batches | None = None,
    evaluate: Evaluator | str | Path | None = None,
    max_drop: str | float | None = None,
    backend: str | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    goal: str | None = None,
) -> Request:
    """Resolve and check the arguments of ``compile``; nothing is built.

    Raises:
        UsageError: The options, the recipe or the data do not fit.
        ModelError: The model cannot be read.
        BackendUnavailableError: A package is missing.
    """
    plan = _plan(recipe, precision, overrides, target, backend, max_drop, seed, goal)
    _refuse_training(plan, source)
    where = target if isinstance(target, Target) else find_target(plan.target or "cpu")
    engine = available(plan.backend or where.backends[0])
    _refuse_occupied(out)
    evaluator = Evaluator.load(evaluate) if isinstance(evaluate, str | Path) else evaluate
    if evaluator is not None and not isinstance(evaluator, Evaluator):
        raise UsageError(
            f"evaluate is a {type(evaluator).__name__}, not an Evaluator or a file that defines one",
            hint="give optkit.Evaluator(samples=..., score=...): samples() yields (feeds, label), score(outputs, label) -> float",
        )
    if evaluator is not None and plan.limits.max_drop is None:
        plan = plan.model_copy(update={"limits": plan.limits.model_copy(update={"max_drop": _MAX_DROP})})
    given = validated(engine.options, "options", plan.options)
    options = engine.settled(where, given)
    if options != given:
        plan = plan.model_copy(update={"options": options.model_dump(mode="json", exclude_unset=True)})
    candidates = _candidates(plan, engine, where)
    _refuse_floats_alone(plan, candidates, engine, where)
    if precision is not None and plan.backend in (None, backend) and not (engine.generic or plan.exact):
        raise UsageError(
            f"precision {precision!r}: no recipe makes it for {engine.name} and {where.name}",
            hint=_own(engine),
        )
    first = candidates[0][1] if candidates else plan
    engine.ready(where, validated(engine.options, "options", first.options))
    _refuse_missing_formats([r for _, r in candidates] or [plan], engine, where)
    needy = [name for name, r in candidates or (("recipe", plan),) if any(p.needs_data for p in r.passes)]
    floor = engine.fallback(where)
    # The floor is nothing that was asked for, unless it is no float32 and named among the candidates.
    wanted = len(candidates) - (floor == engine.floor or floor not in plan.candidates)
    if data is None and needy and len(needy) >= wanted:
        raise _lacks_data(plan, needy, engine)
    if plan.limits.max_drop is not None:
        Budget.parse(plan.limits.max_drop)
        if evaluator is None:
            raise UsageError(
                "max-drop needs an evaluator: without labels there is no metric to lose",
                hint="give --eval FILE, or limits.min_cosine for fidelity",
            )
    loaded = read(source, inputs=inputs, dynamic=dynamic_shapes, weights=weights)
    exchanged(loaded.model, loaded.name)
    batches = _batches(data, loaded, plan, engine)
    if evaluator is not None:
        evaluator = evaluator.checked(specs(loaded.model)[0])
    return Request(
        recipe=plan, target=where, backend=engine, loaded=loaded, data=batches, evaluator=evaluator,
        candidates=tuple((name, r) for name, r in candidates if data is not None or name not in needy),
        closed=tuple(needy) if data is None else (),
    )  # fmt: skip


def _refuse_training(plan: Recipe, source: Any) -> None:
    """Refuse recipes whose passes work on a module: compiling trains nothing."""
    passes = ", ".join(p.name for p in plan.passes if p.stage == "torch")
    if not passes:
        return
    if is_torch(source):
        raise RecipeError(
            f"{passes}: trains a module, and compile trains nothing",
            hint="optkit.training(module, recipe) in a loop of your own, or optkit.finetune; what they finish compiles",
        )
    named = (
        Path(source).name if isinstance(source, str | Path) else f"what was given ({type(source).__name__})"
    )
    raise RecipeError(
        f"{passes}: works on a PyTorch module, but {named} is already a graph",
        hint="remove the pass, or start from the module: optkit compile package.module:factory",
    )


def _refuse_occupied(out: Path | None) -> None:
    """Refuse to write over anything but an artifact or an empty folder."""
    if out is None or not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise UsageError(f"{out}: exists and is not an artifact", hint="choose another --out")


def _plan(
    recipe: str | Path | Mapping[str, Any] | Recipe | None,
    precision: str | None,
    overrides: Sequence[str],
    target: str | Target | None,
    backend: str | None,
    max_drop: str | float | None,
    seed: int | None,
    goal: str | None,
) -> Recipe:
    """The recipe with what the caller said on top of it."""
    if recipe is not None and precision is not None:
        raise UsageError(
            "a recipe and a precision were given",
            hint="leave one out; --set changes single options of a recipe",
        )
    where = target if isinstance(target, Target) else find_target(target or "cpu")
    named = recipe_for(precision, backend or where.backends[0]) if recipe is None else recipe
    plan = Recipe.load(named, overrides)
    if seed is not None and seed < 0:
        raise UsageError(f"seed {seed} is negative")
    name = target.name if isinstance(target, Target) else target
    if goal is not None and goal.lower() not in get_args(Goal):
        raise UnknownNameError("goal", goal, get_args(Goal))
    wanted = (("target", name), ("backend", backend), ("seed", seed), ("goal", goal and goal.lower()))
    changes: dict[str, Any] = {k: v for k, v in wanted if v is not None}
    if max_drop is not None:
        changes["limits"] = plan.limits.model_copy(update={"max_drop": str(max_drop)})
    return plan.model_copy(update=changes)


# The recipe that a precision stands for.
_RECIPES = {
    "fp32": "fp32",
    "fp16": "fp16",
    "fp8": "fp8",
    "int8": "int8",
    "int8-dyn": "int8-dynamic",
    "w4a16": "w4a16",
    "nvfp4": "tensorrt-nvfp4",
    "mxfp8": "tensorrt-mxfp8",
}


def recipe_for(precision: str | None, backend: str = "") -> str:
    """The shipped recipe that a precision stands for: the backend's own, where it has one and the usual tries no candidates.

    Raises:
        UsageError: No recipe makes it.
    """
    if precision is None or precision.strip().lower() == "auto":
        return "auto"
    wanted = Precision.parse(precision)
    name = _RECIPES.get(f"{wanted.base}{'-dyn' if wanted.dynamic else ''}")
    if name is None or wanted.group is not None or wanted.symmetric is not None:
        raise UsageError(
            f"precision {precision!r}: no backend of this version makes it",
            hint=f"available: {', '.join(_RECIPES)}; recipes: {', '.join(shipped())}",
        )
    own = f"{backend.lower()}-{name}"
    return own if own in shipped() and not Recipe.load(name).candidates else name


def _batches(data: Batches | None, loaded: Loaded, plan: Recipe, engine: Backend) -> CalibrationData | None:
    if data is None:
        return None
    if isinstance(data, str | Path) and str(data) == "random":
        sizes = engine.sizes(loaded.model, engine.options.model_validate(plan.options))
        found = trial_batches(loaded.model, _DRAWN, seed=plan.seed, sizes=sizes)
    elif isinstance(data, str | Path):
        found = CalibrationData.load(data, loaded.model, seed=plan.seed)
        found = found.check(loaded.model, loaded.axes) if loaded.axes else found
    else:
        given = data if isinstance(data, CalibrationData) else CalibrationData(data)
        found = given.check(loaded.model, loaded.axes)
    return found if plan.samples is None else found.limit(plan.samples)


def _candidates(plan: Recipe, engine: Backend, where: Target) -> list[tuple[str, Recipe]]:
    """The recipes that ``plan`` tries, with its own limits and options on top; the first is exact.

    A recipe for another backend keeps its own options; it is left out where the backend was asked for by name, or
    cannot serve the target.
    """
    shared = {
        "limits": plan.limits,
        "require": plan.require,
        "seed": plan.seed,
        "samples": plan.samples,
        "goal": plan.goal,
    }
    fallback = engine.fallback(where)
    found: list[tuple[str, Recipe]] = []
    for name in dict.fromkeys(fallback if name == "fp32" else name for name in plan.candidates):
        candidate = Recipe.load(name)
        if candidate.candidates:
            raise RecipeError(f"candidates: {name} has candidates itself", hint="name those instead")
        if candidate.backend is None and not engine.generic and not candidate.exact:
            continue
        if candidate.backend is None or candidate.backend.lower() == engine.name:
            options = {**candidate.options, **plan.options}
            validated(engine.options, f"{name}: options", options)
        elif plan.backend is None and candidate.backend.lower() in where.backends:
            options = candidate.options
        else:
            continue
        found.append((name, candidate.model_copy(update={**shared, "options": options})))
    if found and not found[0][1].exact:
        # What ships where nothing keeps the limits.
        floor = Recipe.load(fallback)
        floor = floor.model_copy(update={**shared, "options": {**floor.options, **plan.options}})
        found = [(fallback, floor), *((n, r) for n, r in found if n != fallback)]
    # A recipe for any backend and one for this backend may say the same.
    said = {repr((r.backend or engine.name, r.passes, r.options)): n for n, r in reversed(found)}
    return [(n, r) for n, r in found if n in said.values()]


def _refuse_floats_alone(
    plan: Recipe, candidates: Sequence[tuple[str, Recipe]], engine: Backend, where: Target
) -> None:
    """Refuse candidates that all quantize, but for the floor, where none of them is for the target: floats would ship in silence.

    Raises:
        UsageError: That is so; with the recipes that there are.
    """
    asked = [Recipe.load(name) for name in plan.candidates if name != "fp32"]
    if not asked or any(r.exact for r in asked) or not all(r.exact for _, r in candidates):
        return
    raise UsageError(
        f"none of {', '.join(n for n in plan.candidates if n != 'fp32')} is for {engine.name} and {where.name}",
        hint=_own(engine),
    )


def _own(engine: Backend) -> str:
    """What to ask a backend for."""
    own = [name for name in shipped() if (Recipe.load(name).backend or "").lower() == engine.name]
    return f"-r auto{', or -r with one of ' + ', '.join(own) if own else ''}"


def _refuse_missing_formats(recipes: Sequence[Recipe], engine: Backend, where: Target) -> None:
    """Refuse what is asked for where the target lacks the formats of all recipes that change numbers.

    Raises:
        BackendUnavailableError: It does; with the reason of the first.
    """
    context, refused = Context(target=where, placements=engine.placements), list[BackendUnavailableError]()
    wanted = [r for r in recipes if not r.exact]
    for recipe in wanted:
        for step in recipe.passes:
            try:
                step.refuse(context)
            except BackendUnavailableError as error:
                error.args = (f"{step.name}: {error}",)
                refused.append(error)
                break
    if refused and len(refused) == len(wanted):
        raise refused[0]


def _lacks_data(plan: Recipe, needy: Sequence[str], engine: Backend) -> DataError:
    name = next((p.name for p in plan.passes if p.needs_data), needy[-1])
    dynamic = engine.generic or f"{engine.name}-int8-dynamic" in shipped()
    other = ", or use --precision int8-dyn, which needs none" if dynamic else ""
    return DataError(
        f"{name} needs calibration data",
        hint=f"give --calib FOLDER (or data=){other}; --calib random is for trying things out",
    )
