"""What LiteRT's kernels take: element types of tensors that lie on no grid, and how many axes.

A kernel that computes on grids takes 8-bit integers without one for integers of scale 0: it stops the process (``add.cc``,
``comparisons.cc``) or gives zeros (``mul.cc``). The rows are those of ai-edge-litert 2.3, of its own kernels as of XNNPACK's:
a file has to run with either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optkit.backends.litert.flat import Tensor

_FLOAT = frozenset({"float32"})
_SHORT = frozenset({"float32", "int32"})
_WIDE = frozenset({"float32", "int32", "int64"})
_NUMBERS = _WIDE | {"int8", "uint8"}
_ANY = _NUMBERS | {"bool"}
_FIRST, _PAIR = (0, 1, 1), (0, 2, 1)
# Types that hold all values of a narrow one, and wrap around to it again; of booleans, also what a reduction of nothing gives.
_WIDER = {"int8": ("int32",), "uint8": ("int32",), "bool": ("uint8", "int32")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One operator of the file.

    Attributes:
        types: What its operands may be without a grid.
        grids: Whether they may also be int8 on a grid.
        operands: Which of its inputs have to be of one type, as in a slice; others are sizes, weights, conditions.
        axes: At most.
    """

    types: frozenset[str]
    grids: bool = False
    operands: tuple[int, int | None, int] = _FIRST
    axes: int = 8


def _rows(names: str, types: frozenset[str], **more: Any) -> dict[str, Kernel]:
    return dict.fromkeys(names.split(), Kernel(types=types, **more))


KERNELS: dict[str, Kernel] = {
    **_rows("CEIL COS ELU EXP FLOOR GELU HARD_SWISH LEAKY_RELU LOG LOGISTIC LOG_SOFTMAX RELU RELU6 ROUND RSQRT SIN", _FLOAT),
    **_rows("SQRT TANH RESIZE_BILINEAR", _FLOAT),
    **_rows("SOFTMAX", _FLOAT, axes=6),
    **_rows("CONV_2D DEPTHWISE_CONV_2D FULLY_CONNECTED AVERAGE_POOL_2D QUANTIZE", _FLOAT, grids=True),
    **_rows("TRANSPOSE_CONV", _FLOAT, operands=(1, 3, 1)),
    **_rows("PRELU", _FLOAT, operands=_PAIR),
    **_rows("BATCH_MATMUL", _FLOAT, operands=_PAIR, axes=5),
    **_rows("DEQUANTIZE", frozenset({"float16"}), grids=True),
    **_rows("ABS SIGN", _SHORT),
    **_rows("DIV POW SQUARED_DIFFERENCE", _SHORT, operands=_PAIR),
    **_rows("NEG CUMSUM", _WIDE),
    **_rows("SUM", _WIDE, axes=6),
    **_rows("MEAN", _WIDE, grids=True, axes=6),
    **_rows("ADD SUB MUL", _WIDE, grids=True, operands=_PAIR),
    **_rows("FLOOR_MOD GREATER GREATER_EQUAL LESS LESS_EQUAL", _WIDE, operands=_PAIR),
    **_rows("EQUAL", _WIDE | {"bool"}, operands=_PAIR),
    **_rows("MAXIMUM MINIMUM", _NUMBERS, operands=_PAIR),
    **_rows("REDUCE_MAX REDUCE_MIN", _NUMBERS, axes=6),
    **_rows("REDUCE_PROD SPLIT_V DEPTH_TO_SPACE SPACE_TO_DEPTH", _NUMBERS),
    **_rows("ARG_MAX ARG_MIN", _ANY - {"int64"}),
    **_rows("MAX_POOL_2D", frozenset({"float32", "int8", "uint8"}), grids=True),
    **_rows("RESIZE_NEAREST_NEIGHBOR", _ANY - {"int64"}),
    **_rows("BROADCAST_TO", _ANY - {"int8"}),
    **_rows("GATHER SLICE TILE MIRROR_PAD", _ANY),
    **_rows("CAST RESHAPE", _ANY | {"float16"}, grids=True),
    **_rows("TRANSPOSE STRIDED_SLICE", _ANY, grids=True),
    **_rows("PAD", _ANY, grids=True, axes=5),
    **_rows("PADV2", _ANY, operands=(0, 3, 2), axes=5),
    **_rows("CONCATENATION", _ANY, grids=True, operands=(0, None, 1), axes=6),
    **_rows("GATHER_ND", _ANY),
    **_rows("SCATTER_ND", _ANY, operands=(1, 2, 1)),
    **_rows("TOPK_V2", _WIDE),
    **_rows("ONE_HOT", frozenset({"float32", "int32", "int64", "bool"}), operands=(2, 4, 1)),
    **_rows("RANDOM_STANDARD_NORMAL RANDOM_UNIFORM", frozenset({"int32"})),
    **_rows("ATAN2", _FLOAT, operands=_PAIR),
    **_rows("SELECT_V2", _ANY, operands=(1, 3, 1)),
    **_rows("LOGICAL_AND LOGICAL_OR", frozenset({"bool"}), operands=_PAIR),
    **_rows("LOGICAL_NOT", frozenset({"bool"})),
}  # fmt: skip


class NotTakenError(TypeError):
    """A kernel does not take these operands; whoever emits a node names it."""


def wider(code: str, inputs: Sequence[Tensor]) -> str | None:
    """The type to compute in, where the kernel does not take that of its operands but one that holds all their values."""
    kernel = KERNELS[code]
    kinds = {t.dtype.name for t in inputs[slice(*kernel.operands)] if t.grid is None}
    narrow = next(iter(kinds - kernel.types), "") if len(kinds) == 1 else ""
    return next((k for k in _WIDER.get(narrow, ()) if k in kernel.types), None)


def check(code: str, inputs: Sequence[Tensor]) -> None:
    """Whether the kernel takes these inputs.

    Raises:
        NotTakenError: It does not, and would give other numbers or stop the process.
    """
    kernel = KERNELS[code]
    operands = inputs[slice(*kernel.operands)]
    kinds = dict.fromkeys("int8 on a grid" if t.grid is not None else t.dtype.name for t in operands)
    if len(kinds) > 1:
        raise NotTakenError(f"LiteRT's {code} takes operands of one type, not {' and '.join(kinds)}")
    taken = sorted(kernel.types) + ["int8 on a grid"] * kernel.grids
    if not kinds.keys() <= set(taken):
        raise NotTakenError(f"LiteRT's {code} takes {', '.join(taken)}, not {', '.join(kinds)}")
    axes = max(len(t.shape) for t in operands)
    if axes > kernel.axes:
        raise NotTakenError(f"LiteRT's {code} takes at most {kernel.axes} axes, not {axes}")
