"""Where a training starts: the recipe, the example and the target become a session."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.backends import BACKENDS
from optkit.errors import BackendUnavailableError, LimitMissedError, RecipeError, UsageError
from optkit.passes.base import Batch, Context, TorchPass, Training
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.targets import Target
from optkit.targets import target as find_target
from optkit.training_session import TrainingSession

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch import nn

    from optkit.backends.base import Backend
    from optkit.bench import Speedup


def training(
    module: nn.Module,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    example: Batch | Iterable[Batch],
    steps: int = 0,
    loss: Callable[[Any, int], torch.Tensor] | None = None,
    teacher: nn.Module | None = None,
    assistants: Sequence[nn.Module] = (),
    dynamic_shapes: Sequence[str] | Mapping[str, Any] | None = None,
    target: str | Target | None = None,
    backend: str | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
) -> TrainingSession:
    """Attach the torch passes of a recipe to ``module``, for a training loop of the caller's.

    Args:
        module: Changed in place. Its parameters are to be on their final device.
        recipe: Name of a shipped recipe, file, mapping or recipe, with at least one pass over a torch module.
        example: Inputs of the module, a tensor, a tuple of positional ones or a mapping of named ones; or several batches of
            them. What it is traced and observed with; the same in every process of a distributed training.
        steps: Optimizer steps to come, which schedules are shares of.
        loss: ``loss(outputs, index of the batch in example)``, for pruning criteria that need gradients.
        teacher: The module to learn from, for distillation; the module itself as it is now, unless given.
        assistants: Modules between teacher and student, for progressive distillation.
        dynamic_shapes: Axes that stay free, as for ``optkit.compile``; without it the first one, as ``batch``, where all
            inputs share it and the example holds more than one.
        target: Hardware, which decides on number formats and on the widths worth keeping.
        overrides: ``key=value``, as ``--set``.

    Raises:
        RecipeError: The recipe has no pass over a torch module.
        BackendUnavailableError: torch, or what it needs to write graphs, is not installed.
        UsageError: There is no example, or the steps are negative.
        PassError: A pass has nothing to do.
    """
    missing = [p for p in ("torch", "onnxscript") if importlib.util.find_spec(p) is None]
    if missing:
        raise BackendUnavailableError(
            f"training needs {' and '.join(missing)}, which is not installed",
            hint="pip install 'optkit[torch]'",
        )
    from optkit.training_export import axes_of, draft, final, loaded

    plan = Recipe.load(recipe, overrides)
    if not any(isinstance(p, TorchPass) for p in plan.passes):
        raise RecipeError(
            "the recipe has no pass over a torch module, so there is nothing to train for",
            hint="optkit.compile carries it out; int8-qat, prune-structured and distil are recipes for training",
        )
    if steps < 0:
        raise UsageError(f"steps: {steps} is negative")
    batches = _batches(example)
    first = batches[0]
    dynamic = axes_of(first) if dynamic_shapes is None else dynamic_shapes
    where = target if isinstance(target, Target) else find_target(target or plan.target or "cpu")
    engine = BACKENDS[backend or plan.backend or where.backends[0]]
    number = plan.seed if seed is None else seed
    graph_context = Context(target=where, placements=engine.placements, seed=number)

    def clean(model: ir.Model) -> ir.Model:
        model = loaded(model)
        exact = itertools.takewhile(lambda p: p.exact, plan.graph_passes)
        run_passes(model, tuple(exact), graph_context)
        return model

    context = replace(
        graph_context,
        training=Training(
            batches=batches,
            steps=steps,
            export=lambda m: draft(m, first, dynamic),
            load=loaded,
            clean=clean,
            narrow=partial(_narrow, first, graph_context, engine),
            race=partial(_race, first, graph_context, engine),
            loss=loss,
            teacher=teacher,
            assistants=tuple(assistants),
        ),
    )
    return TrainingSession(module, plan, where, context, lambda m: final(m, first, dynamic))


def need_torch() -> None:
    """Refuse where torch, or what it needs to write graphs, is not installed.

    Raises:
        BackendUnavailableError: Says what is missing.
    """
    missing = [p for p in ("torch", "onnxscript") if importlib.util.find_spec(p) is None]
    if missing:
        raise BackendUnavailableError(
            f"training needs {' and '.join(missing)}, not installed here", hint="pip install 'optkit[torch]'"
        )


def _narrow(
    batch: Batch,
    context: Context,
    engine: type[Backend],
    model: ir.Model,
    found: Any,
    groups: Any,
    importance: Any,
    *,
    wanted: float,
    **limits: Any,
) -> set[int]:
    """What ``narrow`` finds for the first batch, or an error."""
    from optkit.compilation import available
    from optkit.narrowing import narrow
    from optkit.passes.nested import feeds

    with tempfile.TemporaryDirectory(prefix="optkit-") as folder:
        result = narrow(
            model, found, groups, importance, [feeds(model, batch)], context, available(engine.name), Path(folder), wanted=wanted, **limits
        )  # fmt: skip
    if not result.reached:
        raise LimitMissedError(
            f"{wanted:g}x was asked for, and the narrowest widths reach {result.measured.ratio:.2f}x, measured",
            hint="lower speedup or least",
        )
    return set(result.gone)


@contextlib.contextmanager
def _race(
    batch: Batch, context: Context, engine: type[Backend], whole: ir.Model
) -> Iterator[Callable[[ir.Model], Speedup]]:
    """``Trial`` on the first batch.

    Raises:
        BackendUnavailableError: The target is not this machine.
    """
    from optkit.compilation import available
    from optkit.narrowing import Trial, check_measurable
    from optkit.passes.nested import feeds

    backend = available(engine.name)
    check_measurable(context.target, backend)
    with tempfile.TemporaryDirectory(prefix="optkit-") as folder:
        yield Trial(whole, [feeds(whole, batch)], context, backend, Path(folder)).race


def _batches(example: Any) -> list[Batch]:
    import torch

    def one(batch: Any) -> Batch:
        if isinstance(batch, torch.Tensor):
            return (batch,)
        return batch if isinstance(batch, Mapping) else tuple(batch)

    single = isinstance(example, torch.Tensor | tuple | Mapping)
    found = [one(example)] if single else [one(b) for b in example]
    if not found or not found[0]:
        raise UsageError("no example inputs", hint="give example=(x,), one tuple of positional inputs")
    return found
