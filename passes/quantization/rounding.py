"""Adaptive rounding: weights are rounded up or down so that a layer's outputs, and not its weights, come out close."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optkit.errors import DataError
from optkit.formats import Format
from optkit.graph import attribute
from optkit.reference import ReferenceSession

if TYPE_CHECKING:
    from optkit.passes.base import Context

# Bytes of second moments, and of the values that they are taken of, that may be alive at a time.
_WINDOW = 512 << 20
# Inputs of one output that a layer may have: second moments grow with their square.
LARGEST = 4608
# Vectors that a batch adds to the second moments of a layer, evenly spread.
_VECTORS = 2048
# Vectors of a layer that are multiplied at a time.
_TOGETHER = 64
# A flip must lower a row's error by more than this share of the mean second moment: less is rounding.
_GAIN = 1e-9


def round_by_outputs(weight: np.ndarray, scale: np.ndarray, moments: np.ndarray, fmt: Format) -> np.ndarray:
    """Integers for ``weight`` that minimise ``E (w x - s q x)^2`` of every row among those next to ``w / s``.

    The error is ``d H d`` with ``d = s q - w`` and ``H = E[x x^T]``, so which way each weight is rounded is a quadratic
    binary problem (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020, arXiv:2004.10568,
    eq. 13). From the nearest integers on, the one flip that lowers a row's error most is made, until none lowers it: the
    error never exceeds that of rounding to nearest.

    Args:
        weight: ``[out, in]``.
        scale: ``[out]`` or ``[]``, positive.
        moments: ``[in, in]``, symmetric.

    Returns:
        ``[out, in]`` in the storage type of ``fmt``, within its range.
    """
    exact = weight.astype(np.float64) / np.asarray(scale, np.float64).reshape(-1, 1)
    q = np.clip(np.round(exact), fmt.low, fmt.high)
    step = np.clip(np.where(exact > q, q + 1, q - 1), fmt.low, fmt.high) - q
    h = moments.astype(np.float64)
    diagonal = np.diag(h)
    # Half the slope of the error, in steps: a flip by t changes it by t (2 slope + t H_jj).
    slope = (q - exact) @ h
    rows = np.arange(len(q))
    while len(rows):
        change = step[rows] * (2 * slope[rows] + step[rows] * diagonal)
        best = change.argmin(1)
        better = change[np.arange(len(rows)), best] < -_GAIN * diagonal.mean()
        rows, best = rows[better], best[better]
        move = step[rows, best]
        q[rows, best] += move
        step[rows, best] = -move
        slope[rows] += move[:, None] * h[best]
    return q.astype(fmt.dtype.numpy())


def as_rows(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """``[groups, outputs of a group, inputs of an output]``: the weights of Conv, Gemm or MatMul as ``_vectors`` reads inputs."""
    if node.op_type == "Conv":
        group = node.attributes.get_int("group", 1)
        return weight.reshape(group, len(weight) // group, -1)
    return (weight if attribute(node, "transB", 0) else weight.T)[None]


def from_rows(node: ir.Node, rows: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """``as_rows`` undone."""
    if node.op_type == "Conv":
        return rows.reshape(tuple(shape))
    return rows[0] if attribute(node, "transB", 0) else np.ascontiguousarray(rows[0].T)


def second_moments(model: ir.Model, nodes: Sequence[ir.Node], context: Context) -> dict[ir.Node, np.ndarray]:
    """``E[x x^T]`` of what each output of every node reads, over the calibration data.

    Args:
        nodes: Conv with two spatial axes, Gemm and MatMul of the main graph; what reads more than ``LARGEST`` inputs an
            output is left out.

    Returns:
        ``[groups, in, in]`` in float64 by node.

    Raises:
        DataError: There is no data.
    """
    found: dict[ir.Node, np.ndarray] = {}
    for window in moments_by_window(model, [n for n in nodes if fits(n)], context):
        found |= window
    return found


def moments_by_window(
    model: ir.Model, nodes: Sequence[ir.Node], context: Context
) -> Iterator[dict[ir.Node, np.ndarray]]:
    """The same, for as many nodes at a time as fit into memory together; all must be such as ``fits`` says.

    Raises:
        DataError: There is no data.
    """
    if context.data is None:
        raise DataError("adaptive rounding needs calibration data", hint="give --calib")
    for window in _windows(nodes):
        session = ReferenceSession(
            model, outputs=list(dict.fromkeys(str(n.inputs[0].name) for n in window if n.inputs[0]))
        )
        found = {node: _Moments() for node in window}
        with context.progress.task("observe second moments", len(context.data)) as task:
            for batch in context.data:
                values = session.run(batch)
                for node, moments in found.items():
                    assert node.inputs[0] is not None
                    moments.add(_vectors(node, values[str(node.inputs[0].name)]))
                task.advance()
        session.close()
        yield {node: moments.mean(len(context.data)) for node, moments in found.items()}


class _Moments:
    """The mean over batches of the mean of ``x x^T``, ``[groups, in, in]``.

    Vectors wait until there are some: the product of a single one with itself is as much to write as that of many.
    """

    def __init__(self) -> None:
        self._waiting: list[np.ndarray] = []
        self._count = 0
        self._sum: np.ndarray | None = None

    def add(self, vectors: np.ndarray) -> None:
        """Those of a batch, ``[groups, vectors, in]``."""
        self._count += vectors.shape[1]
        self._waiting.append(vectors.astype(np.float64) / np.sqrt(vectors.shape[1]))
        if sum(x.shape[1] for x in self._waiting) >= _TOGETHER:
            self._take()

    def mean(self, batches: int) -> np.ndarray:
        """Of all batches, of which there is one at least.

        Fewer vectors than inputs leave directions of which nothing is known, and errors that are moved there count for
        nothing: what lies beside the diagonal is shrunk by the share of them that there are (after Ledoit and Wolf, 2004).
        """
        self._take()
        assert self._sum is not None
        found = self._sum / batches
        share = min(1.0, self._count / found.shape[1])
        places = np.arange(found.shape[1])
        diagonal = found[:, places, places]
        found *= share
        found[:, places, places] = diagonal
        return found

    def _take(self) -> None:
        if not self._waiting:
            return
        x = np.concatenate(self._waiting, 1)
        self._waiting.clear()
        product = x.transpose(0, 2, 1) @ x
        if self._sum is None:
            self._sum = product
        else:
            self._sum += product


def fits(node: ir.Node) -> bool:
    """Whether the second moments of what ``node`` reads can be observed: its weights' form, and their number."""
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    shape = weight.shape.numpy()
    if node.op_type == "Conv":
        return len(shape) == 4 and int(np.prod(shape[1:])) <= LARGEST
    return len(shape) == 2 and max(shape) <= LARGEST


def _windows(nodes: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """Groups whose second moments fit into memory together."""
    windows: list[list[ir.Node]] = [[]]
    used = 0
    for node in nodes:
        weight = node.inputs[1]
        assert weight is not None and weight.shape is not None
        shape = weight.shape.numpy()
        group = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
        wide = int(np.prod(shape[1:])) if node.op_type == "Conv" else max(shape)
        size = 8 * group * wide * wide
        if windows[-1] and used + size > _WINDOW:
            windows.append([])
            used = 0
        windows[-1].append(node)
        used += size
    return [w for w in windows if w]


def _vectors(node: ir.Node, x: np.ndarray) -> np.ndarray:
    """``[groups, vectors, in]``: what single outputs of ``node`` read, evenly spread over ``x``."""
    if node.op_type != "Conv":
        flat = x.reshape(-1, x.shape[-1])
        return flat[:: -(-len(flat) // _VECTORS)][None]
    assert node.inputs[1] is not None and node.inputs[1].shape is not None
    kernel = node.inputs[1].shape.numpy()[2:]
    strides, dilations = (tuple(node.attributes.get_ints(k, (1, 1))) for k in ("strides", "dilations"))
    group = node.attributes.get_int("group", 1)
    # Padding is left out: what lies at the border would only add zeros.
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if any(size < r for size, r in zip(x.shape[2:], reach, strict=True)):
        x = np.pad(
            x, ((0, 0), (0, 0), *((0, max(0, r - s)) for s, r in zip(x.shape[2:], reach, strict=True)))
        )
    seen = np.lib.stride_tricks.sliding_window_view(x, reach, axis=(2, 3))
    seen = seen[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    # [batch, channels, h, w, kh, kw] -> [batch * h * w, channels, kh, kw]
    count = seen.shape[0] * seen.shape[2] * seen.shape[3]
    chosen = np.unravel_index(np.arange(0, count, -(-count // _VECTORS)), (seen.shape[0], *seen.shape[2:4]))
    picked = seen[chosen[0], :, chosen[1], chosen[2]]
    return np.ascontiguousarray(picked.reshape(len(picked), group, -1).transpose(1, 0, 2))
