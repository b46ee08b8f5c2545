"""The search at work on a module."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optkit.errors import LimitMissedError, PassError
from optkit.passes.architecture.evolve import Genome, Judged, evolve
from optkit.passes.architecture.space import Space, space
from optkit.passes.architecture.twin import become
from optkit.passes.base import Attached, Batch, Context, Training, call
from optkit.passes.nested import tensors
from optkit.passes.pruning.choose import multiple_for, scores
from optkit.passes.pruning.criteria import score
from optkit.passes.pruning.modules import traced
from optkit.rewrite import Change

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.bench import Speedup
    from optkit.passes.architecture.search import SearchArchitecture

logger = logging.getLogger(__name__)


def attach(options: SearchArchitecture, module: nn.Module, context: Context) -> Attached:
    """Search, and change the module in place.

    Raises:
        PassError: There is nothing to choose.
        LimitMissedError: No architecture is fast enough, or none of those is close enough.
    """
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        return _Searched(_search(options, module, context))


def _search(options: SearchArchitecture, module: nn.Module, context: Context) -> list[Change]:
    training = context.training
    assert training is not None
    model, found = traced(module, context)
    groups = found.groups()
    of = score(options.criterion, module, model.graph, context)
    choices = space(
        module, model, found, groups, [scores(found, g, of) for g in groups],
        choices=options.choices, multiple=multiple_for(options.multiple), least=options.least,
        targets=options.targets, ignore=options.ignore,
    )  # fmt: skip
    sizes = [len(c.options) for c in choices.choices]
    whole = training.load(training.export(module))
    with (
        training.race(whole) as race,
        context.progress.task("search architectures", options.trials) as task,
    ):
        judge = _Judge(options, module, choices, training, race, context.seed, task.advance)
        ranked = evolve(
            [c.kind for c in choices.choices], sizes, choices.repaired, judge,
            trials=options.trials, population=options.population, seed=context.seed,
        )  # fmt: skip
    best = ranked[0]
    if best.closeness is None:
        detail = (
            f"the fastest of {len(ranked)} architectures reaches {best.speedup:.2f}x, measured"
            if best.speedup
            else f"none of {len(ranked)} architectures runs: {judge.reason}"
        )
        raise LimitMissedError(
            f"{options.speedup:g}x was asked for, and {detail}",
            hint="lower speedup or least, or allow more trials",
        )
    if options.closeness is not None and best.closeness < options.closeness:
        raise LimitMissedError(
            f"of {len(ranked)} architectures the closest that is {options.speedup:g}x as fast explains {best.closeness:.3f} of the "
            f"variance of the outputs, and {options.closeness:g} was asked for",
            hint="lower closeness or speedup, or allow more trials or steps (tune)",
        )
    reason = become(choices, best.genome, module, training.batches[0])
    if reason is not None:
        raise PassError(f"the architecture that was found cannot be built again: {reason}")
    module.load_state_dict(judge.weights)
    return _described(options.name, choices, best, len(ranked))


class _Searched(Attached):
    """All was done before training."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = changes

    def finish(self) -> Sequence[Change]:
        """Say what was found."""
        return self._changes


def _described(rule: str, choices: Space, best: Judged, tried: int) -> list[Change]:
    worth = f"{best.speedup:.2f}x, {best.closeness:.3f} of the variance, best of {tried}"
    return [
        Change(rule=rule, node=choice.name, detail=f"{choice.said(option)} ({worth})")
        for choice, option in zip(choices.choices, best.genome, strict=True)
        if option
    ]


class _Judge:
    """Builds, times and briefly trains architectures.

    Attributes:
        weights: Those of the best one so far, after its few steps.
        reason: Why the last one that does not run does not.
    """

    def __init__(
        self,
        options: SearchArchitecture,
        module: nn.Module,
        choices: Space,
        training: Training,
        race: Callable[[ir.Model], Speedup],
        seed: int,
        advance: Callable[[], None],
    ) -> None:
        self._options, self._module, self._space, self._training = options, module, choices, training
        self._race, self._seed, self._advance = race, seed, advance
        teacher = copy.deepcopy(module).eval()
        batches = list(training.batches)
        # A batch that nothing learned from judges, where there are two.
        self._learned, self._unseen = (batches[:-1], batches[-1:]) if len(batches) > 1 else (batches, batches)
        with torch.no_grad():
            self._wanted = {id(b): _floats(call(teacher, b)) for b in batches}
        self.weights: dict[str, Any] = {}
        self.reason = ""
        self._best: float | None = None

    def __call__(self, genome: Genome) -> Judged:
        """Time it, and where it is fast enough, see how close it comes."""
        self._advance()
        twin = copy.deepcopy(self._module)
        reason = become(self._space, genome, twin, self._training.batches[0])
        if reason is not None:
            logger.info("%s does not run: %s", genome, reason)
            self.reason = reason
            return Judged(genome=genome, speedup=0.0)
        ratio = self._race(self._training.load(self._training.export(twin))).ratio
        if ratio < self._options.speedup:
            logger.info("%s: %.2fx", genome, ratio)
            return Judged(genome=genome, speedup=ratio)
        torch.manual_seed(self._seed)
        _tune(twin, self._learned, self._wanted, self._options)
        close = _explained(twin, self._unseen, self._wanted)
        logger.info("%s: %.2fx, %.3f of the variance", genome, ratio, close)
        if self._best is None or close > self._best:
            self._best, self.weights = close, copy.deepcopy(twin.state_dict())
        return Judged(genome=genome, speedup=ratio, closeness=close)


Wanted = dict[int, list[torch.Tensor]]


def _floats(outputs: Any) -> list[torch.Tensor]:
    return [x.float() for x in tensors(outputs) if x.is_floating_point()]


def _unexplained(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over the outputs of the squared difference, as a share of the variance."""
    shares = [
        (a - b).square().mean() / (b - b.mean()).square().mean().clamp_min(1e-12)
        for a, b in zip(found, wanted, strict=True)
    ]
    return torch.stack(shares).mean()


def _tune(twin: nn.Module, batches: Sequence[Batch], wanted: Wanted, options: SearchArchitecture) -> None:
    """A few steps towards the outputs of the module; then norms count what they normalize anew."""
    twin.train()
    optimizer = torch.optim.AdamW((p for p in twin.parameters() if p.requires_grad), lr=options.rate)
    for index in range(options.tune):
        batch = batches[index % len(batches)]
        loss: Any = _unexplained(_floats(call(twin, batch)), wanted[id(batch)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    norms = [m for m in twin.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of what comes
    with torch.no_grad():
        for batch in batches:
            call(twin, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _explained(twin: nn.Module, batches: Sequence[Batch], wanted: Wanted) -> float:
    twin.eval()
    with torch.no_grad():
        shares = [float(_unexplained(_floats(call(twin, b)), wanted[id(b)])) for b in batches]
    return 1 - sum(shares) / len(shares)
