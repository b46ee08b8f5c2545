"""What a pass is."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict

from optkit.errors import BackendUnavailableError
from optkit.rewrite import Change
from optkit.words import Worded

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import onnx_ir as ir

    from optkit.bench import Speedup
    from optkit.data import CalibrationData
    from optkit.placement import Placement
    from optkit.targets import Target

Stage = Literal["torch", "graph"]


class Progress(ABC):
    """Where long work says how far it is; the CLI draws it, the library default is silent."""

    @abstractmethod
    @contextlib.contextmanager
    def task(self, what: str, total: int | None = None) -> Iterator[Any]:
        """Open a task; the value has ``advance(n=1)``."""


class _SilentTask:
    def advance(self, n: int = 1) -> None:
        """Nothing to draw."""


class Silent(Progress):
    """Says nothing."""

    @contextlib.contextmanager
    def task(self, what: str, total: int | None = None) -> Iterator[Any]:
        """A task that nobody watches."""
        yield _SilentTask()


# Inputs of a torch module: positional ones, or named ones.
Batch = tuple[Any, ...] | Mapping[str, Any]


def call(module: Any, batch: Batch) -> Any:
    """The outputs of a torch module, which may write to what is nested in its inputs: those are copies."""
    from optkit.passes.nested import fresh

    batch = fresh(batch)
    return module(**batch) if isinstance(batch, Mapping) else module(*batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What passes over a torch module may know of the training that they are part of.

    Attributes:
        batches: Inputs of the module: to trace it, and to observe it before training starts.
        steps: How many optimizer steps there will be; schedules are shares of it. 0 means none: one shot.
        export: The module as torch writes it as a graph: weights keep the names that they have in the module.
        load: Such a graph in the form that passes over graphs rely on.
        clean: The same, after the exact passes over the graph that the recipe goes on with.
        narrow: Units of a graph to remove so that it runs ``wanted`` times as fast, measured; takes the graph, its
            dependencies, groups, and the importance of their units.
        race: Opens a stopwatch: how many times as fast as a first graph others are, compiled alike and timed in turn.
        loss: ``loss(outputs, index of the batch)`` on ``batches``, for criteria that ask for gradients; None where
            there are no labels.
        teacher: The module to learn from, where it is another one than the module itself.
        assistants: Modules between teacher and student in size, the largest first.
    """

    batches: Sequence[Batch]
    steps: int
    export: Callable[[Any], ir.Model]
    load: Callable[[ir.Model], ir.Model]
    clean: Callable[[ir.Model], ir.Model]
    narrow: Callable[..., set[int]]
    race: Callable[[ir.Model], AbstractContextManager[Callable[[ir.Model], Speedup]]]
    loss: Callable[[Any, int], Any] | None = None
    teacher: Any = None
    assistants: Sequence[Any] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a pass may know beside the model.

    Attributes:
        target: The hardware; passes ask what it can do and never which backend comes next.
        data: Calibration batches, or None.
        placements: Named rows that say where Q/DQ pairs go, as the backend gives them.
        seed: For every random choice.
        memo: What a pass measured on this very graph and data and may need again; keys start with the pass's name.
        training: What passes over a torch module may know; None for passes over a graph.
    """

    target: Target
    data: CalibrationData | None = None
    placements: Mapping[str, Placement] = field(default_factory=dict)
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    memo: dict[Any, Any] = field(default_factory=dict)
    training: Training | None = None


class Pass(Worded, ABC):
    """A step of a recipe. Its fields are its options; instances are frozen."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )

    name: ClassVar[str]
    stage: ClassVar[Stage]
    needs_data: ClassVar[bool] = False
    exact: ClassVar[bool] = True  # the numbers stay the same but for fp32 rounding
    floats: ClassVar[bool] = False  # it changes them by choosing among floats alone: nothing is quantized

    def needs_format(self, context: Context) -> str | None:
        """The number format that the target must have; None where any target will do."""
        return None

    def refuse(self, context: Context) -> None:
        """Say that the target lacks the format: once before any work, and by the pass itself, whoever runs it.

        Raises:
            BackendUnavailableError: It does.
        """
        wanted = self.needs_format(context)
        if wanted is not None and (why := context.target.lacks.get(wanted)) is not None:
            raise BackendUnavailableError(why, hint="choose another --precision")


class GraphPass(Pass):
    """A pass over the graph."""

    stage: ClassVar[Stage] = "graph"

    @abstractmethod
    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Edit ``model`` in place and say what changed; a second run changes nothing.

        A valid graph comes in and a valid graph goes out; names, types and shapes of inputs and outputs stay.
        """


class Attached(ABC):
    """A torch pass at work: what it keeps while the module is trained.

    The session calls ``start`` once all passes of the recipe are attached, ``extra_loss`` after each forward pass,
    ``on_step`` after each optimizer step, ``finish`` at the end.
    """

    def start(self) -> None:  # noqa: B027
        """All passes are attached: the module has the form in which it will be trained."""

    def on_step(self, step: int) -> None:  # noqa: B027
        """The optimizer made its ``step``-th step, counted from 1."""

    def extra_loss(self, inputs: Batch, outputs: Any) -> Any:
        """What to add to the loss of the task, or None."""
        return None

    def task_weight(self) -> float:
        """By how much the loss of the task itself is multiplied."""
        return 1.0

    def settled(self) -> bool:
        """Whether the module has the form that it will have in the end."""
        return True

    def parameters(self) -> Sequence[Any]:
        """Parameters to train that do not belong to the module."""
        return ()

    def moved(self, parameters: Mapping[Any, Any]) -> None:  # noqa: B027
        """Parameters of the module were replaced: sharded ones took the place of whole ones, or the other way around.

        Args:
            parameters: Old ones, and what is in their place.

        Raises:
            UsageError: The pass cannot work on sharded parameters.
        """

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that a checkpoint must hold beside the state of the module."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what ``state`` gave."""

    @abstractmethod
    def finish(self) -> Sequence[Change]:
        """Bring the module to the form that is exported, and say what changed."""


class TorchPass(Pass):
    """A pass over a torch module; its state lives in what ``attach`` gives.

    Classes of this kind are imported where torch is not installed: they import what needs it inside ``attach``.
    """

    stage: ClassVar[Stage] = "torch"

    @abstractmethod
    def attach(self, module: Any, context: Context) -> Attached:
        """Prepare ``module`` in place; ``context.training`` is set."""
