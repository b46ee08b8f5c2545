from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends.onnxruntime.placement import PLACEMENTS
from optkit.data import CalibrationData
from optkit.errors import DataError
from optkit.graph import verify
from optkit.passes.base import Context
from optkit.passes.quantization.static import QuantizeStatic
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
LAYERS = {
    "Conv": (
        "(float[2, 6, 9, 9] x) => (float[2, 8, 7, 7] y) { y = Conv(x, w, b) }",
        {"w": (8, 6, 3, 3), "b": (8,)},
    ),
    "Conv without a bias": (
        "(float[2, 6, 9, 9] x) => (float[2, 8, 4, 7] y) { y = Conv<strides = [2, 1]>(x, w) }",
        {"w": (8, 6, 3, 3)},
    ),
    "Conv in groups": (
        "(float[2, 6, 9, 9] x) => (float[2, 8, 7, 7] y) { y = Conv<group = 2>(x, w, b) }",
        {"w": (8, 3, 3, 3), "b": (8,)},
    ),
    "depthwise Conv over one axis": (
        "(float[2, 6, 9] x) => (float[2, 6, 7] y) { y = Conv<group = 6>(x, w, b) }",
        {"w": (6, 1, 3), "b": (6,)},
    ),
    "Gemm": ("(float[40, 12] x) => (float[40, 8] y) { y = Gemm(x, w, b) }", {"w": (12, 8), "b": (8,)}),
    "Gemm that turns its weights": (
        "(float[40, 12] x) => (float[40, 8] y) { y = Gemm<transB = 1>(x, w) }",
        {"w": (8, 12)},
    ),
    "Gemm with one number as bias": (
        "(float[40, 12] x) => (float[40, 8] y) { y = Gemm(x, w, b) }",
        {"w": (12, 8), "b": (1,)},
    ),
}


def _layer(name: str) -> ir.Model:
    source, shapes = LAYERS[name]
    random = np.random.default_rng(0)
    weights = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    return parse(HEAD + "g " + source, **weights)


def _batches(model: ir.Model) -> list[dict[str, np.ndarray]]:
    """Inputs whose channels have means other than 0, as behind a Relu."""
    random, shape = np.random.default_rng(1), model.graph.inputs[0].shape.numpy()
    return [{"x": np.abs(random.normal(1, 1, shape)).astype(np.float32)} for _ in range(3)]


def _quantized(model: ir.Model, batches, **options) -> ir.Model:
    after = model.clone()
    context = Context(target=target("cpu"), data=CalibrationData(batches), placements=PLACEMENTS)
    QuantizeStatic(**options).run(after, context)
    verify(after)
    return after


def _layer_of(model: ir.Model) -> ir.Node:
    return next(n for n in model.graph if n.op_type in ("Conv", "Gemm", "MatMul"))


def _stored(value: ir.Value | None) -> np.ndarray | None:
    """What an input of the layer holds in float64, behind its DequantizeLinear."""
    if value is None:
        return None
    node = value.producer()
    if node is None:
        return value.const_value.numpy().astype(np.float64)
    q, scale, zero = (v.const_value.numpy() for v in node.inputs)
    axis = node.attributes.get_int("axis", 1)
    if scale.ndim:
        shape = [1] * q.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return (q.astype(np.float64) - zero.astype(np.float64)) * scale.astype(np.float64)


def _shift(model: ir.Model, after: ir.Model, batches) -> np.ndarray:
    """How far weights and bias of ``after`` move the mean of each output channel on float inputs."""
    layer = _layer_of(after)
    channel = 1 if layer.op_type == "Conv" else -1
    other = model.clone()
    node = _layer_of(other)
    for index, value in enumerate(layer.inputs[1:], 1):
        array = _stored(value).astype(np.float32)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        new = ir.Value(name=f"new{index}", const_value=ir.tensor(array))
        other.graph.register_initializer(new)
        node.replace_input_with(index, new)
    means = []
    for graph in (model, other):
        session = ReferenceSession(graph)
        outputs = [np.moveaxis(session.run(b)["y"].astype(np.float64), channel, 0) for b in batches]
        session.close()
        means.append(np.mean([y.reshape(len(y), -1).mean(1) for y in outputs], axis=0))
    return np.abs(means[1] - means[0])


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_of_every_output_channel_comes_back(name):
    model = _layer(name)
    batches = _batches(model)
    plain = _shift(model, _quantized(model, batches), batches)
    corrected = _shift(model, _quantized(model, batches, bias_correction=True), batches)
    assert corrected.max() < 0.1 * plain.max()


def test_a_layer_without_a_bias_gets_one_and_a_product_that_takes_none_is_left():
    model = _layer("Conv without a bias")
    assert len(_layer_of(_quantized(model, _batches(model), bias_correction=True)).inputs) == 3
    product = parse(
        HEAD + "g (float[40, 12] x) => (float[40, 8] y) { y = MatMul(x, w) }",
        w=np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32),
    )
    after = _quantized(product, _batches(product), bias_correction=True)
    assert [n.op_type for n in after.graph if n.op_type in ("MatMul", "Add")] == ["MatMul"]
    assert len(_layer_of(after).inputs) == 2


def test_a_bias_that_two_layers_share_is_corrected_for_each():
    random = np.random.default_rng(0)
    model = parse(
        HEAD
        + """g (float[2, 4, 5, 5] x) => (float[2, 4, 5, 5] y) {
          a = Conv(x, w, b)
          y = Conv(a, v, b)
        }""",
        w=random.normal(size=(4, 4, 1, 1)).astype(np.float32),
        v=random.normal(size=(4, 4, 1, 1)).astype(np.float32),
        b=random.normal(size=4).astype(np.float32),
    )
    first, second = (
        n for n in _quantized(model, _batches(model), bias_correction=True).graph if n.op_type == "Conv"
    )
    assert not np.array_equal(_stored(first.inputs[2]), _stored(second.inputs[2]))


def test_bias_correction_without_data_is_refused():
    with pytest.raises(DataError, match="calibration data"):
        QuantizeStatic(bias_correction=True).run(
            _layer("Conv"), Context(target=target("cpu"), placements=PLACEMENTS)
        )
