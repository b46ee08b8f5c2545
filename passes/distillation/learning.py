"""Teachers at work."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from optkit.errors import PassError, UsageError
from optkit.passes.base import Attached, Batch, Context, call
from optkit.passes.modes import evaluating
from optkit.rewrite import Change

if TYPE_CHECKING:
    from optkit.passes.distillation.distil import Distil, DistilFeatures


class _Teacher:
    """A frozen module that runs once for a batch, however many passes ask."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval().requires_grad_(False)
        self._inputs: list[tuple[Any, int]] = []
        self._outputs: Any = None

    def __call__(self, inputs: Batch) -> Any:
        values = inputs.values() if isinstance(inputs, Mapping) else inputs
        # The version counts writes in place: a loop may fill the same tensor with every batch.
        given = [(x, getattr(x, "_version", 0)) for x in values]
        same = len(given) == len(self._inputs) > 0 and all(
            a is b and v == w for (a, v), (b, w) in zip(given, self._inputs, strict=True)
        )
        if not same:
            self.run(inputs)
            self._inputs = given
        return self._outputs

    def forget(self) -> None:
        """Its weights have changed."""
        self._inputs = []

    def run(self, inputs: Batch) -> None:
        """Run, whether it ran on these before or not."""
        with torch.no_grad():
            self._outputs = call(self.module, inputs)


def _teacher(module: nn.Module, context: Context) -> _Teacher:
    """The teacher of the session, shared by its passes."""
    if "distil.teacher" not in context.memo:
        training = context.training
        assert training is not None
        given = training.teacher
        if given is module:
            raise UsageError("the teacher is the student itself", hint="leave teacher= out: a copy is made")
        # A given teacher is the caller's: it stays in the mode that it is in.
        context.memo["distil.teacher"] = _Teacher(copy.deepcopy(given if given is not None else module))
    found: _Teacher = context.memo["distil.teacher"]
    return found


def _logits(outputs: Any) -> torch.Tensor:
    if isinstance(outputs, torch.Tensor):
        return outputs
    values = list(outputs.values()) if isinstance(outputs, Mapping) else list(outputs)
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), torch.Tensor):
        found: torch.Tensor = outputs["logits"]
        return found
    first = next((v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()), None)
    if first is None:
        raise PassError(f"the module gives {type(outputs).__name__} without a float tensor to learn")
    return first


class Outputs(Attached):
    """Learning from outputs."""

    def __init__(self, options: Distil, module: nn.Module, context: Context) -> None:
        training = context.training
        assert training is not None
        self._options, self._step, self._steps = options, 0, training.steps
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        if options.progressive and not training.assistants:
            raise UsageError(
                "progressive distillation needs assistants", hint="give assistants= to optkit.training"
            )
        if options.teacher == "average":
            mean = copy.deepcopy(module)
            # By object: later passes may move parameters to other places of the module.
            self._pairs = list(zip(_tensors(mean), _tensors(module), strict=True))
            self._teachers = [_Teacher(mean)]
        else:
            self._teachers = [_teacher(module, context)]
        if options.progressive:
            assistants = [_Teacher(copy.deepcopy(m)) for m in reversed(training.assistants)]
            self._teachers = [*assistants, *self._teachers]

    def task_weight(self) -> float:
        """What the teacher leaves to the task."""
        return max(0.0, 1.0 - self._options.weight)

    def _current(self) -> _Teacher:
        share = self._step / self._steps if self._steps else 1.0
        return self._teachers[min(int(share * len(self._teachers)), len(self._teachers) - 1)]

    def extra_loss(self, inputs: Batch, outputs: Any) -> torch.Tensor:
        """The distance to the teacher's outputs."""
        mine, theirs = _logits(outputs), _logits(self._current()(inputs))
        if mine.shape != theirs.shape:
            raise PassError(f"the module gives {list(mine.shape)}, its teacher {list(theirs.shape)}")
        if self._options.loss == "mse":
            return self._options.weight * F.mse_loss(mine, theirs)
        t = self._options.temperature
        a, b = (x.float().flatten(0, -2) / t for x in (mine, theirs))
        return (
            self._options.weight
            * t
            * t
            * F.kl_div(F.log_softmax(a, -1), F.log_softmax(b, -1), reduction="batchmean", log_target=True)
        )

    def on_step(self, step: int) -> None:
        """Move the average."""
        self._step = step
        for mean, now in self._pairs:
            if mean.is_floating_point():
                mean.lerp_(now.to(mean.dtype), 1 - self._options.decay)
            else:
                mean.copy_(now)
        if self._pairs:
            self._teachers[-1].forget()

    def moved(self, parameters: Mapping[Any, Any]) -> None:
        """The teacher is whole in every process."""
        if self._pairs:
            raise UsageError(
                "a teacher that is the average of the module needs all of its parameters in every process",
                hint="use DistributedDataParallel, or teacher: given",
            )

    def state(self) -> dict[str, Any]:
        """The average is not in the module's own state."""
        return {"step": self._step, "average": [mean.clone() for mean, _ in self._pairs]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._step = int(state["step"])
        for (mean, _), saved in zip(self._pairs, state["average"], strict=True):
            mean.copy_(saved)
        for teacher in self._teachers:
            teacher.forget()

    def finish(self) -> Sequence[Change]:
        """Nothing of the module changes but its weights."""
        return [Change(rule="distil", node="outputs", detail=f"learned by {self._options.loss}")]


def _share(weight: nn.Parameter) -> None:
    """The same in every process, as wrappers keep the parameters of the module but not this one."""
    dist.broadcast(weight.data, 0)

    def mean(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()

    weight.register_post_accumulate_grad_hook(mean)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


class Features(Attached):
    """Learning from what lies inside."""

    def __init__(self, options: DistilFeatures, module: nn.Module, context: Context) -> None:
        training = context.training
        assert training is not None
        self._options, self._module, self._batch = options, module, training.batches[0]
        self._teacher = _teacher(module, context)
        self._mine: dict[str, torch.Tensor] = {}
        self._theirs: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []
        self._layers: list[tuple[str, str]] = []
        self._projections = nn.ModuleDict()

    def start(self) -> None:
        """Find the layers by a run of both modules, and make projections where widths differ."""
        options, teacher = self._options, self._teacher.module
        asked = [(a, b or a) for a, _, b in (text.partition("=") for text in options.layers)]
        if not asked:
            names = [n for n, _ in teacher.named_children()]
            asked = [(n, n) for n, _ in self._module.named_children() if n in names and n != "optkit"][:-1]
        for where, paths, module in (
            (self._mine, [a for a, _ in asked], self._module),
            (self._theirs, [b for _, b in asked], teacher),
        ):
            for path in dict.fromkeys(paths):
                self._watch(module, path, where)
        with evaluating(self._module), torch.no_grad():
            call(self._module, self._batch)
        self._teacher.run(self._batch)
        for a, b in asked:
            missing = [path for path, seen in ((a, self._mine), (b, self._theirs)) if path not in seen]
            if missing and options.layers:
                raise PassError(
                    f"{missing[0]} gives no float tensor, or is not called as a module any more",
                    hint="name layers of torch: passes that trace the module go through blocks of its own code",
                )
            if not missing:
                self._layers.append((a, b))
                self._project(a, self._mine[a], self._theirs[b])
        if not self._layers:
            raise PassError(
                "no layer of the module and its teacher to compare",
                hint="name them: layers: [student=teacher]",
            )
        self._mine.clear()

    def _watch(self, module: nn.Module, path: str, seen: dict[str, torch.Tensor]) -> None:
        try:
            layer = module.get_submodule(path)
        except AttributeError as error:
            known = ", ".join(n for n, _ in list(module.named_children())[:8])
            raise PassError(
                f"{type(module).__name__} has no layer {path!r}", hint=f"it has {known}"
            ) from error

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                seen[path] = output

        self._handles.append(layer.register_forward_hook(hook))

    def _project(self, path: str, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        if self._options.kind != "features":
            return
        axis = 1 if mine.ndim == 4 else -1
        if mine.ndim != theirs.ndim or (axis == 1 and mine.shape[2:] != theirs.shape[2:]):
            raise PassError(
                f"{path}: {list(mine.shape)} and the teacher's {list(theirs.shape)} cannot be compared"
            )
        if mine.shape[axis] != theirs.shape[axis]:
            a, b = mine.shape[axis], theirs.shape[axis]
            made = nn.Conv2d(a, b, 1, bias=False) if axis == 1 else nn.Linear(a, b, bias=False)
            made = made.to(mine.device)
            if dist.is_available() and dist.is_initialized():
                _share(made.weight)
            self._projections[path.replace(".", "/")] = made

    def parameters(self) -> Sequence[nn.Parameter]:
        """Projections."""
        return list(self._projections.parameters())

    def extra_loss(self, inputs: Batch, outputs: Any) -> torch.Tensor:
        """The distance of the layers, their mean."""
        self._teacher(inputs)
        total = torch.stack([self._distance(a, b) for a, b in self._layers]).mean()
        self._mine.clear()
        return self._options.weight * total

    def _distance(self, a: str, b: str) -> torch.Tensor:
        if a not in self._mine:
            raise PassError(f"{a} was not called in this forward pass")
        mine, theirs = self._mine[a].float(), self._theirs[b].float()
        if self._options.kind == "similarity":
            x, y = (F.normalize((f := z.flatten(1)) @ f.T, dim=1) for z in (mine, theirs))
            return (x - y).square().mean()
        if self._options.kind == "attention":
            axis = 1 if mine.ndim == 4 else -1
            x, y = (F.normalize(z.square().mean(axis).flatten(1), dim=1) for z in (mine, theirs))
            return (x - y).square().sum(1).mean()
        key = a.replace(".", "/")
        x = self._projections[key](mine) if key in self._projections else mine
        return F.mse_loss(x, theirs) / theirs.square().mean().clamp_min(1e-12)

    def state(self) -> dict[str, Any]:
        """The projections are not in the module's own state."""
        return {"projections": dict(self._projections.state_dict())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self._projections.load_state_dict(state["projections"])

    def finish(self) -> Sequence[Change]:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        return [
            Change(rule="distil-features", node=a, detail=f"learned {self._options.kind} of {b}")
            for a, b in self._layers
        ]
