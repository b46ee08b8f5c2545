"""What x86 processors without VNNI make of int8 products, as a graph that any machine can run.

``vpmaddubsw`` multiplies u8 by s8 and adds neighbouring products in 16 bits with saturation; only then are the sums widened.
Two products of weights ``w0, w1`` leave 16 bits only where ``|w0 + w1| > 128`` with equal signs, so a layer has few pairs at
risk. For these alone the graph computes the exact sum ``p`` and adds ``clip(p, -32768, 32767) - p`` to the layer's output.

Which products are neighbours (ONNX Runtime 1.32, ``onnxruntime/core/mlas/lib``): the packed weights hold four consecutive
``k`` of a column in a row (``qgemm_kernel_avx2.cpp``, PackedK = 4; x64 ``QgemmU8X8KernelAvx2.asm`` and ``...Avx512Core.asm``),
so the pairs are ``(0, 1), (2, 3) ...``. Convolutions run as the same product over ``k`` in the order kernel position, then
channel, each group apart (``qlinearconv.cc``, NHWC im2col); ``convsym.cpp`` packs four channels of a position, which are the
same pairs. Zero points are subtracted later, so padding counts as the zero point of the activations. Depthwise kernels and
products of u8 by u8 widen before they multiply and are exact. Checked against ONNX Runtime itself under an emulated Haswell.

OpenVINO's kernels are oneDNN's, and saturate alike, with three differences. Convolutions run on integers whatever they store, so
a layer needs no pair behind it. Those without groups pad the channels of each kernel position, so no pair spans two positions.
And signed activations are shifted by 128 to u8, in products of matrices too, where MLAS widens them first. Checked to the last
bit against OpenVINO 2026.4 on a Zen 3, which has AVX2 and no VNNI (``jit_avx2``, ``jit_avx2_1x1``, ``jit_gemm``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, graphs, users
from optkit.placement import Library
from optkit.reference import ReferenceSession
from optkit.rewrite import Names, label, register

LOW, HIGH = -32768, 32767
# The largest weight of which no pair leaves 16 bits: 255 * (64 + 64) = 32640.
SAFE = 64
# Where a node keeps how many of its channels hold weights in 7 bits.
_NARROWED = "optkit.narrowed"
# Pairs of one channel that are computed at a time: bounds the memory of a layer with many.
_CHUNK = 8
# ONNX Runtime applies these in the integer kernel or drops them in front of a QuantizeLinear.
_ABSORBED = frozenset({"Relu", "Clip"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A node that becomes one product of u8 activations with constant s8 weights.

    Attributes:
        x: The activations, in u8 once ``shift`` is added.
        x_scale: Of the activations; None for products whose result stays in integers.
        x_zero: Zero point of the activations, or None for 0.
        weights: ``[N, K]``, in the order in which the kernel reads them.
        factors: Scale of the weights, ``[N]`` or ``[1]``.
        kernel: Window of a convolution; empty for other products.
        channels: That one output of a convolution reads; 0 for other products.
        shift: What the kernel adds to activations and zero point: 128 where they are s8.
    """

    node: ir.Node
    x: ir.Value
    x_scale: ir.Value | None
    x_zero: ir.Value | None
    weights: np.ndarray
    factors: np.ndarray
    kernel: tuple[int, ...] = ()
    channels: int = 0
    shift: int = 0

    @property
    def at_risk(self) -> np.ndarray:
        """``[N, K // 2]``: which pairs of weights leave 16 bits for some activations."""
        return pairs_at_risk(self.weights)


def pairs_at_risk(weights: np.ndarray) -> np.ndarray:
    """``[N, K // 2]``: which pairs of neighbouring s8 weights ``[N, K]`` leave 16 bits for some u8 activations.

    The largest sum is 255 times the positive weights of the pair, the smallest 255 times the negative ones.
    """
    even = weights[:, : weights.shape[1] // 2 * 2].astype(np.int32)
    a, b = even[:, 0::2], even[:, 1::2]
    top = 255 * (np.maximum(a, 0) + np.maximum(b, 0))
    bottom = 255 * (np.minimum(a, 0) + np.minimum(b, 0))
    found: np.ndarray = (top > HIGH) | (bottom < LOW)
    return found


def kernel_order(node: ir.Node, weights: np.ndarray, library: Library = "mlas") -> np.ndarray:
    """Weights of Conv, MatMul, MatMulInteger or Gemm as ``[N, K]``, in the order in which the kernel multiplies them."""
    if node.op_type == "Conv":
        last = np.moveaxis(weights, 1, -1)
        if library == "onednn" and last.shape[-1] % 2 and attribute(node, "group", 1) == 1:
            last = np.pad(last, [*[(0, 0)] * (last.ndim - 1), (0, 1)])
        return last.reshape(len(last), -1)
    return weights if node.op_type == "Gemm" and attribute(node, "transB", 0) else weights.T


def is_depthwise(node: ir.Node, weights: np.ndarray) -> bool:
    """Whether each channel is a convolution of its own, for which kernels widen first."""
    return node.op_type == "Conv" and weights.shape[1] == 1 and attribute(node, "group", 1) == len(weights)


def products(model: ir.Model, library: Library = "mlas") -> Iterator[Product]:
    """The nodes that kernels of ``library`` run as products of u8 activations with constant s8 weights, and may saturate."""
    for graph in graphs(model):
        for node in graph:
            found = _integer(node) if node.op_type == "MatMulInteger" else _dequantized(node, library)
            if found is not None:
                yield found


def _integer(node: ir.Node) -> Product | None:
    x, weights = node.inputs[0], constant(node.inputs[1])
    if node.domain != "" or x is None or weights is None or weights.dtype != np.int8 or weights.ndim != 2:
        return None
    if x.dtype is not None and x.dtype != ir.DataType.UINT8:
        return None
    return Product(
        node=node, x=x, x_scale=None, x_zero=None, weights=weights.T, factors=np.ones(1, np.float32)
    )


def _dequantized(node: ir.Node, library: Library) -> Product | None:
    if node.op_type not in ("Conv", "MatMul", "Gemm") or node.domain != "":
        return None
    x, w = (_behind(value) for value in node.inputs[:2])
    if x is None or w is None or constant(x.inputs[0]) is not None:
        return None
    source, weights, scale = x.inputs[0], constant(w.inputs[0]), constant(w.inputs[1])
    zero = x.inputs[2] if len(x.inputs) > 2 else None
    assert source is not None
    kind = source.dtype or (None if zero is None else zero.dtype)
    shifts = {ir.DataType.UINT8: 0} | ({ir.DataType.INT8: 128} if library == "onednn" else {})
    if weights is None or scale is None or weights.dtype != np.int8 or kind not in shifts:
        return None
    if node.op_type == "Conv":
        stored = library == "onednn" or _quantized_again(node.outputs[0])
        if is_depthwise(node, weights) or not stored:
            return None
    elif weights.ndim != 2 or attribute(node, "transA", 0):
        return None
    axis = int(str(attribute(w, "axis", 1)))
    channels = 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1
    if scale.size > 1 and axis % weights.ndim != channels:
        return None
    factors = scale.reshape(-1).astype(np.float32)
    if node.op_type == "Gemm":
        factors = factors * np.float32(node.attributes.get_float("alpha", 1.0))
    return Product(
        node=node, x=source, x_scale=x.inputs[1], x_zero=zero,
        weights=kernel_order(node, weights, library), factors=factors, kernel=weights.shape[2:] if node.op_type == "Conv" else (),
        channels=weights.shape[1] if node.op_type == "Conv" else 0, shift=shifts[kind],
    )  # fmt: skip


def _behind(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes ``value``; of activations per tensor, of weights along any axis."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _quantized_again(value: ir.Value) -> bool:
    """Whether a convolution's output goes to a QuantizeLinear alone: ONNX Runtime has no integer kernel for others."""
    readers = users(value)
    while len(readers) == 1 and readers[0].op_type in _ABSORBED and not value.is_graph_output():
        value = readers[0].outputs[0]
        readers = users(value)
    quantized = bool(readers) and all(r.op_type == "QuantizeLinear" for r in readers)
    return quantized and not value.is_graph_output()


class _Nodes:
    """New nodes behind one another, named after the node that they belong to."""

    def __init__(self, at: ir.Node, names: Names) -> None:
        assert isinstance(at.graph, ir.Graph)
        self._graph, self._last, self._label, self._names = at.graph, at, f"{at.name}/saturation", names

    def __call__(
        self, op: str, *inputs: ir.Value | None, dtype: ir.DataType, **attributes: object
    ) -> ir.Value:
        made = ir.node(op, inputs, attributes=attributes, name=self._names.new(f"{self._label}/{op}"))  # type: ignore[arg-type]
        made.outputs[0].name, made.outputs[0].type = self._names.new(str(made.name)), ir.TensorType(dtype)
        self._last.append(made)
        self._last = made
        return made.outputs[0]

    def constant(self, what: str, array: np.ndarray) -> ir.Value:
        return register(self._graph, self._names.new(f"{self._label}/{what}"), array)


_FLOAT = ir.DataType.FLOAT


def _columns(product: Product, new: _Nodes) -> tuple[ir.Value, int, np.ndarray]:
    """Raw activations with all ``k`` along one axis; that axis; and where each ``k`` of each channel lies, ``[N, K]``."""
    node, (n, k) = product.node, product.weights.shape
    x = new("Cast", product.x, dtype=_FLOAT, to=int(_FLOAT.value))
    if node.op_type != "Conv":
        return x, -1, np.broadcast_to(np.arange(k), (n, k))
    kernel, channels = product.kernel, product.channels
    size, groups = int(np.prod(kernel)), int(str(attribute(node, "group", 1)))
    # Each channel's window of a kernel position is picked by a depthwise convolution with a single 1, so that strides,
    # dilations and padding are the layer's own. Padding is 0 of what has its zero point subtracted.
    if size > 1 or any(attribute(node, name) is not None for name in ("pads", "strides", "auto_pad")):
        zero = None
        if product.x_zero is not None:
            zero = new("Cast", product.x_zero, dtype=_FLOAT, to=int(_FLOAT.value))
            x = new("Sub", x, zero, dtype=_FLOAT)
        picks = np.tile(
            np.eye(size, dtype=np.float32).reshape(size, 1, *kernel),
            (channels * groups, *[1] * (len(kernel) + 1)),
        )
        kept = {
            name: node.attributes[name]
            for name in ("pads", "strides", "dilations", "auto_pad")
            if name in node.attributes
        }
        plain = {name: a.as_string() if name == "auto_pad" else list(a.as_ints()) for name, a in kept.items()}
        x = new("Conv", x, new.constant("positions", picks), dtype=_FLOAT, group=channels * groups, **plain)
        if zero is not None:
            x = new("Add", x, zero, dtype=_FLOAT)
    position, channel = np.divmod(np.arange(k), k // size)
    first = np.repeat(np.arange(groups) * channels, n // groups)
    # Any channel will do where the kernel pads: the weight there is 0.
    return x, 1, (first[:, None] + np.minimum(channel, channels - 1)) * size + position


def _excess(product: Product, names: Names, *, magnitude: bool) -> ir.Value:
    """What saturation adds to each output, in units of the integer products; its magnitude summed up where asked for."""
    new = _Nodes(product.node, names)
    x, axis, where = _columns(product, new)
    if product.shift:
        x = new("Add", x, new.constant("shift", np.asarray(product.shift, np.float32)), dtype=_FLOAT)
    risk = product.at_risk
    n, most = len(risk), int(risk.sum(1).max())
    # The pairs at risk of each channel, first ones first; where there are fewer, weights of 0 fill up.
    order = np.argsort(~risk, axis=1, kind="stable")[:, :most]
    used = np.take_along_axis(risk, order, 1)
    spatial = len(product.kernel)
    low = new.constant("low", np.asarray(LOW, np.float32))
    high = new.constant("high", np.asarray(HIGH, np.float32))
    total: ir.Value | None = None
    for start in range(0, most, _CHUNK):
        part, kept = order[:, start : start + _CHUNK], used[:, start : start + _CHUNK]
        terms = []
        for side in (0, 1):
            index = 2 * part + side
            w = np.where(kept, np.take_along_axis(product.weights, index, 1), 0).astype(np.float32)
            at = new.constant("k", np.take_along_axis(where, index, 1).astype(np.int64))
            picked = new("Gather", x, at, dtype=_FLOAT, axis=axis)
            factor = new.constant("weights", w.reshape(*w.shape, *[1] * spatial))
            terms.append(new("Mul", picked, factor, dtype=_FLOAT))
        pair = new("Add", *terms, dtype=_FLOAT)
        over = new("Sub", new("Clip", pair, low, high, dtype=_FLOAT), pair, dtype=_FLOAT)
        if magnitude:
            over = new("Abs", over, dtype=_FLOAT)
        inner = new.constant("axes", np.asarray([-1 if axis == -1 else 2], np.int64))
        summed = new("ReduceSum", over, inner, dtype=_FLOAT, keepdims=0)
        total = summed if total is None else new("Add", total, summed, dtype=_FLOAT)
    assert total is not None and n > 0
    return total


def emulate(model: ir.Model, library: Library = "mlas") -> list[str]:
    """Add to every product what saturation in kernels of ``library`` makes of it, in place.

    Returns:
        Names of the nodes with a pair of weights that can saturate.
    """
    names, changed = Names(model), []
    for product in tuple(products(model, library)):
        if not product.at_risk.any():
            continue
        node, out = product.node, product.node.outputs[0]
        readers, is_output = tuple(out.uses()), out.is_graph_output()
        excess = _excess(product, names, magnitude=False)
        end = excess.producer()
        assert end is not None
        new = _Nodes(end, names)
        if product.x_scale is None:
            added = new("Cast", excess, dtype=ir.DataType.INT32, to=int(ir.DataType.INT32.value))
        else:
            factors = new.constant("scale", product.factors.reshape(-1, *[1] * len(product.kernel)))
            added = new("Mul", new("Mul", excess, factors, dtype=_FLOAT), product.x_scale, dtype=_FLOAT)
        kind = out.dtype or (ir.DataType.INT32 if product.x_scale is None else _FLOAT)
        result = new("Add", out, added, dtype=kind)
        result.shape = out.shape
        for use in readers:
            use.node.replace_input_with(use.idx, result)
        if is_output:
            _take_over(out, result, names)
        changed.append(str(node.name))
    return changed


def _take_over(old: ir.Value, new: ir.Value, names: Names) -> None:
    """Let ``new`` be the output of the graph that ``old`` was, under its name."""
    producer = new.producer()
    assert producer is not None and isinstance(producer.graph, ir.Graph)
    name = str(old.name)
    old.name, new.name = names.new(f"{name}/unsaturated"), name
    for index, output in enumerate(producer.graph.outputs):
        if output is old:
            producer.graph.outputs[index] = new


def note_narrowed(node: ir.Node, channels: np.ndarray) -> None:
    """Write down at ``node`` that its weights in ``channels``, ``[N]`` truth values, were quantized to 7 bits."""
    node.metadata_props[_NARROWED] = f"{int(channels.sum())} of {len(channels)}"


def narrowed(node: ir.Node) -> str | None:
    """In how many channels the weights of ``node`` were quantized to 7 bits, as ``3 of 64``; None where in none."""
    return node.metadata_props.get(_NARROWED)


def saturated(
    model: ir.Model, batches: Iterable[Mapping[str, np.ndarray]], library: Library = "mlas"
) -> dict[str, np.ndarray]:
    """Nodes of the main graph that saturate on ``batches`` in kernels of ``library``, were the arithmetic before them exact.

    Returns:
        Label of the node -> ``[N]``: which of its output channels could, for some input; those that did are among them.
    """
    probe = model.clone()
    names, outputs, risk = Names(probe), dict[str, str](), dict[str, np.ndarray]()
    for product in tuple(products(probe, library)):
        if product.node.graph is not probe.graph or not product.at_risk.any():
            continue
        total = _excess(product, names, magnitude=True)
        end = total.producer()
        assert end is not None
        new, n = _Nodes(end, names), len(product.weights)
        if product.node.op_type == "Conv":
            axes = [0, *range(2, 2 + len(product.kernel))]
        else:
            rows = new.constant("rows", np.asarray([-1, n], np.int64))
            total, axes = new("Reshape", total, rows, dtype=_FLOAT), [0]
        others = new.constant("others", np.asarray(axes, np.int64))
        count = new("ReduceSum", total, others, dtype=_FLOAT, keepdims=0)
        outputs[str(count.name)] = label(product.node)
        risk[label(product.node)] = np.asarray(product.at_risk.any(1))
    found: dict[str, np.ndarray] = {}
    if not outputs:
        return found
    session = ReferenceSession(probe, outputs=list(outputs))
    try:
        for batch in batches:
            for output, sums in session.run(batch).items():
                if (sums > 0).any():
                    name = outputs[output]
                    found[name] = risk[name]
    finally:
        session.close()
    return found
