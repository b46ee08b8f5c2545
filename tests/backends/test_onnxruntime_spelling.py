"""What ONNX Runtime is given in other words."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.backends.onnxruntime.lower import OnnxRuntime, OnnxRuntimeOptions
from optkit.backends.onnxruntime.spelling import spelled
from optkit.graph import text
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse, random_feeds, same_numbers

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (%s[N] x) => (%s[N] y) { m = Mish (x) y = Neg (m) }
"""


def _ops(model):
    return [node.op_type for node in model.graph]


def test_mish_is_written_out_and_exact():
    model = parse(MODEL % ("float", "float"))
    before = text(model)
    after = spelled(model)
    assert text(model) == before
    assert "Mish" not in _ops(after)
    x = np.concatenate([np.linspace(-90, 90, 18001), [-1e30, -1e-30, 0, 1e-30, 1e30]]).astype(np.float32)
    (y,) = ReferenceSession(after, optimize=False).run({"x": x}).values()
    wide = x.astype(np.float64)
    expected = -wide * np.tanh(np.log1p(np.exp(np.minimum(wide, 700))))
    # Exp is good to 2 units in the last place; six more roundings. Below 1e-37 float32 has fewer digits.
    np.testing.assert_allclose(y, expected, rtol=8 * 2.0**-23, atol=1e-36)


def test_infinities_and_nan_are_what_they_were():
    x = np.array([np.inf, np.nan], np.float32)
    (y,) = ReferenceSession(spelled(parse(MODEL % ("float", "float")))).run({"x": x}).values()
    np.testing.assert_array_equal(y, [-np.inf, np.nan])


def test_half_precision_and_other_graphs_stay():
    half = parse(MODEL % ("float16", "float16"))
    assert _ops(spelled(half)) == ["Mish", "Neg"]
    plain = parse((MODEL % ("float", "float")).replace("Mish", "Relu"))
    assert spelled(plain) is plain


def test_the_artifact_holds_the_spelling(tmp_path):
    OnnxRuntime().lower(parse(MODEL % ("float", "float")), target("cpu"), OnnxRuntimeOptions(), tmp_path)
    import onnx

    assert "Mish" not in [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]


PAIR = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[1, 2, 3] x) => (float[1, 3, 2] y%s) {
  q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(q, s, z) t = Transpose<perm = [0, 2, 1]>(d)
  u = Transpose<perm = [0, 2, 1]>(e) y = Add(t, u) %s }
"""


def test_pairs_of_int8_that_onnx_runtime_stops_at_are_unsigned_and_exact(tmp_path):
    import onnxruntime as ort

    model = parse(PAIR % ("", ""), s=np.float32(0.5), z=np.int8(-3))
    OnnxRuntime().lower(model, target("cpu"), OnnxRuntimeOptions(), tmp_path)
    x = np.array([[[-90, -0.3, 0.4], [1, 2.5, 90]]], np.float32)
    (found,) = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )
    np.testing.assert_array_equal(found, ReferenceSession(model, optimize=False).run({"x": x})["y"])


def test_integers_that_are_given_away_keep_their_type():
    model = parse(PAIR % (", int8[1, 2, 3] q", ""), s=np.float32(0.5), z=np.int8(-3))
    assert model.graph.outputs[1].dtype == spelled(model).graph.outputs[1].dtype


POOLS = {
    "one axis": ("[N, 3, 11]", "kernel_shape = [3], strides = [2], pads = [1, 1]"),
    "one axis that is free, with dilations": ("[2, 3, T]", "kernel_shape = [3], dilations = [2]"),
    "one axis with what pads add": (
        "[2, 3, 11]",
        'kernel_shape = [4], strides = [3], auto_pad = "SAME_UPPER", count_include_pad = 1',
    ),
    "one axis, rounded up": ("[2, 3, 11]", "kernel_shape = [2], strides = [3], ceil_mode = 1"),
    "three axes": ("[N, 3, 6, 7, 8]", "kernel_shape = [3, 2, 3], strides = [2, 1, 2], pads = [1, 0, 1, 0, 1, 1]"),
    "three axes, of which the last is pooled": ("[2, 1, 9, 3, 4]", "kernel_shape = [1, 1, 3]"),
    "three axes, of which the first is pooled, without pads": (
        "[2, 1, 9, 3, 4]",
        "kernel_shape = [5, 1, 1], pads = [2, 0, 0, 2, 0, 0]",
    ),
    "three axes, of which two are pooled": ("[2, 2, 3, 7, 6]", "kernel_shape = [1, 3, 2], dilations = [1, 2, 1]"),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
def test_average_pools_over_one_or_three_axes_are_such_over_two(name):
    shape, attributes = POOLS[name]
    model = parse(
        f'<ir_version: 10, opset_import: ["" : 21]>\ng (float{shape} x) => (float[] y) {{ y = AveragePool<{attributes}>(x) }}'
    )
    after = spelled(model)
    pools = [n for n in after.graph if n.op_type == "AveragePool"]
    assert pools and all(len(n.attributes["kernel_shape"].as_ints()) == 2 for n in pools)
    same_numbers(model, after, random_feeds(model, size=9))


@pytest.mark.parametrize(
    "attributes",
    ["kernel_shape = [5, 1, 1]", "kernel_shape = [3, 1, 1], strides = [2, 1, 1], dilations = [2, 1, 1], pads = [1, 0, 0, 2, 0, 0], count_include_pad = 1"],
)  # fmt: skip
def test_an_average_pool_along_the_first_of_three_axes_is_a_convolution(attributes):
    model = parse(
        f'<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, 2, 9, 3, 4] x) => (float[] y) {{ y = AveragePool<{attributes}>(x) }}'
    )
    after = spelled(model)
    assert _ops(after) == ["Reshape", "Conv", "Reshape"]
    same_numbers(model, after, random_feeds(model))


def test_an_average_pool_of_volumes_of_free_sizes_stays():
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21]>\ng (float[1, 3, D, 7, 8] x) => (float[] y) { y = AveragePool<kernel_shape = [2, 2, 2]>(x) }'
    )
    assert _ops(spelled(model)) == ["AveragePool"]


@pytest.mark.parametrize(
    ("slopes", "operators"),
    [
        ([0.25, 1, 1e-3], ["Mul", "Max"]),
        ([0.25, 0, 2], ["Relu", "Min", "Mul", "Add"]),
        ([-0.5, 0.1, 3], ["Relu", "Min", "Mul", "Add"]),
        ([0.1, np.inf, 0.2], ["PRelu"]),
    ],
)
def test_prelu_is_made_of_faster_operators_to_the_bit(slopes, operators):
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, 3, 5, 4] x) => (float[N, 3, 5, 4] y) { y = PRelu(x, s) }',
        s=np.array(slopes, np.float32).reshape(3, 1, 1),
    )
    after = spelled(model)
    assert _ops(after) == operators
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    x[0, :, 0, 0], x[0, :, 1, 0], x[0, :, 2, 0] = 0, 3e38, -3e38
    x[1, :, 0, 0], x[1, :, 1, 0] = np.inf, np.nan
    found, expected = (ReferenceSession(m, optimize=False).run({"x": x})["y"] for m in (after, model))
    np.testing.assert_array_equal(found, expected)


CUBIC = {
    "by scales": ("s = {1, 1, 2, 1.5}", 'Resize<mode = "cubic">(x, , s)', True),
    "by sizes, of other points": ("s = {1}, int64[4] n = {2, 3, 5, 14}", 'Resize<mode = "cubic", coordinate_transformation_mode = "align_corners">(x, , , n)', True),
    "with another coefficient, and nothing from outside": ("s = {1, 1, 0.7, 2.3}", 'Resize<mode = "cubic", cubic_coeff_a = -0.5, exclude_outside = 1>(x, , s)', True),
    "asymmetric": ("s = {1, 1, 1.7, 2}", 'Resize<mode = "cubic", coordinate_transformation_mode = "asymmetric">(x, , s)', True),
    "linear": ("s = {1, 1, 2, 2}", 'Resize<mode = "linear">(x, , s)', False),
}  # fmt: skip


@pytest.mark.parametrize("name", CUBIC)
def test_cubic_resizes_of_planes_are_products(name):
    scales, call, written = CUBIC[name]
    model = parse(
        f'<ir_version: 10, opset_import: ["" : 21]>\ng (float[2, 3, 7, 8] x) => (float[] y) <float[{scales.split("}")[0].count(",") + 1}] {scales}> {{ y = {call} }}'
    )
    after = spelled(model)
    assert ("Resize" not in _ops(after)) == written
    assert all(v.uses() for v in after.graph.initializers.values()) or name == "by sizes, of other points"
    feeds = random_feeds(model)
    found, expected = (ReferenceSession(m, optimize=False).run(feeds)["y"] for m in (after, model))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_cubic_resizes_of_large_planes_stay():
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21]>\ng (float[1, 3, 2000, 2000] x) => (float[] y) <float[4] s = {1, 1, 2, 2}> { y = Resize<mode = "cubic">(x, , s) }'
    )
    assert spelled(model) is not model and _ops(spelled(model)) == ["Resize"]
