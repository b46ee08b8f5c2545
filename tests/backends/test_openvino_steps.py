"""Grids between convolutions get the step 1, and the numbers stay; other grids stay as they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends import BACKENDS
from optkit.backends.openvino.steps import unit_steps
from optkit.graph import constant, walk
from optkit.reference import ReferenceSession
from optkit.saturation import SAFE
from optkit.targets import target
from optkit.testing import parse

# Three convolutions and a product, with a pair between each two. {} stands for what tells one case from another.
NET = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 4, 6, 6] x{inputs}) => (float[N, 8, 6, 3] y{outputs}) {{
  qx = QuantizeLinear(x, s0, z0)
  dx = DequantizeLinear(qx, s0, z0)
  w1 = DequantizeLinear<axis = 0>(q1, t1)
  a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(dx, w1, {bias})
  b = {activation}
  qb = QuantizeLinear(b, s1, z1)
  db = DequantizeLinear(qb, {step}, z1)
  w2 = DequantizeLinear<axis = 0>(q2, t2)
  c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 8>(db, {second})
  d = Relu(c)
  qd = QuantizeLinear(d, s2, z2)
  dd = DequantizeLinear(qd, s2, z2)
  w3 = DequantizeLinear<axis = 0>(q3, t3)
  e = Conv<kernel_shape = [1, 1]>(dd, w3, b3)
  f = LeakyRelu<alpha = 0.25>(e)
  qf = QuantizeLinear(f, s3, z3)
  df = DequantizeLinear(qf, s3, z3)
  w4 = DequantizeLinear<axis = 1>(q4, t4)
  y = MatMul(df, w4)
  {behind}
}}
"""


def _net(
    inputs: str = "", outputs: str = "", bias: str = "b1", activation: str = "Clip(a, low, high)", step: str = "s1",
    second: str = "w2", behind: str = "", **constants: np.ndarray,
) -> ir.Model:  # fmt: skip
    random = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        # In 7 bits no pair of products saturates, whatever the processor.
        return random.integers(1 - SAFE, SAFE, shape, np.int8)

    def scales(count: int) -> np.ndarray:
        return random.uniform(0.004, 0.012, count).astype(np.float32)

    held = {
        "q1": drawn(8, 4, 3, 3), "q2": drawn(8, 1, 3, 3), "q3": drawn(8, 8, 1, 1), "q4": drawn(6, 3), "t1": scales(8), "t2": scales(8),
        "t3": scales(8), "t4": scales(3), "b1": random.normal(size=8).astype(np.float32),
        "b3": random.normal(size=8).astype(np.float32), "low": np.float32(0), "high": np.float32(6), "s0": np.float32(0.02),
        "z0": np.uint8(128), "s1": np.float32(6 / 255), "other": np.float32(0.03), "z1": np.uint8(0), "s2": np.float32(0.021),
        "z2": np.uint8(0), "s3": np.float32(0.04), "z3": np.uint8(60),
    }  # fmt: skip
    text = NET.format(
        inputs=inputs,
        outputs=outputs,
        bias=bias,
        activation=activation,
        step=step,
        second=second,
        behind=behind,
    )
    return parse(text, **(held | constants))


def _steps(model: ir.Model) -> list[float]:
    return [float(constant(n.inputs[1]).reshape(-1)[0]) for n in walk(model) if n.op_type == "QuantizeLinear"]


def _answer(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = ReferenceSession(model, optimize=False)
    found = session.run({"x": x})["y"]
    session.close()
    return found


X = np.random.default_rng(1).normal(size=(16, 4, 6, 6)).astype(np.float32)


def test_all_grids_between_layers_have_the_step_one_and_the_numbers_stay():
    model = _net()
    before = _steps(model)
    found = unit_steps(model)
    assert _steps(found) == [before[0], 1, 1, 1]
    assert _steps(model) == before
    expected, got = _answer(model, X), _answer(found, X)
    # Where scales round, a sum may fall on the other side of a tie.
    assert np.isclose(expected, got, atol=1e-5).mean() > 0.99
    np.testing.assert_allclose(got, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize(
    "case",
    [
        {"activation": "Sigmoid(a)"},
        {"activation": "Clip(a, low, top)", "inputs": ", float top"},
        {"bias": "free", "inputs": ", float[8] free"},
        {"outputs": ", float[N, 8, 6, 6] a"},
        {"outputs": ", float[N, 8, 6, 6] db"},
        {"step": "other"},
        {"second": "free", "inputs": ", float[8, 1, 3, 3] free"},
        {"behind": "z = Neg(db)", "outputs": ", float[N, 8, 6, 6] z"},
        {"behind": "z = Identity(w1)", "outputs": ", float[8, 4, 3, 3] z"},
        {"s1": np.float32(1e-12)},
        {"s1": np.float32(-0.02)},
        {"t1": np.full(8, 1e-12, np.float32)},
    ],
    ids=[
        "no homogeneous activation", "a bound that is computed", "a bias that is computed", "the sum is an output",
        "the pair is an output", "two grids", "weights in float", "another reader", "weights with another reader", "a tiny step",
        "a negative step",
        "tiny weights",
    ],
)  # fmt: skip
def test_a_grid_keeps_its_step_where_layers_around_it_cannot_take_it_over(case):
    model = _net(**case)
    found = unit_steps(model)
    assert _steps(found)[1] == _steps(model)[1]
    assert _steps(found)[3] == 1


def test_bounds_that_are_none_stay_finite():
    found = unit_steps(
        _net(low=np.float32(np.finfo(np.float32).min), high=np.float32(np.finfo(np.float32).max))
    )
    (clip,) = (n for n in walk(found) if n.op_type == "Clip")
    assert all(np.isfinite(constant(v)) for v in clip.inputs[1:])


def test_a_clip_whose_bounds_are_attributes_ends_the_search():
    """As they were before opset 11."""
    model = _net(activation="Clip<min = 0.0, max = 6.0>(a)")
    found = unit_steps(model)
    assert _steps(found)[1] == _steps(model)[1]


def test_weights_that_are_quantized_when_they_are_written_are_not_before():
    model = _net()
    read = []
    for value in model.graph.initializers.values():
        if value.name in ("q1", "q2", "q3", "q4"):
            tensor = value.const_value
            value.const_value = ir.LazyTensor(
                lambda t=tensor: (read.append(t.name), t)[1],
                dtype=tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
            )
    assert unit_steps(model) is not None
    assert not read


def test_without_such_grids_there_is_no_copy():
    assert unit_steps(unit_steps(_net())) is None


@pytest.mark.needs("openvino")
def test_what_is_written_computes_what_the_pairs_say(tmp_path):
    model, cpu, backend = _net(), target("cpu"), BACKENDS["openvino"]()
    options = backend.options(shapes={"x": X.shape})
    backend.lower(model, cpu, options, tmp_path)
    with backend.load(tmp_path, cpu, options, threads=1) as session:
        found = session.run({"x": X})["y"]
    assert np.isclose(found, _answer(model, X), atol=1e-4).mean() > 0.99
