"""What a backend is: it lowers a graph to files, and loads them again as a session."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict

from optkit.errors import DataError, UsageError
from optkit.words import Worded

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import onnx_ir as ir

    from optkit.data import TensorSpec
    from optkit.kernels.gates import LeftOut
    from optkit.placement import Placement
    from optkit.targets import Target


class Options(Worded):
    """How a backend builds and runs; part of a recipe, and kept in the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """One node as the runtime really ran it.

    Attributes:
        op: The runtime's operator.
        where: Execution provider or device.
        format: ``fp32``, ``fp16``, ``int8`` …: what its arithmetic was done in.
        macs: Multiply-accumulates; 0 for operators without products.
        seconds: Wall-clock of this run; for shares alone, a profiled run is not a measurement.
    """

    name: str
    op: str
    where: str
    format: str
    macs: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Eligible:
    """Which parts of a device may run an operation, by documented rules: predicted, never observed.

    Attributes:
        op: The runtime's operator.
        units: Best first.
        reason: Why one is missing, or what is to be known of the first; empty where there is nothing to say.
    """

    name: str
    op: str
    units: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """How long a run takes on hardware that is not at hand: computed, never measured.

    Attributes:
        floor: Seconds that arithmetic and memory traffic need at the target's peak rates (roofline).
        low: Seconds, the optimistic end of what is expected.
        high: Seconds, the pessimistic end.
        bound: What the floor comes from: ``compute`` or ``memory``.
        inputs: Shapes that it is for, in words; empty where that does not matter.
    """

    floor: float
    low: float
    high: float
    bound: str
    inputs: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What was done on the device that an artifact is for.

    Attributes:
        device: Its name, driver, clocks.
        cosine: Lowest of any output to what the graph computes on a CPU.
        batches: One record a batch: median, spread and number of runs by the clock of the device, in milliseconds.
        left: Of the deferred steps those that are still to be done.
    """

    device: Mapping[str, Any]
    cosine: float
    batches: tuple[Mapping[str, Any], ...]
    left: tuple[str, ...] = ()


Task = Callable[[str], AbstractContextManager[object]]
Mark = Callable[[str, bool], None]
"""Says of an evidence, by its name in ``optkit.report.Evidence``, whether it is there: written down at once."""


class Session(ABC):
    """A loaded artifact.

    Attributes:
        inputs: What each run takes.
        outputs: What it gives.
        kept: Inputs of the model that the artifact keeps from run to run; they are set where all of them are given.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kept: tuple[TensorSpec, ...] = ()

    @abstractmethod
    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, for one batch."""

    @abstractmethod
    def close(self) -> None:
        """Give memory and files back."""

    def reset(self) -> None:  # noqa: B027  (most keep nothing)
        """Forget what is kept from run to run, as in front of another sequence."""

    def takes(self, feeds: Mapping[str, np.ndarray]) -> bool:
        """Whether it was built for inputs of these sizes; a runtime that fixes sizes says no to others."""
        return True

    def admit(self, feeds: Mapping[str, np.ndarray]) -> None:  # noqa: B027  (most refuse by themselves)
        """Refuse inputs of sizes that what it stands in for was not built for, though it runs them.

        Raises:
            DataError: Says which axis, and how it is built for more.
        """

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def misnamed(wanted: Iterable[str], feeds: Mapping[str, object]) -> DataError:
    """The error for inputs of other names than a session's."""
    return DataError(f"the inputs are {', '.join(wanted)}; given: {', '.join(feeds) or 'nothing'}")


def mistyped(name: str, given: np.dtype[Any], wanted: object) -> DataError:
    """The error for an input of another type than a session's."""
    return DataError(f"input {name!r} is {given}, the model takes {wanted}")


class Backend(ABC):
    """Turns graphs into artifacts for one runtime.

    Attributes:
        name: As in ``--backend``.
        options: The type of its options.
        placements: Rows for the placement pass, by name.
        packages: Distributions whose versions the manifest names, besides optkit's own requirements.
        stands_in: Whether what ``load`` opens computes the same in another runtime, so that its time means nothing.
        fixes: Whether what it builds runs inputs within the sizes of ``span`` alone, so that an evaluator's samples count as well.
        generic: Whether quantized recipes that name no backend are candidates for it.
        dynamic_in_floats: Whether integer products with scales of each run may be written out in floats where it has none: a file with
            them then runs and stays small, and is no faster than in float.
        halves_in_floats: Whether it computes in float32 what a file computes in float16.
        doubles_in_floats: The same of what it computes in float64 between inputs and outputs of other types.
        zero_points_apart: Whether zero points of weights in 4 bits are taken out of products, where it has none.
        floor: The recipe of exact passes that ships where no other candidate keeps the limits; ``fallback`` asks the target.
    """

    name: ClassVar[str]
    options: ClassVar[type[Options]]
    placements: ClassVar[Mapping[str, Placement]] = {}
    packages: ClassVar[tuple[str, ...]] = ()
    stands_in: ClassVar[bool] = False
    fixes: ClassVar[bool] = False
    generic: ClassVar[bool] = True
    dynamic_in_floats: ClassVar[bool] = False
    halves_in_floats: ClassVar[bool] = False
    doubles_in_floats: ClassVar[bool] = False
    zero_points_apart: ClassVar[bool] = False
    floor: ClassVar[str] = "fp32"

    @abstractmethod
    def available(self) -> str | None:
        """None, or why it can't work on this machine."""

    def ready(self, target: Target, options: Any) -> None:  # noqa: B027  (most can serve all their targets)
        """Refuse, before any work, what ``lower`` would refuse whatever the graph is.

        Raises:
            OptkitError: Says what is missing.
        """

    def settled(self, target: Target, options: Any) -> Any:
        """``options`` with what they leave open decided: for ``target``, and by what is at hand on this machine."""
        return options

    def mode(self, options: Any) -> str | None:
        """Of several ways to make what runs, the one that settled ``options`` mean, by name and in words; None where there is one."""
        return None

    def finishes(self, options: Any) -> bool:
        """Whether the device is that of this machine, so that ``compile`` goes on with ``finalize``."""
        return False

    @abstractmethod
    def unsupported(self, node: ir.Node, target: Target) -> str | None:
        """None, or why the runtime can't run ``node`` on ``target``."""

    def settles(self, node: ir.Node) -> bool:
        """Whether ``lower`` may write out a node that it cannot run, and that nothing can stand for while sizes are free."""
        return False

    @abstractmethod
    def lower(self, model: ir.Model, target: Target, options: Any, path: Path) -> None:
        """Write the artifact's files into the folder ``path``; the one place of a backend that writes."""

    @abstractmethod
    def load(self, path: Path, target: Target, options: Any, *, threads: int | None = None) -> Session:
        """Open what ``lower`` wrote. ``threads`` overrides what the options say."""

    def predict(self, path: Path, target: Target, options: Any, *, threads: int | None = None) -> Session:
        """Open what ``lower`` wrote so that it gives the numbers that ``target`` gives, at whatever speed.

        Where the arithmetic of a target that is not at hand differs from this machine's, this is where it is emulated.
        """
        return self.load(path, target, options, threads=threads)

    def on_device(self, path: Path, target: Target, options: Any) -> Session:
        """Open what ``lower`` wrote on the device itself, where ``load`` opens what stands in for it.

        Raises:
            BackendUnavailableError: The device is not at hand.
            UsageError: There is no such difference, or the device is another one.
        """
        raise UsageError(
            f"optkit has no runtime for {self.name} artifacts on another device",
            hint="optkit.load(...).run(...)",
        )

    def prediction(self, target: Target) -> str | None:
        """What ``predict`` does to give the numbers of ``target``, in words; None where it runs what is there as it is."""
        return None

    @abstractmethod
    def executed(
        self, path: Path, target: Target, options: Any, feeds: Mapping[str, np.ndarray]
    ) -> Sequence[Executed]:
        """Run once with the runtime's own profiler, and give back what was executed."""

    def eligibility(self, path: Path, target: Target, options: Any) -> Sequence[Eligible]:
        """For a target that is not at hand: which of its units may run each operation of what was written; empty where they are alike."""
        return ()

    def estimate(self, model: ir.Model, target: Target, options: Any) -> Estimate | None:
        """How long a run of ``model``, as it would be lowered, takes on ``target``; None where nothing is known."""
        return None

    def evidence(self, path: Path, target: Target, options: Any) -> frozenset[str]:
        """For a target that is not at hand: what was done all the same, by the names of ``optkit.report.Evidence``.

        That the files were written and that ``load`` ran them here, optkit knows by itself.
        """
        return frozenset()

    def left_out(self, path: Path, target: Target, options: Any) -> Sequence[LeftOut]:
        """Of programs among which the device chooses, those that were compiled and are not in ``path``, with the reason."""
        return ()

    def deferred(self, path: Path, target: Target, options: Any) -> Sequence[str]:
        """For a target that is not at hand: what is left to do there, each step in words with its command."""
        return ()

    def finalize(
        self, path: Path, target: Target, options: Any, task: Task, mark: Mark, *, force: bool
    ) -> Finished:
        """Do on the device, in the artifact ``path``, what ``deferred`` lists; what is done already is not repeated.

        Args:
            task: Opens a task of the progress display, by its name.
            mark: Takes each evidence when it is reached, and takes it back where a step is repeated.
            force: Repeat it all the same.

        Raises:
            UsageError: There is nothing that could be done there.
        """
        raise UsageError(
            f"artifacts of {self.name} are complete as they are: nothing is left to do on the device",
            hint="optkit bench times them",
        )

    def runner(
        self, model: bytes, feeds: Mapping[str, np.ndarray], precision: str
    ) -> Callable[[], object] | None:
        """A small ONNX file, ready to run on one thread with products in ``precision``; None where that is not on offer."""
        return None

    def size(self, path: Path) -> int:
        """Bytes of what is deployed of the files in ``path``."""
        return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())

    def weights(self, path: Path) -> dict[str, int] | None:
        """Bytes of weights by stored type, read back from the files in ``path``; None where they are as in the graph."""
        return None

    def fit(self, options: Any, shapes: Mapping[str, tuple[int, ...]] | None) -> Any:
        """``options`` for inputs that usually have ``shapes``; None where they have no usual shape.

        An option ``usual`` that is empty takes them.
        """
        if shapes is None or getattr(options, "usual", True):
            return options
        return options.model_copy(update={"usual": dict(shapes)})

    def parallel(self, options: Any, *, threads: int, streams: int) -> Any | None:
        """``options`` for ``streams`` requests at the same time on ``threads`` threads in all; None where that cannot be set."""
        return None

    def parallelism(self, options: Any) -> tuple[int, int]:
        """Threads (0: not fixed) and streams that ``options`` stand for."""
        return 0, 1

    def span(self, model: ir.Model, options: Any, sizes: Mapping[str, Sequence[tuple[int, int, int]]]) -> Any:
        """``options`` for inputs whose axes have these sizes in the data: smallest, usual, largest of each."""
        return options

    def usual(self, model: ir.Model, options: Any) -> Mapping[str, tuple[int, ...]]:
        """Shapes that ``options`` say inputs of ``model`` usually have; those that they leave open are missing."""
        return {}

    def sizes(self, model: ir.Model, options: Any) -> Mapping[str, int]:
        """Sizes that the options ask for, by symbol of the free axis: inputs that are drawn have them.

        Raises:
            UsageError: The options name an axis that the model does not have.
        """
        return {}

    def fed(self, options: Any, feeds: Mapping[str, np.ndarray], *, drawn: bool) -> dict[str, np.ndarray]:
        """``feeds`` as inputs that ``options`` let the artifact be given, such as what becomes of pixels.

        Args:
            drawn: From N(0, 1); else they are examples, and become what is nearest.
        """
        return dict(feeds)

    def exact(self, options: Any) -> Any:
        """``options``, changed only where they ask for less than float32 arithmetic of a float32 graph."""
        return options

    def widest(self, options: Any, target: Target) -> Any:
        """``options`` with the widest floats that ``target`` computes in: what ships where fewer bits miss the limits."""
        return self.exact(options)

    def fallback(self, target: Target) -> str:
        """The recipe that ships where no other candidate for ``target`` keeps the limits."""
        return self.floor

    def narrows(self, options: Any) -> bool:
        """Whether ``options`` let inputs, or what is kept between runs, hold less than the graph's types do."""
        return False

    def variants(
        self,
        model: ir.Model,
        target: Target,
        options: Any,
        path: Path,
        feeds: Sequence[Mapping[str, np.ndarray]],
    ) -> Sequence[Any]:
        """Other options worth measuring; may be empty.

        Args:
            model: The graph.
            path: What it was lowered to, with ``options``.
            feeds: What timing runs on, at least one.
        """
        return ()
