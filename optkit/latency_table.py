"""How long single layers take at any width, measured in the runtime that they will run in, when first asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optkit.errors import BackendUnavailableError
from optkit.graph import IR_VERSION, OPSET, attribute
from optkit.inference import infer

if TYPE_CHECKING:
    from optkit.backends.base import Backend
    from optkit.passes.pruning.dependencies import Dependencies, Group

Shape = tuple[int, ...]
# The shape of an operand, and of each axis and group how many positions belong to the group.
_Operand = tuple[Shape, list[tuple[int, int, int]]]

# Operators whose time depends on the widths of weights.
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Runs of one layer: at least, at most, and CPU seconds after which no more are made.
_FEWEST, _MOST, _SECONDS = 5, 60, 0.004


class LatencyTable:
    """CPU seconds of layers on one thread, by operator, attributes and shapes.

    Args:
        backend: Whose kernels are timed.

    Attributes:
        entries: How many were measured.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._seconds: dict[object, float] = {}

    @property
    def entries(self) -> int:
        """How many layers were measured."""
        return len(self._seconds)

    def seconds(self, node: ir.Node, shapes: Sequence[Shape]) -> float:
        """The least time of ``node`` with inputs of these shapes; all but the first are weights.

        Raises:
            BackendUnavailableError: The backend runs no single layers on this machine.
        """
        groups = attribute(node, "group", 1)
        if node.op_type == "Conv" and groups != 1:
            # A depthwise convolution has as many groups as channels, whatever their number.
            groups = shapes[0][1] // shapes[1][1]
        own = tuple(
            (a.name, str(a.value))
            for a in node.attributes.values()
            if isinstance(a, ir.Attr) and a.name != "group"
        )
        key = (node.op_type, own, groups, tuple(shapes))
        if key not in self._seconds:
            self._seconds[key] = self._measured(node, int(groups), shapes)  # type: ignore[call-overload]
        return self._seconds[key]

    def _measured(self, node: ir.Node, groups: int, shapes: Sequence[Shape]) -> float:
        model, feeds = _layer(node, groups, shapes)
        run = self._backend.runner(model, feeds, "fp32")
        if run is None:
            raise BackendUnavailableError(
                f"backend {self._backend.name} runs no single layers on this machine, so widths cannot be chosen by latency",
                hint="choose --backend onnxruntime or openvino, or prune by --ratio",
            )
        return _least(run)


def _layer(node: ir.Node, groups: int, shapes: Sequence[Shape]) -> tuple[bytes, Mapping[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    x, *weights = (
        ir.Value(name=f"input_{i}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for i, shape in enumerate(shapes)
    )
    for value, shape in zip(weights, shapes[1:], strict=True):
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=value.name)
    attributes = [a for a in node.attributes.values() if a.name != "group"]
    if node.op_type in ("Conv", "ConvTranspose"):
        attributes.append(ir.AttrInt64("group", groups))
    twin = ir.Node("", node.op_type, [x, *weights], attributes, num_outputs=1, name="layer")
    y = twin.outputs[0]
    y.name, y.type = "output", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=[twin], initializers=weights, opset_imports={"": OPSET}, name="layer")
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    return model, {"input_0": rng.standard_normal(shapes[0]).astype(np.float32)}


def _least(run: Callable[[], object]) -> float:
    """The fastest of several runs: others of this machine only ever make one slower."""
    run()
    run()
    best, used = np.inf, 0.0
    for index in range(_MOST):
        start = time.process_time()
        run()
        took = time.process_time() - start
        best, used = min(best, took), used + took
        if index + 1 >= _FEWEST and used > _SECONDS:
            break
    return float(best)


class Layers:
    """The layers of a graph, and what each takes when groups are narrower.

    Attributes:
        table: Of single layers.
    """

    def __init__(
        self,
        model: ir.Model,
        found: Dependencies,
        groups: Sequence[Group],
        feeds: Mapping[str, np.ndarray],
        table: LatencyTable,
    ) -> None:
        self.table = table
        self._units = [len(g.units) for g in groups]
        of = {unit: index for index, g in enumerate(groups) for unit in g.units}
        sizes = _sizes(model, feeds)
        self._nodes: list[tuple[ir.Node, list[_Operand]]] = []
        self._touching: dict[int, list[int]] = {index: [] for index in range(len(groups))}
        for node in model.graph:
            values = [v for v in node.inputs if v is not None]
            if (
                node.op_type not in _LAYERS
                or len(values) < 2
                or not all(v.is_initializer() for v in values[1:])
            ):
                continue
            if any(str(v.name) not in sizes for v in values):
                continue
            operands = [_operand(found, v, sizes[str(v.name)], of) for v in values]
            for index in _named(operands):
                self._touching[index].append(len(self._nodes))
            self._nodes.append((node, operands))

    def seconds(self, state: Sequence[int]) -> list[float]:
        """Of each layer, when ``state`` units of the groups stay."""
        return [self._one(k, state) for k in range(len(self._nodes))]

    def saved(self, now: Sequence[float], state: Sequence[int], index: int, narrower: int) -> float:
        """Seconds less when group ``index`` has ``narrower`` units; ``now`` are those of ``state``."""
        other = [*state]
        other[index] = narrower
        return sum(now[k] - self._one(k, other) for k in self._touching[index])

    def _one(self, k: int, state: Sequence[int]) -> float:
        node, operands = self._nodes[k]
        shapes: list[Shape] = []
        for shape, shares in operands:
            cut = list(shape)
            for axis, index, count in shares:
                cut[axis] -= count * (self._units[index] - state[index]) // self._units[index]
            shapes.append(tuple(cut))
        return self.table.seconds(node, shapes)


def _operand(found: Dependencies, value: ir.Value, shape: Shape, of: Mapping[int, int]) -> _Operand:
    shares: list[tuple[int, int, int]] = []
    for axis, labels in enumerate(found.axes.get(value, ())):
        if not isinstance(labels, np.ndarray):
            continue
        counts: dict[int, int] = {}
        for root in found.labels.roots(labels).tolist():
            if root in of:
                counts[of[root]] = counts.get(of[root], 0) + 1
        shares += [(axis, index, count) for index, count in counts.items()]
    return shape, shares


def _named(operands: Sequence[_Operand]) -> set[int]:
    return {index for _, shares in operands for _, index, _ in shares}


def _sizes(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, Shape]:
    """Shapes of all values for these inputs."""
    twin = model.clone()
    for value in twin.graph.inputs:
        value.shape = ir.Shape(feeds[str(value.name)].shape)
    for value in (*(o for node in twin.graph for o in node.outputs), *twin.graph.outputs):
        if value.shape is not None and not value.shape.is_static():
            value.shape = None
    infer(twin)
    values = (
        *twin.graph.inputs,
        *twin.graph.initializers.values(),
        *(o for n in twin.graph for o in n.outputs),
    )
    return {str(v.name): v.shape.numpy() for v in values if v.shape is not None and v.shape.is_static()}
