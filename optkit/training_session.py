"""Compression inside the user's own training loop: the torch passes of a recipe, attached to a module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optkit.errors import OptkitError, UsageError
from optkit.passes.base import Attached, Batch, Context, TorchPass
from optkit.recipe import Recipe
from optkit.report import Report
from optkit.targets import Target

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch import nn

    from optkit.artifact import Artifact
    from optkit.rewrite import Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What ``finish`` gives.

    Attributes:
        module: The module that was trained, in the form that is exported.
        changes: What the passes did, by their names in the recipe.
        recipe: What remains for ``compile``: passes over the graph, or candidates.
    """

    module: nn.Module
    changes: Mapping[str, Sequence[Change]]
    recipe: Recipe
    _export: Callable[[nn.Module], ir.Model] = field(repr=False)

    def export(self) -> ir.Model:
        """The module as a graph that was compared with it, at other sizes of its free axes too.

        Raises:
            ModelError: It computes something else than the module.
        """
        return self._export(self.module)

    def compile(self, **options: Any) -> tuple[Artifact, Report]:
        """``optkit.compile`` of the module with the rest of the recipe; ``data`` has the sizes that it is to be fast at."""
        from optkit.compiler import compile

        return compile(self.export(), recipe=self.recipe, **options)


class TrainingSession:
    """The torch passes of a recipe at work on a module.

        session = optkit.training(model, "int8-qat", example=(images,), steps=1000)
        optimizer = torch.optim.AdamW(session.parameters())
        for images, labels in loader:
            outputs = model(images)
            loss = session.loss(criterion(outputs, labels), (images,), outputs)
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            session.step()
        artifact, report = session.finish().compile(target="cpu")

    The optimizer must be made after the session: passes add parameters, and some replace those of the module. Parameters
    that ``fully_shard`` spreads over processes are sharded between the two.
    ``loss`` and ``step`` never wait for the device.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        target: Target,
        context: Context,
        export: Callable[[nn.Module], ir.Model],
    ) -> None:
        self.module, self.recipe, self.target = module, recipe, target
        self.steps = 0
        self._export, self._finished = export, False
        self._attached: list[tuple[str, Attached]] = []
        for step in recipe.passes:
            if not isinstance(step, TorchPass):
                continue
            with _named(step.name):
                self._attached.append((step.name, step.attach(module, context)))
        for name, attached in self._attached:
            with _named(name):
                attached.start()
        self._known = dict(module.named_parameters())

    @property
    def settled(self) -> bool:
        """Whether schedules have come to their end: what is trained from now on is what will be deployed."""
        return all(attached.settled() for _, attached in self._attached)

    def parameters(self) -> list[nn.Parameter]:
        """All that is to be trained: the module's parameters and those that passes added, each once."""
        self._take_in()
        own = [p for p in self.module.parameters() if p.requires_grad]
        more = [p for _, attached in self._attached for p in attached.parameters()]
        return list(dict.fromkeys([*own, *more]))

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer; biases, norms and step sizes, which have fewer than two axes, do not decay."""
        found = self.parameters()
        return [
            {"params": [p for p in found if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in found if p.ndim < 2], "weight_decay": 0.0},
        ]

    def loss(self, task: torch.Tensor, inputs: Batch, outputs: Any) -> torch.Tensor:
        """The loss of the task with what the passes add to it.

        Args:
            task: The loss of the task itself.
            inputs: Of the module, as it was called: positional ones as a tuple, or named ones as a mapping.
            outputs: What it gave.
        """
        self._check_open("loss")
        if self.steps == 0 and not self._sharded():
            # While they are gathered for a step, sharded parameters are others again.
            self._take_in()
        total = task
        for _, attached in self._attached:
            total = total * attached.task_weight()
        for _, attached in self._attached:
            extra = attached.extra_loss(inputs, outputs)
            if extra is not None:
                total = total + extra
        return total

    def step(self) -> None:
        """The optimizer has made a step."""
        import torch

        self._check_open("step")
        if self.steps == 0:
            self._take_in()
        self.steps += 1
        with torch.no_grad():
            for _, attached in self._attached:
                attached.on_step(self.steps)

    def follow(self, optimizer: torch.optim.Optimizer) -> Any:
        """Call ``step`` after each step of ``optimizer``, for loops that the caller does not write.

        Steps that a gradient scaler leaves out do not count. Gives the handle; ``remove()`` ends it.
        """
        return optimizer.register_step_post_hook(lambda *_: self.step())

    def finish(self) -> Trained:
        """Bring the module to the form that is exported; the session is over.

        Parameters sharded by ``fully_shard`` are whole again afterwards, in every process; each must call it.

        Raises:
            PassError: A pass changed nothing.
        """
        import torch

        self._check_open("finish")
        if self._sharded():
            from optkit.training_sharded import gather

            gather(self.module)
        self._take_in()
        self._finished = True
        changes: dict[str, list[Change]] = {}
        with torch.no_grad():
            for name, attached in self._attached:
                with _named(name):
                    changes.setdefault(name, []).extend(attached.finish())
        self.module.eval()
        rest = tuple(p for p in self.recipe.passes if not isinstance(p, TorchPass))
        return Trained(
            module=self.module,
            changes=changes,
            recipe=self.recipe.model_copy(update={"passes": rest}),
            _export=self._export,
        )

    def state_dict(self) -> dict[str, Any]:
        """Steps and the passes' own state; the module's is the caller's, as ``module.state_dict()``."""
        return {
            "steps": self.steps,
            "passes": [attached.state() for _, attached in self._attached],
            "names": [name for name, _ in self._attached],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            UsageError: It is from another recipe.
        """
        names = [name for name, _ in self._attached]
        if list(state["names"]) != names:
            raise UsageError(
                f"the checkpoint is of a session with {', '.join(state['names']) or 'no passes'}, this one has "
                f"{', '.join(names) or 'none'}",
                hint="resume with the recipe that the training started with",
            )
        self.steps = int(state["steps"])
        for (_, attached), saved in zip(self._attached, state["passes"], strict=True):
            attached.restore(saved)

    def _sharded(self) -> bool:
        from optkit.training_sharded import is_sharded

        return is_sharded(self.module)

    def _take_in(self) -> None:
        """Tell the passes which parameters took the place of those that they know."""
        from optkit.training_sharded import replaced

        now = dict(self.module.named_parameters())
        if all(now.get(name) is p for name, p in self._known.items()):
            return
        parameters = replaced(self._known, self.module)
        if parameters is None or not (self._sharded() or _was_sharded(self._known)):
            raise UsageError(
                "the module's parameters are not those that the session was made with",
                hint="make the session last, on the device that trains; of the wrappers that replace parameters, only "
                "torch.distributed.fsdp.fully_shard works with a session: after it, and before the optimizer",
            )
        for name, attached in self._attached:
            with _named(name):
                attached.moved(parameters)
        self._known = now

    def _check_open(self, what: str) -> None:
        if self._finished:
            raise UsageError(f"{what}: the session is finished", hint="start another with optkit.training")


def _was_sharded(parameters: Mapping[str, nn.Parameter]) -> bool:
    return any(hasattr(p, "full_tensor") for p in parameters.values())


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the name of the pass before what it complains about."""
    try:
        yield
    except OptkitError as error:
        error.args = (f"{name}: {error}",)
        raise
