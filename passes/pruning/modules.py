"""Structured pruning of a torch module: its parameters are cut as those of its graph are."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from optkit.errors import ModelError, PassError
from optkit.passes.base import Attached, Batch, Context, call
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
    parts = [g for g in groups if not gone.isdisjoint(g.units)]
    reason = cut.try_all(parts, gone)
    if reason is not None:
        for group in parts:
            reason = cut.try_all([group], gone)
            if reason is not None and options.speedup is not None:
                raise PassError(
                    f"{group.name} cannot lose what the speed-up takes: {reason}",
                    hint=f"ignore: [{group.name}]",
                )
            if reason is not None:
                logger.warning("%s stays whole: %s", group.name, reason)
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
        undo: list[Callable[[], None]] = []
        before = set(self.done)
        try:
            for group in groups:
                part = {u for u in group.units if u in gone}
                self.done |= part
                self._slice(group, part, undo)
            reason = _compare(self._module, self._model, self._found, self.done, self._batch)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
        if reason is not None:
            self.done = before
            for step in reversed(undo):
                step()
        return reason

    def _slice(self, group: Group, part: set[int], undo: list[Callable[[], None]]) -> None:
        """Cut the tensors of a group, and tell the modules that hold them."""
        owners: dict[str, dict[int, int]] = {}
        for weight in dict.fromkeys(w for w, _ in group.places):
            path, _, name = str(weight.name).rpartition(".")
            try:
                owner = self._module.get_submodule(path)
                old = getattr(owner, name)
            except AttributeError as error:
                # The bias of 0 that a convolution without one is exported with.
                if weight.const_value is not None and np.ptp(weight.const_value.numpy()) == 0:
                    continue
                raise ValueError(f"{weight.name} is no parameter of the module") from error
            # From the whole tensor: groups before this one may have cut it, along the same axis even.
            new = self._whole.setdefault(str(weight.name), old.detach())
            for axis, stay in kept(self._found, weight, self.done).items():
                new = new.index_select(axis, torch.as_tensor(stay, device=new.device))
            if new.shape[0] != old.shape[0]:
                owners.setdefault(path.rpartition(".")[0], {})[old.shape[0]] = new.shape[0]
            made = (
                nn.Parameter(new.clone(), requires_grad=old.requires_grad)
                if isinstance(old, nn.Parameter)
                else new.clone()
            )
            for other, its_name in _holders(self._module, old):
                _set(other, its_name, made, undo)
                _fit(other, undo)
                if not type(other).__module__.startswith("torch."):
                    _rename_widths(other, old.shape, new.shape, undo)
        for path, sizes in owners.items():
            units = len(group.units)
            _rename_sizes(self._module.get_submodule(path), sizes, units, units - len(part), undo)


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
    elif isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is not None:
        sizes = {"num_features": layer.running_mean.shape[0]}
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


def _rename_sizes(
    owner: nn.Module, sizes: Mapping[int, int], units: int, left: int, undo: list[Callable[[], None]]
) -> None:
    """Numbers of heads and widths that the module holding cut layers keeps as attributes."""
    for name, value in list(vars(owner).items()):
        if type(value) is not int or name.startswith("_"):
            continue
        if value in sizes and _WIDTHS.search(name):
            _set(owner, name, sizes[value], undo)
        elif value % units == 0 and value < max(sizes) and _HEADS.search(name) and "dim" not in name:
            # So many heads to a unit, as where queries share keys.
            _set(owner, name, value // units * left, undo)


def _compare(
    module: nn.Module, model: ir.Model, found: Dependencies, gone: set[int], batch: Batch
) -> str | None:
    """Hold the module against its graph, cut alike and run by ONNX Runtime."""
    other = remove_from_copy(model, found, gone)
    try:
        expected = list(ReferenceSession(other).run(feeds(other, batch)).values())
    except ModelError as error:
        return str(error)
    was = module.training
    module.eval()
    try:
        with torch.no_grad():
            given = call(module, batch)
    finally:
        module.train(was)
    found_outputs = [x.float().cpu().numpy() for x in tensors(given)]
    for a, b in zip(found_outputs, expected, strict=True):
        if a.shape != b.shape:
            return f"an output is {list(a.shape)}, and should be {list(b.shape)}"
        if not np.allclose(a, b, atol=_CLOSE * max(float(np.abs(b).max(initial=0)), 1e-6), rtol=0):
            return f"an output differs by {np.abs(a - b).max():.2g}"
    return None
