"""What a kernel is: one operator of the domain ``optkit`` with an ONNX function body, and programs that compute it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import onnx
import onnx_ir as ir

from optkit.graph import OPSET
from optkit.kernels.expressions import evaluate, of_shapes
from optkit.targets.gpu import ARCHITECTURES, Capability, formats

if TYPE_CHECKING:
    import numpy as np

    from optkit.rewrite import Rule

DOMAIN = "optkit"
Problem = Mapping[str, int | str | bool]
"""What is fixed when a program is compiled: number format, static sizes, variants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One argument of a program, in the order of its signature.

    Attributes:
        name: As the program calls it.
        type: As Triton writes it: ``*fp16``, ``i32``.
        binds: ``input:<i>`` or ``output:<i>`` of the operator, or an expression of what ``Kernel.sizes`` gives.
        aligned: Whether whoever launches it promises a multiple of 16 (bytes for pointers).
    """

    name: str
    type: str
    binds: str
    aligned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One specialization, ready to be compiled.

    Attributes:
        function: ``package.module:function`` of the source.
        arguments: Of the launch.
        constants: Compile-time arguments, by name.
        grid: Blocks along three axes, expressions of the sizes and ``cdiv``.
        warps: Of a block, as asked for, with 32 threads each: an architecture whose warps have 64 makes half as many of it.
        stages: Of the software pipeline.
        products: Format whose matrix instructions the machine code has to have; None for none.
        low: Whether its tiles have fewer than 64 rows: then these instructions are those of a warp on every architecture.
        waived: Names of gates that need not hold, with the reason.
        aliases: Outputs that are the memory of an input, written in place: index of the output -> index of the input.
    """

    function: str
    arguments: tuple[Argument, ...]
    constants: Mapping[str, int | float | bool | str | None]
    grid: tuple[str, str, str]
    warps: int = 4
    stages: int = 1
    products: str | None = None
    low: bool = False
    waived: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[int, int] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @property
    def config(self) -> str:
        """What tells it from others of its kernel, in words."""
        fixed = " ".join(f"{k}={v}" for k, v in self.constants.items() if v is not None)
        return f"{self.arguments[0].type.lstrip('*')} {fixed}, {self.warps} warps, {self.stages} stages"

    def digest(self) -> str:
        """Of everything in it."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()


class Kernel(ABC):
    """A fused operator.

    Attributes:
        name: As in ``optkit kernels list``.
        op: The operator's name in the domain ``optkit``.
        body: Its ONNX function in text form, with ``%d`` for the opset: what it means, and what runs where it cannot.
        source: Where the method comes from.
        formats: Of its main operand.
        size: How many operators it stands for: larger kernels are tried first.
        examples: Problems that stand for its uses; ``optkit kernels build`` compiles them.
        small: Problems small enough for Triton's interpreter.
    """

    name: ClassVar[str]
    op: ClassVar[str]
    body: ClassVar[str]
    source: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    size: ClassVar[int]
    examples: ClassVar[tuple[Problem, ...]]
    small: ClassVar[tuple[Problem, ...]]

    def function(self) -> ir.Function:
        """The ONNX function."""
        return ir.serde.deserialize_function(onnx.parser.parse_function(self.body % OPSET))

    @abstractmethod
    def rules(self) -> Sequence[Rule]:
        """Where a graph computes what the operator does."""

    @abstractmethod
    def problem(self, node: ir.Node) -> Problem | str:
        """What is to be compiled for a call, or why nothing can be."""

    @abstractmethod
    def program(self, problem: Problem, capability: Capability) -> Program:
        """The specialization for an architecture, by the kernel's configuration table."""

    def finalists(self, problem: Problem, capability: Capability) -> Sequence[Program]:
        """All specializations that are worth a try on a device, the likeliest first: it picks by time.

        Those whose machine code does not pass its gates are left out, and named. Where matrix units wait for memory, how many loads are
        under way at a time is what no table knows; products with a free number of rows differ in their tiles (``Tiled``).
        """
        first = self.program(problem, capability)
        if first.products is None:
            return (first,)
        return (first, *(replace(first, stages=n) for n in (first.stages - 1, first.stages + 1) if n > 0))

    @abstractmethod
    def expressions(self, problem: Problem) -> dict[str, str]:
        """What the names in a program's expressions stand for, by ``elements(<input>)`` and ``axis(<input>, <axis>)``."""

    def sizes(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """The values of ``expressions`` for inputs of ``shapes``."""
        known = of_shapes(shapes)
        return {name: evaluate(text, known) for name, text in self.expressions(problem).items()}

    @abstractmethod
    def outputs(
        self, problem: Problem, shapes: Sequence[tuple[int, ...]]
    ) -> Sequence[tuple[int, ...] | None]:
        """Shapes of the outputs; None for one that nobody reads, where others follow."""

    @abstractmethod
    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        """Random inputs, floats as float32 values that the format holds; ``rows`` is the size of the free axis."""

    @abstractmethod
    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """The outputs in float64."""

    @abstractmethod
    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        """Operations (two for a multiply-add), and bytes read and written once."""

    @abstractmethod
    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        """Of the inputs; ``rows`` is the size of the free axis."""

    @abstractmethod
    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        """Sizes of the free axis that are worth a test: 1 and those around a block."""

    @abstractmethod
    def allowed(self, problem: Problem) -> float:
        """Greatest error of an output that its arithmetic explains in Triton's interpreter, in steps of the format."""

    def unsupported(self, problem: Problem, capability: Capability) -> str | None:
        """Why an architecture cannot compute a problem, by its number formats; None where it can."""
        limits = ARCHITECTURES[capability]
        for fmt in {str(problem[k]) for k in ("format", "stored", "output") if k in problem}:
            if fmt not in formats(capability):
                return f"{limits.arch} has no {fmt}"
        return None

    def output_format(self, problem: Problem, output: int = 0) -> str:
        """Of an output."""
        return str(problem["format"])

    def precision(self, problem: Problem) -> str | None:
        """Format in whose steps errors of floats count, where its operands are coarser than its outputs."""
        return None

    def attributes(self, problem: Problem) -> dict[str, Any]:
        """Of the call that stands for ``problem``."""
        return {}


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()


TYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "int64": ir.DataType.INT64,
}
"""ONNX's types of the formats."""
FLOATS = ("fp32", "fp16", "bf16", "fp8")
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
_TRITON = {"int8": "i8", "fp8": "fp8e4nv"}


def pointer(fmt: str) -> str:
    """The type of a pointer to numbers of a format, as Triton writes it."""
    return f"*{_TRITON.get(fmt, fmt)}"


def format_of(value: ir.Value | None) -> str | None:
    """The format of a value; None where it is none of ``TYPES``."""
    return next((name for name, kind in TYPES.items() if value is not None and value.dtype == kind), None)


def columns_of(value: ir.Value | None) -> int | None:
    """The last axis, where it is fixed."""
    if value is None or value.shape is None or not len(value.shape) or not isinstance(value.shape[-1], int):
        return None
    return value.shape[-1]
