"""A training loop at work: optimizer, schedule, mixed precision, checkpoints, the best epoch."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from optkit.errors import DataError, UsageError
from optkit.passes.base import Batch, call
from optkit.training_sharded import is_sharded

if TYPE_CHECKING:
    from optkit.training_loop import Fit
    from optkit.training_session import TrainingSession

Labelled = tuple[Batch, Any]


class Run:
    """Optimizer, schedule and checkpoints of one training."""

    def __init__(
        self,
        session: TrainingSession,
        module: nn.Module,
        fit: Fit,
        best: Best,
        steps: int,
        device: torch.device,
    ) -> None:
        self._session, self.module, self._fit, self._best, self._device = session, module, fit, best, device
        if is_sharded(module) and (fit.checkpoint is not None or fit.patience is not None):
            raise UsageError(
                "checkpoint and patience keep whole weights, and those of the module are sharded",
                hint="write checkpoints with torch.distributed.checkpoint, or use DistributedDataParallel",
            )
        groups = session.groups(fit.weight_decay)
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, lr=fit.learning_rate)
            if fit.optimizer == "adamw"
            else torch.optim.SGD(groups, lr=fit.learning_rate, momentum=0.9, nesterov=True)
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda n: _share(n, steps, fit.warmup)
        )
        session.follow(self.optimizer)
        self._scaler = torch.amp.GradScaler(device.type, enabled=fit.autocast == "fp16")
        self.losses: list[float] = []
        self.metrics: list[float] = []

    def epoch(
        self, loader: Iterable[Any], loss: Callable[[Any, Any], torch.Tensor], advance: Callable[[], None]
    ) -> None:
        """One run over the data; the loss is read once, at the end, so that the device never waits."""
        total, count = torch.zeros((), device=self._device), 0
        for item in loader:
            inputs, targets = _batch(item, self._device)
            with self._cast():
                outputs = call(self.module, inputs)
                value = self._session.loss(loss(outputs, targets), inputs, outputs)
            scaled: Any = self._scaler.scale(value)
            scaled.backward()
            if self._fit.clip is not None:
                self._scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self._session.parameters(), self._fit.clip)
            made = self._session.steps
            self._scaler.step(self.optimizer)
            self._scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            # A scaler leaves out steps whose gradients are infinite.
            if self._session.steps > made:
                self._schedule.step()
            total, count = total + value.detach(), count + 1
            advance()
        mean = float(total) / max(count, 1)
        if not math.isfinite(mean):
            raise DataError(
                f"epoch {len(self.losses) + 1}: the loss is {mean}",
                hint="use a lower learning rate, or clip gradients",
            )
        self.losses.append(mean)

    def _cast(self) -> contextlib.AbstractContextManager[Any]:
        if self._fit.autocast is None:
            return contextlib.nullcontext()
        kind = torch.bfloat16 if self._fit.autocast == "bf16" else torch.float16
        cast: contextlib.AbstractContextManager[Any] = torch.autocast(self._device.type, dtype=kind)
        return cast

    def save(self, epoch: int) -> None:
        """Write beside and rename, so that a kill leaves the old checkpoint or the new one."""
        path = self._fit.checkpoint
        if path is None:
            return
        state = {
            "epoch": epoch, "module": self._session.module.state_dict(), "session": self._session.state_dict(),
            "optimizer": self.optimizer.state_dict(), "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(), "losses": self.losses, "metrics": self.metrics,
            "best": self._best.state(), "random": torch.get_rng_state(), "random_device": _device_randomness(self._device),
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        torch.save(state, beside)
        os.replace(beside, path)

    def resume(self) -> int:
        """Take back the checkpoint, where there is one; gives the epochs that are done."""
        path = self._fit.checkpoint
        if path is None or not path.is_file():
            return 0
        try:
            state = torch.load(path, map_location=self._device, weights_only=True)
            self._session.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise UsageError(
                f"{path}: not a checkpoint of this training: {str(error).partition(chr(10))[0]}",
                hint="remove the file to start anew",
            ) from error
        self._session.load_state_dict(state["session"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self.losses, self.metrics = list(state["losses"]), list(state["metrics"])
        self._best.restore(state["best"])
        torch.set_rng_state(state["random"].cpu())
        if state["random_device"] is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["random_device"].cpu(), self._device)
        return int(state["epoch"])


class Best:
    """The best epoch so far, and how long it has been the best.

    Attributes:
        over: Whether to stop.
    """

    def __init__(self, fit: Fit) -> None:
        self._patience, self._metric, self._since = fit.patience, -math.inf, 0
        self._weights: dict[str, Any] | None = None

    @property
    def over(self) -> bool:
        """Whether to stop."""
        return self._patience is not None and self._since >= self._patience

    def take(self, metric: float, module: nn.Module) -> None:
        """Take in an epoch."""
        if self._patience is None:
            return
        if metric > self._metric:
            self._metric, self._since = metric, 0
            self._weights = {k: v.detach().clone() for k, v in module.state_dict().items()}
        else:
            self._since += 1

    def bring_back(self, module: nn.Module) -> None:
        """The best epoch's weights."""
        if self._weights is not None:
            module.load_state_dict(self._weights)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"metric": self._metric, "since": self._since, "weights": self._weights}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""
        self._metric, self._since, self._weights = (
            float(state["metric"]),
            int(state["since"]),
            state["weights"],
        )


def device_of(module: nn.Module) -> torch.device:
    """Where its parameters are."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _device_randomness(device: torch.device) -> torch.Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _share(step: int, steps: int, warmup: float) -> float:
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1.0, steps - rise))))


def _batch(item: Any, device: torch.device) -> Labelled:
    if not isinstance(item, Sequence) or len(item) != 2:
        raise UsageError("the loader yields something other than (inputs, targets)")
    inputs, targets = item
    targets = _moved(targets, device)
    if isinstance(inputs, Mapping):
        return {name: _moved(x, device) for name, x in inputs.items()}, targets
    several = inputs if isinstance(inputs, tuple | list) else (inputs,)
    return tuple(_moved(x, device) for x in several), targets


def _moved(x: Any, device: torch.device) -> Any:
    return x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x


def first_batches(loader: Iterable[Any], device: torch.device, n: int) -> list[Labelled]:
    """The first batches, without using up random numbers that the training will ask for."""
    with _same_randomness():
        return [_batch(item, device) for item, _ in zip(loader, range(n), strict=False)]


@contextlib.contextmanager
def _same_randomness() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
