"""What a pass is."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from optkit.rewrite import Change

if TYPE_CHECKING:
    import onnx_ir as ir

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a pass may know beside the model.

    Attributes:
        target: The hardware; passes ask what it can do and never which backend comes next.
        data: Calibration batches, or None.
        placements: Named rows that say where Q/DQ pairs go, as the backend gives them.
        seed: For every random choice.
        memo: What a pass measured on this very graph and data and may need again; keys start with the pass's name.
    """

    target: Target
    data: CalibrationData | None = None
    placements: Mapping[str, Placement] = field(default_factory=dict)
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    memo: dict[Any, Any] = field(default_factory=dict)


class Pass(BaseModel, ABC):
    """A step of a recipe. Its fields are its options; instances are frozen."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )

    name: ClassVar[str]
    stage: ClassVar[Stage]
    needs_data: ClassVar[bool] = False
    exact: ClassVar[bool] = True  # the numbers stay the same but for fp32 rounding


class GraphPass(Pass):
    """A pass over the graph."""

    stage: ClassVar[Stage] = "graph"

    @abstractmethod
    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Edit ``model`` in place and say what changed; a second run changes nothing.

        A valid graph comes in and a valid graph goes out; names, types and shapes of inputs and outputs stay.
        """
