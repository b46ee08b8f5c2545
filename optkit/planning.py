"""What a model would take on hardware that is not at hand, layer by layer, before anything is compiled; nothing here is a measurement.

A layer is a product, a norm, another operator that needs a launch of its own, attention from scores to values, or a call of a kernel,
with what is computed from its result element by element fused behind it. The *floor* is the roofline of ``optkit.cost``, a bound that
no schedule beats; the *estimate* is an expectation by the rates of ``optkit.estimate``. ``optkit compile`` reports the same two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from optkit.backends.base import Estimate
from optkit.cost import WEIGHTS, Costs, Floor, costs, floor, format_in, once, size, source, weights
from optkit.errors import BackendUnavailableError, UsageError
from optkit.estimate import expected
from optkit.formats import Precision
from optkit.graph import describe, elements, subgraphs, users
from optkit.microscaling import is_call
from optkit.multiplies import macs, multiplies, uncounted
from optkit.ops import spec
from optkit.sized import CALL, sized
from optkit.targets import called

if TYPE_CHECKING:
    from optkit.targets import Target

Bound = Literal["compute", "memory"]
# Integers that quantized graphs compute with; wider ones are places and sizes.
_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One launch.

    Attributes:
        name: Of its first node.
        nodes: How many are fused into it.
        macs: Of its products, those of keys that no query sees and of pads too; 0 where it has none.
        bytes: Read and written by it alone, each value once and in the narrowest type that it has on the way.
        needed: Of these, weights, and what has to be read of inputs and written of outputs of the model, which no fusion saves.
        floor: Seconds of its operations at the peak, without those of keys that no query sees and of pads, or of the part of ``needed`` that the last cache cannot keep.
        low: Seconds, the optimistic end of what is expected: fused, values between layers in the last cache as far as they fit.
        high: Seconds, the pessimistic end: each node launched for itself, each value through memory.
    """

    name: str
    op: str
    nodes: int
    macs: int
    bytes: int
    needed: int
    format: str
    floor: float
    low: float
    high: float
    bound: Bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All layers of a model, in order.

    Attributes:
        least: The floor of the whole, with what the last cache may keep from run to run. Layers may overlap, so it is the longer
            of all operations and all bytes, and not above the sum of the layers' floors but for inputs that no layer reads.
        cold: The same with cold caches.
        uncounted: Operators whose multiply-accumulates nobody counts: the floor holds without them, the estimate is too low.
        notes: What else was assumed.
    """

    layers: tuple[Layer, ...]
    least: Floor
    cold: Floor
    uncounted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def floor(self) -> float:
        """Seconds that no run beats."""
        return self.least.seconds

    @property
    def low(self) -> float:
        """Seconds, the optimistic end: one layer after the other."""
        return max(self.floor, sum(layer.low for layer in self.layers))

    @property
    def high(self) -> float:
        """Seconds, the pessimistic end."""
        return max(self.low, sum(layer.high for layer in self.layers))


def dollars(seconds: float, price: float, samples: int = 1) -> float:
    """For a million samples, where a run of ``samples`` takes so long and an hour costs ``price``."""
    return seconds / samples * 1e6 * price / 3600


def estimate(model: ir.Model, target: Target, shapes: Mapping[str, tuple[int, ...]]) -> Estimate | None:
    """Floor and range of one run of ``model`` with inputs of ``shapes``, as ``plan`` has them.

    Returns:
        None where the target's peaks are not known, or a size depends on the data.
    """
    if target.bandwidth is None or not target.peak:
        return None
    try:
        found = _plan(*sized(model, shapes), target, None)
    except UsageError:
        return None
    inputs = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    return Estimate(floor=found.floor, low=found.low, high=found.high, bound=found.least.bound, inputs=inputs)


def plan(model: ir.Model, target: Target, precision: str | None = None) -> Plan:
    """The layers of a model whose inputs all have fixed shapes.

    Args:
        precision: What products with weights will be computed in, all else in half precision; as the graph is where None.

    Raises:
        UsageError: An axis of an input is free, a size is not known even from a run, or the target's peaks are not known.
        BackendUnavailableError: The target does not have the precision.
    """
    asked = precision_for(target, precision)
    if free := [str(v.name) for v in model.graph.inputs if elements(v.shape) is None]:
        raise UsageError(f"free axes: {', '.join(free)}", hint="--shape INPUT=SIZES fixes them")
    return _plan(*sized(model, {}, run=True), target, asked)


def precision_for(target: Target, precision: str | None) -> str | None:
    """The format that ``precision`` stands for, where a plan for the target can be made with it.

    Raises:
        UsageError: The target's peaks are not known, or no plan is made for that precision.
        BackendUnavailableError: The target does not have the precision.
    """
    if target.bandwidth is None or not target.peak:
        lacks = " and ".join(
            w for w, known in (("bandwidth", target.bandwidth), ("peaks", target.peak)) if not known
        )
        hint = "optkit inspect counts what it computes and moves"
        if not target.runs_here:
            hint += f"; optkit compile -t {target.name} writes it, and says what is then left to be measured there"
        raise UsageError(f"no {lacks} of {called(target.name)} are known, and a plan needs them", hint=hint)
    asked = None if precision is None else Precision.parse(precision).base
    if asked is not None and asked not in WEIGHTS:
        raise UsageError(f"no plan is made for {asked}", hint=f"one of {', '.join(WEIGHTS)}")
    if asked is not None and (why := target.lacks.get(asked)) is not None:
        raise BackendUnavailableError(why, hint="choose another --precision")
    return asked


def _plan(model: ir.Model, notes: tuple[str, ...], target: Target, precision: str | None) -> Plan:
    found = costs(model, precision)
    for fmt in found.operations or ():
        if fmt not in target.peak:
            raise UsageError(f"{target.name}: no peak of {fmt} is known", hint="choose another --precision")
    bandwidth, cache = target.bandwidth or math.inf, float(target.l2 or 0)
    least, cold = (floor(found, target.peak, lambda _: bandwidth, kept) for kept in (cache, 0.0))
    assert least is not None
    assert cold is not None
    nodes = list(once(model.graph))
    loops = [describe(n) for n in nodes if n.op_type in ("Loop", "Scan") and any(subgraphs(n))]
    # Which weights stay in the cache nobody knows: of each, the part that cannot.
    beyond = max(0.0, 1 - cache / cold.bytes) if cold.bytes else 0.0
    return Plan(
        layers=tuple(_layers(nodes, found, beyond, target, precision)),
        least=least, cold=cold,
        uncounted=tuple(sorted({f"{n.domain}:{n.op_type}".lstrip(":") for n in nodes if uncounted(n)})),
        notes=(*notes, *(f"the body of {loop} counts once" for loop in loops)),
    )  # fmt: skip


def _layers(
    nodes: list[ir.Node],
    found: Costs,
    beyond: float,
    target: Target,
    precision: str | None,
) -> Iterator[Layer]:
    moves, counted, left = _Moves(precision, found.outside or {}), set[ir.Value](), dict(found.outside or {})
    for group in _groups(nodes):
        made = [n for n in group if multiplies(n)]
        formats = [format_in(n, precision) for n in made]
        multiplied = [macs(n) or 0 for n in made]
        whole = [2 * m / target.peak[f] if m else 0.0 for m, f in zip(multiplied, formats, strict=True)]
        compute = sum(s * found.seen.get(n, 1) for n, s in zip(made, whole, strict=True))
        own = {v: found.weights[v] for v in weights(made, precision)}
        read, written, inner = moves.of(group, own)
        needed = sum(size_ for v, size_ in own.items() if v not in counted)
        for v, part in (*read.items(), *written.items()):
            taken = min(part, left.get(str(v.name), 0.0))
            needed += taken
            left[str(v.name)] = left.get(str(v.name), 0.0) - taken
        counted.update(own)
        moved = sum(own.values()) + sum(read.values()) + sum(written.values())
        call, _, name = group[0].metadata_props.get(CALL, "").partition(" ")
        fused = max(1, sum(not _quiet(n) for n in group))
        assert target.bandwidth is not None
        memory = beyond * needed / target.bandwidth
        fitting = max(memory, (moved - (target.l2 or 0)) / target.bandwidth)
        low, _ = expected(compute, fitting, 1)
        _, high = expected(sum(whole), (moved + 2 * inner) / target.bandwidth, 1 if call else fused)
        main = max(range(len(made)), key=lambda i: multiplied[i]) if made else None
        yield Layer(
            name=name or str(group[0].name), nodes=fused, macs=sum(multiplied), bytes=math.ceil(moved), needed=math.ceil(needed),
            op=call or ("Attention" if len(made) > 1 else group[0].op_type), format="" if main is None or not sum(multiplied) else formats[main],
            floor=max(compute, memory), low=low, high=max(low, high), bound="compute" if compute >= memory else "memory",
        )  # fmt: skip


def _quiet(node: ir.Node) -> bool:
    """Whether it is part of what reads or makes its value: changes of format, movements, and arithmetic on integers."""
    known = spec(node)
    if multiplies(node) or uncounted(node):
        return False
    if (
        node.op_type in ("Constant", "CastLike", "Cast")
        or is_call(node)
        or any(True for _ in subgraphs(node))
    ):
        return True
    if known is not None and known.family in ("shape", "quant"):
        return True
    return not any(
        v.dtype is not None and (v.dtype.is_floating_point() or v.dtype in _BYTES) for v in node.outputs
    )


def _groups(nodes: list[ir.Node]) -> list[list[ir.Node]]:
    """What is launched together, in order."""
    found: dict[ir.Node, int] = {}
    groups: list[list[ir.Node]] = []
    fused = {
        node: heads
        for node in nodes
        if node.op_type == "Softmax" and (heads := _attention(node))
        for node in heads
    }
    opened: dict[object, int] = {}
    for node in nodes:
        key = node.metadata_props.get(CALL) or (id(fused[node]) if node in fused else None)
        if key is None and _quiet(node):
            continue
        number = len(groups) if key is None else opened.setdefault(key, len(groups))
        if key is None and _elementwise(node):
            # The last of those that it reads from, so that none waits for another that waits for it; kernels are closed.
            before = [found[p] for v in node.inputs for p in _makers(v) if p in found]
            last = max(before, default=-1)
            number = last if last >= 0 and CALL not in groups[last][0].metadata_props else number
        if number == len(groups):
            groups.append([])
        groups[number].append(node)
        found[node] = number
    return groups


def _makers(value: ir.Value | None) -> Iterator[ir.Node]:
    """The node that computes ``value``, seen through movements and changes of format; all of them where several are put together."""
    node = None if value is None else value.producer()
    if node is None:
        return
    if not _through(node):
        yield node
    else:
        for v in node.inputs if node.op_type == "Concat" else node.inputs[:1]:
            yield from _makers(v)


def _attention(softmax: ir.Node) -> list[ir.Node]:
    """Scores, softmax, and the product with values; empty where it is none."""
    before, after = _scores(softmax.inputs[0], set()), _values(softmax.outputs[0], set())
    return [*before, softmax, *after] if before and after else []


def _scores(value: ir.Value | None, seen: set[ir.Node]) -> list[ir.Node]:
    """From the product of queries and keys on; empty where ``value`` is not computed from one element by element."""
    node = next(_makers(value), None)
    if node is None or node in seen or CALL in node.metadata_props:
        return []
    seen.add(node)
    if multiplies(node):
        return [] if _weighted(node) else [node]
    if not _elementwise(node):
        return []
    count = elements(node.outputs[0].shape)
    paths = (_scores(v, seen) for v in node.inputs if v is not None and elements(v.shape) == count)
    return next(([*path, node] for path in paths if path), [])


def _values(value: ir.Value, seen: set[ir.Node]) -> list[ir.Node]:
    """Up to the product with values."""
    for node in users(value):
        if node in seen:
            continue
        seen.add(node)
        if multiplies(node):
            return [] if _weighted(node) else [node]
        quiet = _quiet(node)
        if (quiet or _elementwise(node)) and (after := _values(node.outputs[0], seen)):
            return after if quiet else [node, *after]
    return []


def _weighted(node: ir.Node) -> bool:
    return any(source(v) is not None for v in node.inputs)


def _elementwise(node: ir.Node) -> bool:
    known = spec(node)
    # Trained, a batch norm is a scale and a shift of each channel.
    return known is not None and (known.family == "elementwise" or node.op_type == "BatchNormalization")


class _Moves:
    """Bytes between layers, each value in the narrowest type and the smallest part that it has on the way."""

    def __init__(self, precision: str | None, outside: Mapping[str, float]) -> None:
        self._precision, self._outside = precision, outside
        self._kept: dict[ir.Value, float] = {}

    def of(
        self, group: list[ir.Node], own: Mapping[ir.Value, float]
    ) -> tuple[dict[ir.Value, float], dict[ir.Value, float], float]:
        """What a layer reads beside its weights, by where it is from; what it writes; bytes that stay inside."""
        inside, read = set(group), dict[ir.Value, float]()
        for value in dict.fromkeys(v for n in group for v in n.inputs if v is not None):
            for origin, part in self._origins(value, inside, math.inf, math.inf):
                if source(origin) not in own:
                    read[origin] = min(read.get(origin, 0.0) + part, self._size(origin))
        written, inner = dict[ir.Value, float](), 0.0
        for node, value in ((n, v) for n in group for v in n.outputs):
            if value.is_graph_output() or self._leaves(value, inside):
                # Of a cache that grows or is written to where it lies, what is new.
                most = self._outside.get(str(value.name), math.inf) if value.is_graph_output() else math.inf
                written[value] = min(most, self.kept(value))
            elif value.uses() and not _quiet(node):
                inner += self.kept(value)
        return read, written, inner

    def _size(self, value: ir.Value) -> float:
        return float(size(value, self._precision) or 0)

    def _origins(
        self, value: ir.Value, inside: set[ir.Node], count: float, width: float
    ) -> Iterator[tuple[ir.Value, float]]:
        """Where ``value`` is from, and how many bytes of that are read: at most ``count`` elements of ``width`` bytes."""
        node, own = value.producer(), self._size(value) / max(1, elements(value.shape) or 0)
        count, width = min(count, elements(value.shape) or 0), min(width, own)
        if node is None or not node.inputs:
            yield value, count * own  # nobody makes it narrower
        elif not _through(node) and node not in inside:
            yield value, count * width
        elif node not in inside:
            for v in node.inputs if node.op_type == "Concat" else node.inputs[:1]:
                if v is not None:
                    yield from self._origins(v, inside, count, width)
            if (
                node.op_type == "DequantizeLinear"
                and (scale := node.inputs[1]) is not None
                and source(scale) is None
            ):
                # As many as belong to what is read; constant ones count with their weights.
                share = count / max(1, elements(value.shape) or 0)
                yield from self._origins(
                    scale, inside, math.ceil(share * (elements(scale.shape) or 0)), math.inf
                )

    def _leaves(self, value: ir.Value, inside: set[ir.Node]) -> bool:
        """Whether something outside reads it, perhaps through movements."""
        return any(
            n not in inside
            and (not _through(n) or any(self._leaves(o, inside) or o.is_graph_output() for o in n.outputs))
            for n in users(value)
            if n.op_type not in ("Shape", "Size")
        )

    def kept(self, value: ir.Value) -> float:
        """Bytes of ``value`` that something reads."""
        if value not in self._kept:
            most = self._size(value)
            readers = [n for n in users(value) if n.op_type not in ("Shape", "Size")]
            parts = sum(sum(map(self.kept, n.outputs)) if _through(n) else most for n in readers)
            self._kept[value] = most if value.is_graph_output() else min(most, parts)
        return self._kept[value]


def _through(node: ir.Node) -> bool:
    """Whether bytes are those on its other side: it changes format or moves, and is not part of a kernel."""
    return _quiet(node) and CALL not in node.metadata_props
