from __future__ import annotations

from itertools import product

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends.onnxruntime.placement import PLACEMENTS
from optkit.data import CalibrationData
from optkit.errors import DataError, PassError
from optkit.formats import FORMATS
from optkit.graph import verify
from optkit.passes.base import Context
from optkit.passes.quantization.rounding import round_by_outputs, second_moments
from optkit.passes.quantization.static import QuantizeStatic
from optkit.placement import Placement, Row, rows
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
S8 = FORMATS["s8"]


def _error(q: np.ndarray, w: np.ndarray, scale: float, x: np.ndarray) -> float:
    """Mean square of what rounding changes in the outputs, in float64 over the vectors themselves."""
    return float(np.mean((x @ (q * scale - w)) ** 2))


def _correlated(inputs: int, seed: int) -> np.ndarray:
    """Vectors whose elements move together, as channels of one picture do."""
    random = np.random.default_rng(seed)
    return random.normal(size=(200, 3)) @ random.normal(size=(3, inputs)) + 0.2 * random.normal(
        size=(200, inputs)
    )


def test_few_weights_are_rounded_nearly_as_well_as_the_best_of_all_choices():
    gained, possible = 0.0, 0.0
    for seed in range(20):
        x = _correlated(8, seed)
        w = np.random.default_rng(seed + 10).normal(size=(1, 8))
        q = round_by_outputs(w, np.array([0.25], np.float32), x.T @ x / len(x), S8)[0].astype(np.float64)
        floor = np.floor(w[0] / 0.25)
        assert set(np.unique(q - floor)) <= {0.0, 1.0}
        every = [_error(floor + np.array(up), w[0], 0.25, x) for up in product((0, 1), repeat=8)]
        nearest, found = _error(np.round(w[0] / 0.25), w[0], 0.25, x), _error(q, w[0], 0.25, x)
        assert found <= nearest + 1e-12
        gained, possible = gained + nearest - found, possible + nearest - min(every)
    assert gained > 0.75 * possible


def test_no_row_of_a_wide_layer_is_worse_than_rounded_to_nearest():
    x = _correlated(64, 0)
    w = np.random.default_rng(1).normal(size=(20, 64))
    scale = np.abs(w).max(1).astype(np.float32) / 127
    q = round_by_outputs(w, scale, x.T @ x / len(x), S8)
    nearest = np.clip(np.round(w / scale[:, None]), -127, 127)
    errors = [
        (_error(a.astype(np.float64), row, s, x), _error(b, row, s, x))
        for a, b, row, s in zip(q, nearest, w, scale.astype(np.float64), strict=True)
    ]
    assert all(mine <= theirs + 1e-15 for mine, theirs in errors)
    assert sum(mine for mine, _ in errors) < 0.3 * sum(theirs for _, theirs in errors)


def test_independent_inputs_leave_every_weight_at_its_nearest_integer():
    w = np.random.default_rng(2).normal(size=(5, 16))
    scale = np.full(5, 0.1, np.float32)
    q = round_by_outputs(w, scale, np.diag(np.arange(1.0, 17.0)), S8)
    assert np.array_equal(q, np.clip(np.round(w / scale[:, None].astype(np.float64)), -127, 127))


def test_the_ends_of_the_range_are_kept():
    x = _correlated(8, 3)
    w = np.random.default_rng(3).normal(size=(4, 8)) * 50
    q = round_by_outputs(w, np.array(0.2, np.float32), x.T @ x / len(x), S8)
    assert q.dtype == np.int8
    assert q.min() >= -127


LAYERS = {
    "(float[3, 6, 8, 9] x) => (float[3, 8, 8, 9] y) { y = Conv<pads = [1, 1, 1, 1]>(x, w) }": (8, 6, 3, 3),
    "(float[3, 6, 9, 9] x) => (float[3, 8, 4, 7] y) { y = Conv<strides = [2, 1], group = 2>(x, w) }": (8, 3, 3, 3),
    "(float[3, 6, 9, 9] x) => (float[3, 8, 5, 5] y) { y = Conv<dilations = [2, 2]>(x, w) }": (8, 6, 3, 3),
    "(float[3, 6, 2, 2] x) => (float[3, 8, 2, 2] y) { y = Conv<pads = [1, 1, 1, 1]>(x, w) }": (8, 6, 3, 3),
    "(float[50, 12] x) => (float[50, 8] y) { y = Gemm(x, w) }": (12, 8),
    "(float[50, 12] x) => (float[50, 8] y) { y = Gemm<transB = 1>(x, w) }": (8, 12),
    "(float[5, 10, 12] x) => (float[5, 10, 8] y) { y = MatMul(x, w) }": (12, 8),
}  # fmt: skip


def _case(source: str) -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    random = np.random.default_rng(0)
    model = parse(HEAD + "g " + source, w=random.normal(0, 0.3, LAYERS[source]).astype(np.float32))
    shape = model.graph.inputs[0].shape.numpy()
    # Channels that move together.
    batches = []
    for _ in range(3):
        base = np.abs(random.normal(1, 1, shape))
        common = base.mean(1 if len(shape) == 4 else -1, keepdims=True)
        batches.append({"x": (common + 0.1 * base).astype(np.float32)})
    return model, batches


def _quantized(model: ir.Model, batches, **options) -> ir.Model:
    after = model.clone()
    QuantizeStatic(**options).run(
        after, Context(target=target("x86-vnni"), data=CalibrationData(batches), placements=PLACEMENTS)
    )
    verify(after)
    return after


def _with_weights_of(model: ir.Model, after: ir.Model) -> ir.Model:
    """``model`` in float, with the weights that ``after`` stores as integers."""
    node = next(n for n in after.graph if n.op_type in ("Conv", "Gemm", "MatMul"))
    q, scale, zero = (v.const_value.numpy() for v in node.inputs[1].producer().inputs)
    shape = [1] * q.ndim
    shape[node.inputs[1].producer().attributes.get_int("axis", 1)] = -1
    assert not zero.any()
    other = model.clone()
    other.graph.initializers["w"].const_value = ir.tensor(q.astype(np.float32) * scale.reshape(shape))
    return other


@pytest.mark.parametrize("source", LAYERS)
def test_the_outputs_of_a_layer_are_closer_than_with_nearest_integers(source):
    model, batches = _case(source)
    errors = []
    for rounding in ("nearest", "adaptive"):
        exact = ReferenceSession(model)
        rounded = ReferenceSession(_with_weights_of(model, _quantized(model, batches, rounding=rounding)))
        errors.append(np.mean([np.mean((exact.run(b)["y"] - rounded.run(b)["y"]) ** 2.0) for b in batches]))
        exact.close()
        rounded.close()
    assert errors[1] < 0.6 * errors[0]


def test_second_moments_of_a_convolution_are_those_of_its_windows():
    source = next(iter(LAYERS))
    model, batches = _case(source)
    node = next(iter(model.graph))
    context = Context(target=target("x86-vnni"), data=CalibrationData(batches), placements=PLACEMENTS)
    found = second_moments(model, [node], context)[node]
    windows = [
        b["x"][n, :, i : i + 3, j : j + 3].reshape(-1).astype(np.float64)
        for b in batches
        for n in range(3)
        for i in range(6)
        for j in range(7)
    ]
    assert found.shape == (1, 54, 54)
    assert np.allclose(found[0], np.mean([np.outer(v, v) for v in windows], axis=0))


def test_a_weight_that_two_inputs_are_multiplied_with_is_rounded_for_each():
    random = np.random.default_rng(0)
    model = parse(
        HEAD
        + """g (float[40, 8] x, float[40, 8] x2) => (float[40, 8] y, float[40, 8] z) {
          y = Gemm(x, w)
          z = Gemm(x2, w)
        }""",
        w=random.normal(size=(8, 8)).astype(np.float32),
    )
    batches = [
        {"x": _correlated(8, s)[:40].astype(np.float32), "x2": _correlated(8, s + 9)[:40].astype(np.float32)}
        for s in range(2)
    ]
    products = [n for n in _quantized(model, batches, rounding="adaptive").graph if n.op_type == "Gemm"]
    first, second = (n.inputs[1].producer().inputs[0].const_value.numpy() for n in products)
    assert not np.array_equal(first, second)


def test_adaptive_rounding_without_data_is_refused():
    model, _ = _case(next(iter(LAYERS)))
    with pytest.raises(DataError, match="calibration data"):
        QuantizeStatic(rounding="adaptive").run(
            model, Context(target=target("x86-vnni"), placements=PLACEMENTS)
        )


def test_formats_that_are_not_integers_are_refused_by_name():
    floats = Placement(name="floats", rows=rows(Row(op="Gemm")), activation="e4m3", weight="e4m3", bias=False)
    model, batches = _case("(float[50, 12] x) => (float[50, 8] y) { y = Gemm(x, w) }")
    context = Context(target=target("h100"), data=CalibrationData(batches), placements={"floats": floats})
    with pytest.raises(PassError, match="adaptive rounding chooses between integers, which e4m3"):
        QuantizeStatic(placement="floats", rounding="adaptive").run(model, context)


def test_second_moments_of_few_vectors_do_not_claim_directions_that_were_not_seen():
    random = np.random.default_rng(0)
    model = parse(
        HEAD + "g (float[N, 32] x) => (float[N, 8] y) { y = MatMul(x, w) }",
        w=random.normal(size=(32, 8)).astype(np.float32),
    )
    node = next(iter(model.graph))

    def found(batches):
        context = Context(target=target("x86-vnni"), data=CalibrationData(batches), placements=PLACEMENTS)
        return second_moments(model, [node], context)[node][0]

    few = [{"x": random.normal(size=(1, 32)).astype(np.float32)} for _ in range(8)]
    x = np.concatenate([b["x"] for b in few]).astype(np.float64)
    whole = x.T @ x / 8
    expected = np.where(np.eye(32, dtype=bool), whole, whole * 8 / 32)
    np.testing.assert_allclose(found(few), expected, rtol=1e-6)
    assert np.linalg.matrix_rank(whole) == 8 and np.linalg.cond(found(few)) < 100
    many = [{"x": random.normal(size=(40, 32)).astype(np.float32)}]
    y = many[0]["x"].astype(np.float64)
    np.testing.assert_allclose(found(many), y.T @ y / 40, rtol=1e-6)
