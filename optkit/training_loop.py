"""A ready training loop around a session, for those who have none of their own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optkit.errors import UsageError
from optkit.passes.base import Progress, Silent
from optkit.progress import on
from optkit.training_session import Trained
from optkit.training_start import need_torch, training

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How ``finetune`` trains.

    Attributes:
        epochs: Runs over the loader.
        optimizer: ``adamw`` or ``sgd`` (momentum 0.9, Nesterov).
        learning_rate: The highest one.
        weight_decay: Of weights with two axes or more.
        warmup: Share of the steps in which the learning rate rises from 0; afterwards it falls to 0 along a cosine.
        autocast: Type of the products in the forward pass, or None for the module's own.
        clip: Largest norm of all gradients together, or None.
        patience: Epochs without a better ``evaluate`` after which it stops, or None; the best epoch is kept.
        checkpoint: File to write after each epoch and to resume from where it exists, or None.
    """

    epochs: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    autocast: Literal["bf16", "fp16"] | None = None
    clip: float | None = None
    patience: int | None = None
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UsageError(f"epochs: {self.epochs} is less than 1")
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate: {self.learning_rate} is not positive")
        if not 0 <= self.warmup <= 1:
            raise UsageError(f"warmup: {self.warmup} is not a share of the steps, from 0 to 1")
        if self.optimizer not in ("adamw", "sgd"):
            raise UsageError(f"optimizer: {self.optimizer!r} is not known", hint="adamw or sgd")
        if self.autocast not in (None, "bf16", "fp16"):
            raise UsageError(f"autocast: {self.autocast!r} is not known", hint="bf16 or fp16")
        if self.patience is not None and self.patience < 1:
            raise UsageError(f"patience: {self.patience} is less than 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """What ``finetune`` gives.

    Attributes:
        trained: The module, its changes and the way to an artifact.
        losses: Mean loss of each epoch.
        metrics: ``evaluate`` after each epoch.
    """

    trained: Trained
    losses: Sequence[float]
    metrics: Sequence[float] = field(default_factory=tuple)


def finetune(
    module: nn.Module,
    recipe: Any,
    loader: Iterable[Any],
    loss: Callable[[Any, Any], torch.Tensor],
    *,
    fit: Fit | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    progress: Progress | bool = False,
    **options: Any,
) -> Finetuned:
    """Train ``module`` by ``recipe`` and finish it.

    Args:
        module: Changed in place.
        recipe: As ``optkit.training``.
        loader: Of ``(inputs, targets)``, with a length; ``inputs`` is a tensor or a tuple of the module's inputs.
        loss: ``loss(outputs, targets)``.
        fit: How to train.
        evaluate: A metric of the module, higher is better, after each epoch.
        wrap: Gives what is called in training in place of the module: ``torch.compile``, or ``DistributedDataParallel`` or
            ``fully_shard``, for which the loader gives each process its own part of the data.
        progress: Where to say how far it is; True: a bar on stderr, or lines where that is no terminal.
        options: For ``optkit.training``: ``target``, ``teacher``, ``overrides`` …

    Raises:
        UsageError: The loader has no length or is empty, or the checkpoint is of another training.
        DataError: The loss is infinite or NaN.
    """
    need_torch()
    import torch

    from optkit.training_run import Best, Run, device_of, first_batches

    fit = fit or Fit()
    if not isinstance(loader, Sized):
        raise UsageError("the loader has no length", hint="schedules need to know the number of steps")
    if len(loader) == 0:
        raise UsageError("the loader is empty")
    if fit.patience is not None and evaluate is None:
        raise UsageError("patience needs evaluate=: without a metric no epoch is better than another")
    if isinstance(progress, bool):
        progress = on(sys.stderr) if progress else Silent()
    device = device_of(module)
    steps = fit.epochs * len(loader)
    seen = first_batches(loader, device, 4)

    def labelled(outputs: Any, index: int) -> torch.Tensor:
        return loss(outputs, seen[index][1])

    session = training(
        module, recipe, example=[inputs for inputs, _ in seen], steps=steps, loss=labelled, **options
    )
    best = Best(fit)
    run = Run(session, module if wrap is None else wrap(module), fit, best, steps, device)
    start = run.resume()
    for epoch in range(start, fit.epochs):
        if best.over:
            break
        run.module.train()
        with progress.task(f"epoch {epoch + 1} of {fit.epochs}", len(loader)) as task:
            run.epoch(loader, loss, task.advance)
        if evaluate is not None:
            run.module.eval()
            with torch.no_grad():
                run.metrics.append(float(evaluate(module)))
            # Before the module has the form that it will have, its metric says nothing of what will be deployed.
            if session.settled:
                best.take(run.metrics[-1], module)
        run.save(epoch + 1)
    if best.over:
        logger.info("no better for %d epochs: stopped after %d", fit.patience, len(run.metrics))
    best.bring_back(module)
    return Finetuned(trained=session.finish(), losses=tuple(run.losses), metrics=tuple(run.metrics))
