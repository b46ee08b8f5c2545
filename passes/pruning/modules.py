"""Structured pruning of a torch module: its parameters are cut as those of its graph are."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from optkit.errors import ModelError, PassError
from optkit.passes.base import Attached, Batch, Context, call
from optkit.passes.modes import evaluating
from optkit.passes.nested import feeds, tensors
from optkit.passes.pruning.choose import choose, multiple_for, scores
from optkit.passes.pruning.criteria import score
from optkit.passes.pruning.dependencies import Dependencies, Group, dependencies
from optkit.passes.pruning.prepare import prepare
from optkit.passes.pruning.structured import described, selected
from optkit.passes.pruning.surgery import kept, remove_from_copy
from optkit.reference import ReferenceSession
from optkit.rewrite import Change

if TYPE_CHECKING:
    from optkit.passes.pruning.structured import PruneStructured

logger = logging.getLogger(__name__)

# Names of numbers of heads, and of widths, in the modules that hold attention.
_HEADS = re.compile(r"head|^n?h$|^kv|groups$", re.IGNORECASE)
_WIDTHS = re.compile(r"size|dim|inner|width|channels|features|embed|^n[fx]$", re.IGNORECASE)
# Of these, widths of what comes in, or it may be so.
_INWARD = re.compile(r"^in_|_in$|^channels$|input", re.IGNORECASE)
# What a module raises where it finds other sizes than it counts on.
_REFUSALS = (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, IndexError, KeyError)
# Sums of float32 in another order: torch and ONNX Runtime differ by this share of the largest output.
_CLOSE = 1e-3
# Its own checks tie its widths to each other.
_WHOLE = (nn.MultiheadAttention, nn.RNNBase)


def attach(options: PruneStructured, module: nn.Module, context: Context) -> Attached:
    """Choose and cut."""
    training = context.training
    assert training is not None
    model, found = traced(module, context)
    groups = selected(found, options.targets, options.ignore)
    of = score(options.criterion, module, model.graph, context)
    importance = {i: scores(found, g, of) for i, g in enumerate(groups)}
    multiple = multiple_for(options.multiple)
    if options.speedup is None:
        gone = choose(
            groups, importance, options.ratio, multiple, together=options.together, least=options.least
        )
    else:
        gone = training.narrow(
            model, found, groups, importance, wanted=options.speedup, multiple=multiple, least=options.least
        )
    cut = Cut(module, model, found, training.batches[0])
    reason, waiting = None, [[g for g in groups if not gone.isdisjoint(g.units)]]
    while waiting:
        parts = waiting.pop()
        reason = cut.try_all(parts, gone)
        if reason is None:
            continue
        if len(parts) > 1:
            # Which of them it is: halves that can follow are cut as one.
            half = len(parts) // 2
            waiting += [parts[half:], parts[:half]]
            continue
        if options.speedup is not None:
            raise PassError(
                f"{parts[0].name} cannot lose what the speed-up takes: {reason}",
                hint=f"ignore: [{parts[0].name}]",
            )
        logger.warning("%s stays whole: %s", parts[0].name, reason)
    if not cut.done:
        raise PassError(
            f"pruned 0 of {len(groups)} groups: {type(module).__name__} cannot follow what its weights lose ({reason})",
            hint="keep numbers of heads and widths as attributes of the modules that use them",
        )
    return _Pruned(described(options.name, groups, cut.done))


def traced(module: nn.Module, context: Context) -> tuple[ir.Model, Dependencies]:
    """The graph of a module, and which of its units go together."""
    training = context.training
    assert training is not None
    model = training.load(training.export(module))
    prepare(model, context)
    whole = tuple(f"{path}." for path, m in module.named_modules() if isinstance(m, _WHOLE))
    frozen = [str(n) for n in model.graph.initializers if whole and str(n).startswith(whole)]
    return model, dependencies(model.graph, frozen, even=True)


class _Pruned(Attached):
    """All was done before training."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = changes

    def finish(self) -> Sequence[Change]:
        """Say what was cut."""
        return self._changes


class Cut:
    """A module being cut.

    Attributes:
        done: Units that are gone.
    """

    def __init__(self, module: nn.Module, model: ir.Model, found: Dependencies, batch: Batch) -> None:
        self._module, self._model, self._found, self._batch = module, model, found, batch
        self._whole: dict[str, torch.Tensor] = {}
        self.done: set[int] = set()

    def try_all(self, groups: Sequence[Group], gone: set[int]) -> str | None:
        """Cut units of ``groups`` that are ``gone``; where the module cannot follow, put all back and say why."""
        reason, inward = self._try(groups, gone, inward=False)
        if reason is not None and inward:
            # A number such as ``channels`` is as wide as what comes out, in one module, and as what comes in, in another.
            again, _ = self._try(groups, gone, inward=True)
            reason = None if again is None else reason
        return reason

    def _try(self, groups: Sequence[Group], gone: set[int], *, inward: bool) -> tuple[str | None, bool]:
        """Why the module cannot follow, and whether it might where numbers that may be of inputs are taken to be."""
        undo: list[Callable[[], None]] = []
        before = set(self.done)
        widths: dict[str, _Widths] = {}
        try:
            for group in groups:
                part = {u for u in group.units if u in gone}
                self.done |= part
                self._slice(group, part, widths, undo)
            owners = [(self._module.get_submodule(path), found) for path, found in widths.items()]
            open_ = any([found.tell(owner, inward, undo) for owner, found in owners])
            reason = _compare(self._module, self._model, self._found, self.done, self._batch)
        except _REFUSALS as error:
            open_ = True
            reason = str(error).partition("\n")[0] or _told(error)
        if reason is not None:
            self.done = before
            for step in reversed(undo):
                step()
        return reason, open_

    def _slice(
        self, group: Group, part: set[int], widths: dict[str, _Widths], undo: list[Callable[[], None]]
    ) -> None:
        """Cut the tensors of a group, and tell the layers that hold them."""
        units, heads = len(group.units), dict[str, list[int]]()
        for weight in dict.fromkeys(w for w, _ in group.places):
            path, _, name = str(weight.name).rpartition(".")
            try:
                owner = self._module.get_submodule(path)
                old = getattr(owner, name)
            except AttributeError as error:
                # The bias of 0 that a convolution without one is exported with.
                if weight.const_value is not None and np.ptp(weight.const_value.numpy()) == 0:
                    continue
                raise ValueError(f"{weight.name} is not a parameter of the module") from error
            # From the whole tensor: groups before this one may have cut it, along the same axis even.
            new = self._whole.setdefault(str(weight.name), old.detach())
            for axis, stay in kept(self._found, weight, self.done).items():
                new = new.index_select(axis, torch.as_tensor(stay, device=new.device))
            made = (
                nn.Parameter(new.clone(), requires_grad=old.requires_grad)
                if isinstance(old, nn.Parameter)
                else new.clone()
            )
            above = path.rpartition(".")[0]
            around = widths.setdefault(above, _Widths())
            if new.shape[0] != old.shape[0]:
                around.out.note(old.shape[0], new.shape[0])
                heads.setdefault(above, []).append(old.shape[0])
            for other, its_name in _holders(self._module, old):
                inside = _width_in(other)
                _set(other, its_name, made, undo)
                _fit(other, undo)
                if inside is not None:
                    around.into.note(inside, _width_in(other) or 0)
                if not type(other).__module__.startswith("torch."):
                    _rename_widths(other, old.shape, new.shape, undo)
        for path, sizes in heads.items():
            _rename_heads(self._module.get_submodule(path), max(sizes), units, units - len(part), undo)


class _Sizes(dict[int, int]):
    """What sizes have become, in several steps perhaps."""

    def note(self, old: int, new: int) -> None:
        """Once more: where it had become ``old``, it is ``new`` by now."""
        first = next((k for k, v in self.items() if v == old), old)
        self[first] = new


@dataclass(slots=True)
class _Widths:
    """What became of the widths in a module that holds layers which were cut.

    Attributes:
        out: Of what layers give.
        into: Of what they take; the same where they take all of it still.
    """

    out: _Sizes = field(default_factory=_Sizes)
    into: _Sizes = field(default_factory=_Sizes)

    def tell(self, owner: nn.Module, inward: bool, undo: list[Callable[[], None]]) -> bool:
        """Change the numbers that ``owner`` keeps; whether some would be others where ``inward`` were."""
        open_ = False
        for name, value in list(vars(owner).items()):
            if type(value) is not int or name.startswith("_") or not _WIDTHS.search(name):
                continue
            now = self.out.get(value, value)
            if _INWARD.search(name) and (other := self.into.get(value, now)) != now:
                open_, now = True, other if inward else now
            if now != value:
                _set(owner, name, now, undo)
        return open_


def _width_in(layer: nn.Module) -> int | None:
    found = getattr(layer, "in_channels", getattr(layer, "in_features", None))
    return found if type(found) is int else None


def _told(error: BaseException) -> str:
    """Where an error without words came from."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}: {at.line}"


def _holders(module: nn.Module, tensor: torch.Tensor) -> list[tuple[nn.Module, str]]:
    """Where a parameter or buffer is; tied ones are in several places."""
    return [
        (owner, name)
        for owner in module.modules()
        for name, held in [*owner._parameters.items(), *owner._buffers.items()]
        if held is tensor
    ]


def _set(owner: nn.Module, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    old = getattr(owner, name)
    undo.append(lambda: setattr(owner, name, old))
    setattr(owner, name, value)


def _fit(layer: Any, undo: list[Callable[[], None]]) -> None:
    """The numbers that a layer of torch knows its tensors by."""
    sizes: dict[str, int] = {}
    if isinstance(layer, nn.Linear):
        sizes = {"out_features": layer.weight.shape[0], "in_features": layer.weight.shape[1]}
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        outs, ins = layer.weight.shape[:2]
        groups = (
            outs
            if layer.groups == layer.in_channels > 1 and layer.groups == layer.out_channels
            else layer.groups
        )
        if layer.groups == layer.in_channels > 1 and layer.groups != layer.out_channels:
            groups = outs // (layer.out_channels // layer.groups)
        sizes = {"out_channels": outs, "in_channels": ins * groups, "groups": groups}
    elif isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        sizes = {"in_channels": layer.weight.shape[0], "out_channels": layer.weight.shape[1]}
    elif isinstance(layer, nn.modules.batchnorm._NormBase) and (
        (kept_by := layer.weight if layer.running_mean is None else layer.running_mean) is not None
    ):
        sizes = {"num_features": kept_by.shape[0]}
    elif isinstance(layer, nn.GroupNorm) and layer.weight is not None:
        # Groups go as a whole, as their channels share a mean.
        n = layer.weight.shape[0]
        sizes = {"num_channels": n, "num_groups": layer.num_groups * n // layer.num_channels}
    elif isinstance(layer, nn.Embedding):
        sizes = {"embedding_dim": layer.weight.shape[1]}
    elif isinstance(layer, nn.PReLU):
        sizes = {"num_parameters": layer.weight.numel()}
    for name, size in sizes.items():
        if getattr(layer, name) != size:
            _set(layer, name, size, undo)


def _rename_widths(
    layer: nn.Module, old: Sequence[int], new: Sequence[int], undo: list[Callable[[], None]]
) -> None:
    """Widths that a layer of somebody else's keeps beside the tensor that they are of."""
    sizes = {a: b for a, b in zip(old, new, strict=True) if a != b and list(old).count(a) == 1}
    for name, value in list(vars(layer).items()):
        if type(value) is int and value in sizes and _WIDTHS.search(name) and not name.startswith("_"):
            _set(layer, name, sizes[value], undo)


def _rename_heads(owner: nn.Module, size: int, units: int, left: int, undo: list[Callable[[], None]]) -> None:
    """Numbers of heads that the module holding cut layers keeps as attributes."""
    for name, value in list(vars(owner).items()):
        if type(value) is not int or name.startswith("_") or "dim" in name or not _HEADS.search(name):
            continue
        if value % units == 0 and value < size:
            # So many heads to a unit, as where queries share keys.
            _set(owner, name, value // units * left, undo)


def _compare(
    module: nn.Module, model: ir.Model, found: Dependencies, gone: set[int], batch: Batch
) -> str | None:
    """Hold the module against its graph, cut alike and run by ONNX Runtime."""
    with evaluating(module), torch.no_grad():
        # First, because it fails within a moment where sizes do not fit.
        given = call(module, batch)
    other = remove_from_copy(model, found, gone)
    try:
        expected = list(ReferenceSession(other).run(feeds(other, batch)).values())
    except ModelError as error:
        return str(error)
    found_outputs = [x.float().cpu().numpy() for x in tensors(given)]
    for a, b in zip(found_outputs, expected, strict=True):
        if a.shape != b.shape:
            return f"an output is {list(a.shape)}, and should be {list(b.shape)}"
        if not np.allclose(a, b, atol=_CLOSE * max(float(np.abs(b).max(initial=0)), 1e-6), rtol=0):
            return f"an output differs by {np.abs(a - b).max():.2g}"
    return None
