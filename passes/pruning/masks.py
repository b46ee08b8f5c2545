"""Masks over the weights of a module, and when they change."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optkit.errors import PassError, UsageError
from optkit.passes.base import Attached, Context, call
from optkit.passes.modes import evaluating
from optkit.passes.pruning.criteria import input_norms
from optkit.passes.pruning.hessian import hessians, sparsegpt
from optkit.passes.pruning.weights import FEWEST
from optkit.rewrite import Change
from optkit.training_sharded import spread_like, whole

if TYPE_CHECKING:
    from optkit.passes.pruning.weights import PruneWeights

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def attach(options: PruneWeights, module: nn.Module, context: Context) -> Attached:
    """Find the layers; where there is no schedule, prune."""
    layers = {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, _LAYERS) and _named(path, options.targets) and not _named(path, options.ignore)
    }
    layers = {path: layer for path, layer in layers.items() if layer.weight[0].numel() >= FEWEST}
    if options.pattern != "any":
        m = int(options.pattern.partition(":")[2])
        layers = {path: layer for path, layer in layers.items() if layer.weight.shape[1] % m == 0}
    if not layers:
        raise PassError(
            f"pruned 0 layers: {type(module).__name__} has none that targets name and {options.pattern} fits",
            hint="see targets and ignore of the recipe",
        )
    masks = _Masks(options, module, layers, context)
    if not options.end and options.rewind is None:
        masks.once(context)
    elif not masks.steps:
        raise UsageError("a schedule needs the number of steps", hint="give steps= to optkit.training")
    return masks


def _named(path: str, patterns: Sequence[str]) -> bool:
    return any(
        re.search(p[3:], path) if p.startswith("re:") else fnmatch.fnmatchcase(path, p) for p in patterns
    )


class _Masks(Attached):
    """The masks."""

    def __init__(
        self, options: PruneWeights, module: nn.Module, layers: Mapping[str, Any], context: Context
    ) -> None:
        assert context.training is not None
        self._options, self._module = options, module
        self.steps = context.training.steps
        # By object: quantization moves weights into layers of its own.
        self._weights: dict[str, nn.Parameter] = {path: layer.weight for path, layer in layers.items()}
        self._masks = {path: torch.ones_like(w, dtype=torch.bool) for path, w in self._weights.items()}
        self._tensors = [*module.parameters(), *module.buffers()]
        self._early: list[torch.Tensor] = []
        self._step = 0
        if options.rewind == 0:
            self._remember()

    def _remember(self) -> None:
        self._early = [t.detach().clone() for t in self._tensors]

    def once(self, context: Context) -> None:
        """Prune before training."""
        options, training = self._options, context.training
        assert training is not None
        with torch.no_grad():
            if options.criterion == "sparsegpt":
                found = hessians(self._module, context, list(self._weights))
                for path, h in found.items():
                    weight = self._weights[path]
                    order = _by_channel(weight)
                    rows, h = weight.flatten(1)[:, order], h[order][:, order]
                    new, mask = sparsegpt(rows, h, options.sparsity, options.pattern)
                    back = order.argsort()
                    weight.copy_(new[:, back].reshape(weight.shape))
                    self._masks[path] = mask[:, back].reshape(weight.shape)
                # Depthwise and other grouped convolutions: a Hessian for each output would be one number or two.
                for path in sorted(self._weights.keys() - found.keys()):
                    self._masks[path] = _keep(self._weights[path].abs(), options.sparsity, options.pattern)
                self._apply()
                return
        importance = self._importance(context)
        with torch.no_grad():
            self._update(importance, options.sparsity, by_row=options.criterion == "wanda")

    def _importance(self, context: Context) -> dict[str, torch.Tensor]:
        training = context.training
        assert training is not None
        if self._options.criterion == "wanda":
            norms = input_norms(self._module, context)
            found = {}
            for path, w in self._weights.items():
                n = torch.as_tensor(norms[path], device=w.device, dtype=w.dtype)
                if w.shape[1] != len(n):
                    # Grouped: each output sees the channels of its own group.
                    per = n.reshape(-1, w.shape[1])
                    n = per.repeat_interleave(w.shape[0] // len(per), 0)
                else:
                    n = n[None]
                found[path] = w.detach().abs() * n.reshape(*n.shape, *[1] * (w.ndim - 2))
            return found
        if self._options.criterion == "taylor":
            if training.loss is None:
                raise UsageError(
                    "the criterion taylor needs gradients, and there is no loss",
                    hint="give loss= to optkit.training",
                )
            self._module.zero_grad(set_to_none=True)
            with evaluating(self._module):
                for index, batch in enumerate(training.batches):
                    training.loss(call(self._module, batch), index).backward()
            found = {
                p: (w.detach() * w.grad).square() for p, w in self._weights.items() if w.grad is not None
            }
            self._module.zero_grad(set_to_none=True)
            return found
        return {path: w.detach().abs() for path, w in self._weights.items()}

    def _update(
        self, importance: Mapping[str, torch.Tensor], sparsity: float, *, by_row: bool = False
    ) -> None:
        options = self._options
        if options.scope == "all" and options.pattern == "any":
            everything = torch.cat([x.flatten() for x in importance.values()])
            limit = everything.kthvalue(max(1, int(len(everything) * sparsity))).values
            for path, x in importance.items():
                self._masks[path] = x > limit
        else:
            for path, x in importance.items():
                self._masks[path] = _keep(x, sparsity, options.pattern, by_row=by_row)
        self._apply()

    def _apply(self) -> None:
        for path, weight in self._weights.items():
            weight.mul_(spread_like(self._masks[path], weight))

    def on_step(self, step: int) -> None:
        """Prune more where it is due; what is pruned stays 0."""
        options = self._options
        self._step = step
        if options.rewind is not None:
            self._rewind(step)
        elif options.end:
            begin, end = round(options.begin * self.steps), round(options.end * self.steps)
            if begin <= step <= end and ((step - begin) % options.every == 0 or step == end):
                share = (step - begin) / max(1, end - begin)
                self._prune_now(options.sparsity * (1 - (1 - share) ** 3))
        self._apply()

    def _prune_now(self, sparsity: float) -> None:
        if sparsity > 0:
            # What is 0 stays the least important.
            self._update({p: whole(w.detach()).abs() for p, w in self._weights.items()}, sparsity)

    def _rewind(self, step: int) -> None:
        options = self._options
        assert options.rewind is not None
        if step == round(options.rewind * self.steps):
            self._remember()
        length = self.steps / (options.rounds + 1)
        done = next((r for r in range(1, options.rounds + 1) if step == round(r * length)), None)
        if done is None:
            return
        if not self._early:
            raise UsageError(f"rewind {options.rewind:g} lies behind the first of {options.rounds} rounds")
        self._prune_now(1 - (1 - options.sparsity) ** (done / options.rounds))
        for tensor, early in zip(self._tensors, self._early, strict=True):
            tensor.copy_(early)

    def moved(self, parameters: Mapping[Any, Any]) -> None:
        """Masks stay whole in every process; each applies its part."""
        if self._options.rewind is not None:
            raise UsageError(
                "weights that go back to earlier ones cannot be sharded", hint="use DistributedDataParallel"
            )
        self._weights = {path: parameters.get(w, w) for path, w in self._weights.items()}

    def settled(self) -> bool:
        """Whether the last weights are pruned."""
        rounds = self._options.rounds
        last = self._options.end if self._options.rewind is None else rounds / (rounds + 1)
        return self._step >= round(last * self.steps)

    def state(self) -> dict[str, Any]:
        """Masks, and the weights to go back to."""
        return {"step": self._step, "masks": dict(self._masks), "early": list(self._early)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self._step = int(state["step"])
        self._masks, self._early = dict(state["masks"]), list(state["early"])
        with torch.no_grad():
            self._apply()

    def finish(self) -> Sequence[Change]:
        """Set the masked weights to 0 for good."""
        self._apply()
        changes = []
        for path, mask in self._masks.items():
            zeros = int((~mask).sum())
            if zeros:
                detail = f"{zeros} of {mask.numel()} weights are 0 ({self._options.pattern})"
                changes.append(Change(rule="prune-weights", node=path, detail=detail))
        if not changes:
            raise PassError(
                "pruned 0 weights", hint="the session ended before the schedule began: check steps="
            )
        return changes


def _keep(importance: torch.Tensor, sparsity: float, pattern: str, *, by_row: bool = False) -> torch.Tensor:
    """Which weights stay; of equally important ones as many as it takes."""
    shape = importance.shape
    if pattern != "any":
        n, m = (int(x) for x in pattern.split(":"))
        # Kernels take their pattern along the input channels, at each position of a convolution.
        last = importance.movedim(1, -1)
        groups = last.reshape(-1, m)
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(n, dim=1).indices, True)
        return mask.reshape(last.shape).movedim(-1, 1)
    rows = importance.flatten(1) if by_row else importance.reshape(1, -1)
    stay = max(1, rows.shape[1] - int(rows.shape[1] * sparsity))
    return (
        torch.zeros_like(rows, dtype=torch.bool)
        .scatter_(1, rows.topk(stay, dim=1).indices, True)
        .reshape(shape)
    )


def _by_channel(weight: torch.Tensor) -> torch.Tensor:
    """The columns of ``[out, in * positions]``, those of a position beside each other, so that channels are neighbours."""
    columns = torch.arange(weight[0].numel(), device=weight.device)
    return columns.reshape(weight.shape[1], -1).T.flatten()
