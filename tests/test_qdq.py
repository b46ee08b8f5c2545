from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from optkit import qdq
from optkit.formats import FORMATS
from optkit.graph import verify, walk
from optkit.qdq import (
    centred,
    dequantize,
    dequantize_constant,
    insert_pair,
    is_quantized,
    quantize,
    quantized_tensor,
    scale_zero,
    store,
    weight_range,
)
from optkit.reference import ReferenceSession
from optkit.rewrite import Names
from optkit.testing import parse

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
FORMAT = st.sampled_from(list(FORMATS.values()))
INTEGERS = st.sampled_from([f for f in FORMATS.values() if f.integer])
E4M3 = FORMATS["e4m3"]
FLOATS = st.floats(-(2.0**127), 2.0**127, width=32)
# Values of one order of magnitude or of all of them, and what is at the ends of float32.
VALUES = st.one_of(
    st.floats(-100, 100, width=32),
    FLOATS,
    st.sampled_from(
        [float(np.float32(x)) for x in (0, -0.0, 3.38e38, -3.38e38, 1e-38, 1e-40, SMALLEST, -SMALLEST)]
    ),
)
ARRAYS = arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=5), elements=VALUES)


def _range(x, fmt):
    scale, zero = scale_zero(x.min(), x.max(), fmt)
    return scale, zero


@given(x=ARRAYS, fmt=FORMAT)
@settings(max_examples=300, deadline=None)
def test_no_value_in_the_range_moves_by_more_than_half_a_step(x, fmt):
    scale, zero = _range(x, fmt)
    found = dequantize(quantize(x, scale, zero, fmt), scale, zero)
    # Half a step, and what float32 rounds in the quotient and in the product: twice 2^-24 of the value.
    step = scale.astype(np.float64)
    if not fmt.integer:
        # Three bits behind the leading one; below 2^-6, even steps of 2^-9 (OCP 8-bit Floating Point Specification, 2023).
        step = np.maximum(np.abs(x.astype(np.float64)) * 2.0**-3, step * 2.0**-9)
    allowed = step * 0.5 * (1 + 1e-3) + np.abs(x.astype(np.float64)) * 2.0**-22
    assert (np.abs(x.astype(np.float64) - found) <= allowed).all()


@given(low=VALUES, high=VALUES, fmt=FORMAT)
@settings(max_examples=300, deadline=None)
def test_zero_lies_on_every_grid(low, high, fmt):
    scale, zero = scale_zero(min(low, high), max(low, high), fmt)
    assert dequantize(quantize(np.zeros(1, np.float32), scale, zero, fmt), scale, zero)[0] == 0
    assert fmt.low <= int(zero) <= fmt.high
    assert zero.dtype == fmt.dtype.numpy()


@pytest.mark.parametrize(
    ("low", "high", "fmt", "found"),
    [
        (-1.0, 1.0, "u8", (-128 / 127, 1.0)),
        (-0.9, 1.0, "u8", (-128 / 127, 1.0)),
        (-1.0, 0.9, "u8", (-1.0, 127 / 128)),
        (-0.5, 1.0, "u8", (-0.5, 1.0)),
        (0.0, 1.0, "u8", (0.0, 1.0)),
        (-1.0, 0.0, "u8", (-1.0, 0.0)),
        (-0.9, 1.0, "s8", (-0.9, 1.0)),
    ],
)
def test_a_range_that_is_nearly_as_far_on_both_sides_of_zero_is_widened_until_it_is(low, high, fmt, found):
    ends = centred(low, high, FORMATS[fmt], 0.125)
    assert ends == pytest.approx(found, rel=1e-12)
    assert ends[0] <= low
    assert ends[1] >= high
    if ends != (low, high):
        _, zero = scale_zero(*ends, FORMATS[fmt])
        assert int(zero) == 128
    assert centred(low, high, FORMATS[fmt], 0.0) == (low, high)


@given(low=VALUES, high=VALUES, fmt=FORMAT)
@settings(max_examples=300, deadline=None)
def test_scales_are_positive_normal_numbers_and_the_ends_of_the_grid_finite(low, high, fmt):
    scale, zero = scale_zero(min(low, high), max(low, high), fmt)
    assert scale.dtype == np.float32
    assert np.finfo(np.float32).tiny <= scale < np.inf
    ends = dequantize(np.array([fmt.low, fmt.high], fmt.dtype.numpy()), scale, zero)
    assert np.isfinite(ends).all()


@given(other=VALUES, fmt=FORMAT)
@settings(deadline=None)
def test_the_mask_constant_stays_huge_and_finite(other, fmt):
    scale, zero = scale_zero(-LARGEST, max(other, 0.0), fmt)
    mask = dequantize(quantize(np.array([-LARGEST], np.float32), scale, zero, fmt), scale, zero)[0]
    # One step of u8 below the largest, where the other end of the range is as far away.
    assert -LARGEST <= mask <= -LARGEST * (1 - 3 / 255)


@given(x=ARRAYS, fmt=FORMAT)
@settings(deadline=None)
def test_quantizing_again_what_was_dequantized_changes_nothing(x, fmt):
    scale, zero = _range(x, fmt)
    q = quantize(x, scale, zero, fmt)
    assert np.array_equal(quantize(dequantize(q, scale, zero), scale, zero, fmt), q)


@pytest.mark.parametrize(
    ("low", "high", "fmt", "scale", "zero"),
    [
        (-1.0, 1.0, "s8", 1 / 127, 0),
        (-2.0, 1.0, "s8", 2 / 127, 0),
        (0.0, 6.0, "u8", 6 / 255, 0),
        (-1.0, 2.0, "u8", 3 / 255, 85),
        (-6.0, 0.0, "u8", 6 / 255, 255),
        (2.0, 6.0, "u8", 6 / 255, 0),  # the range is stretched to 0
        (-6.0, -2.0, "u8", 6 / 255, 255),
        (-1.0, 2.0, "s8-asym", 3 / 255, -43),
        (0.0, 0.0, "u8", 1.0, 0),
        (0.0, 0.0, "s8", 1.0, 0),
        (-1.0, 3.0, "u16", 4 / 65535, 16384),  # 16383.75
    ],
)
def test_scales_and_zero_points_worked_by_hand(low, high, fmt, scale, zero):
    found = scale_zero(low, high, FORMATS[fmt])
    assert found[0] == pytest.approx(scale, rel=2**-22)
    assert int(found[1]) == zero


@given(
    x=arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), elements=VALUES),
    axis=st.integers(0, 2),
    fmt=FORMAT,
)
@settings(deadline=None)
def test_per_channel_is_per_tensor_on_each_channel(x, axis, fmt):
    others = tuple(i for i in range(3) if i != axis)
    scale, zero = scale_zero(x.min(axis=others), x.max(axis=others), fmt)
    q = quantize(x, scale, zero, fmt, axis)
    back = dequantize(q, scale, zero, axis)
    for channel in range(x.shape[axis]):
        part = np.take(x, channel, axis)
        s, z = _range(part, fmt)
        assert s == scale[channel]
        assert z == zero[channel]
        assert np.array_equal(np.take(q, channel, axis), quantize(part, s, z, fmt))
        assert np.array_equal(np.take(back, channel, axis), dequantize(np.take(q, channel, axis), s, z))


@functools.cache
def _runtime(stored: str, axis: int | None) -> ReferenceSession:
    """ONNX Runtime's own QuantizeLinear and DequantizeLinear."""
    shape = "" if axis is None else "[C]"
    options = "" if axis is None else f"<axis = {axis}>"
    return ReferenceSession(
        parse(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[A, B] x, float{shape} s, {stored}{shape} z) => ({stored}[A, B] q, float[A, B] y) {{
          q = QuantizeLinear{options}(x, s, z)
          y = DequantizeLinear{options}(q, s, z)
        }}
        """),
        optimize=False,
    )


@given(
    x=arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=VALUES),
    axis=st.sampled_from([None, 0, 1]),
    fmt=INTEGERS,
)
@settings(max_examples=300, deadline=None)
def test_onnx_runtime_computes_the_same_bits(x, axis, fmt):
    others = None if axis is None else (1 - axis,)
    scale, zero = scale_zero(x.min(axis=others), x.max(axis=others), fmt)
    found = _runtime(fmt.dtype.name.lower(), axis).run({"x": x, "s": scale, "z": zero})
    q = quantize(x, scale, zero, fmt, axis)
    # ONNX knows no narrow range: where -128 would do, optkit stays at -127.
    assert np.array_equal(np.maximum(found["q"], fmt.low), q)
    assert np.array_equal(
        found["y"].view(np.uint32), dequantize(found["q"], scale, zero, axis).view(np.uint32)
    )


@functools.cache
def _fp8_runtime() -> ReferenceSession:
    # ONNX Runtime takes and gives no arrays of 8-bit floats in Python: they stay inside the graph.
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[A, B] x, float s) => (float[A, B] q, float[A, B] y) {
      f = QuantizeLinear(x, s, z)
      q = Cast<to = 1>(f)
      y = DequantizeLinear(f, s, z)
    }
    """
    return ReferenceSession(parse(text, z=np.zeros((), E4M3.dtype.numpy())), optimize=False)


@given(x=arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=VALUES))
@settings(max_examples=300, deadline=None)
def test_onnx_runtime_computes_the_same_floats_of_8_bits(x):
    scale, zero = _range(x, E4M3)
    found = _fp8_runtime().run({"x": x, "s": scale})
    q = quantize(x, scale, zero, E4M3)
    assert np.array_equal(found["q"], q.astype(np.float32))
    assert np.array_equal(found["y"], dequantize(q, scale, zero))


def test_floats_of_8_bits_end_at_448_and_round_to_even():
    x = np.array([448, 500, 1e9, -1e9, 2.0**-9, 2.0**-10, 17, 19], np.float32)
    expected = [448, 448, 448, -448, 2.0**-9, 0, 16, 20]
    zero = np.zeros((), E4M3.dtype.numpy())
    assert quantize(x, np.float32(1), zero, E4M3).astype(np.float32).tolist() == expected
    found = _fp8_runtime().run({"x": x[None], "s": np.asarray(1, np.float32)})["q"]
    assert found[0].tolist() == expected


@pytest.mark.parametrize("fmt", ["u8", "s8-asym", "u16"])
def test_ties_go_to_even_as_in_onnx_runtime(fmt):
    fmt = FORMATS[fmt]
    x = (np.arange(-20, 21, dtype=np.float32) / 2)[None]
    scale, zero = np.float32(1), np.asarray(fmt.low + 30, fmt.dtype.numpy())
    expected = [round(v) + fmt.low + 30 for v in x[0].tolist()]
    assert quantize(x, scale, zero, fmt)[0].tolist() == expected
    runtime = _runtime(fmt.dtype.name.lower(), None)
    assert runtime.run({"x": x, "s": np.asarray(scale), "z": zero})["q"][0].tolist() == expected


def test_values_beyond_the_range_are_clipped():
    scale, zero = scale_zero(-1.0, 1.0, FORMATS["u8"])
    assert quantize(np.array([-9, 9], np.float32), scale, zero, FORMATS["u8"]).tolist() == [0, 255]


# Weights


@given(x=ARRAYS, axis=st.none() | st.integers(0, 2), block=st.integers(1, 40))
@settings(deadline=None)
def test_the_range_of_a_weight_does_not_depend_on_the_size_of_blocks(x, axis, block):
    axis = None if axis is None or axis >= x.ndim else axis
    others = None if axis is None else tuple(i for i in range(x.ndim) if i != axis)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qdq, "_BLOCK", block)
        assert np.array_equal(weight_range(x, axis), np.abs(x).max(axis=others))


@pytest.mark.parametrize(
    ("shape", "axis"), [((), None), ((0, 3), None), ((0, 3), 1), ((0, 3), 0), ((3, 0), 0)]
)
def test_the_range_of_a_weight_without_elements_or_axes_has_the_shape_of_its_channels(shape, axis):
    expected = () if axis is None else (shape[axis],)
    assert weight_range(np.ones(shape, np.float32), axis).shape == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_numbers_show_in_the_range(bad):
    weight = np.ones((4, 3), np.float32)
    weight[2, 1] = bad
    assert np.isfinite(weight_range(weight, 1)).tolist() == [True, False, True]


@given(
    x=arrays(
        np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=st.floats(-9, 9, width=32)
    ),
    axis=st.sampled_from([None, 0, 1]),
    block=st.sampled_from([1, 2, 5, 7, 1 << 22]),
)
@settings(deadline=None)
def test_a_lazy_weight_is_quantized_in_blocks_as_at_once_and_each_time_the_same(x, axis, block):
    fmt = FORMATS["s8"]
    top = weight_range(x, axis)
    scale, zero = scale_zero(-top, top, fmt)
    tensor = quantized_tensor(ir.tensor(x), scale, zero, fmt, axis, "w")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qdq, "_BLOCK", block)
        first, second = tensor.numpy(), tensor.numpy()
    assert np.array_equal(first, quantize(x, scale, zero, fmt, axis))
    assert np.array_equal(first, second)
    assert (tensor.dtype, tensor.shape.numpy()) == (ir.DataType.INT8, x.shape)


def test_a_lazy_weight_keeps_no_integers_of_its_own():
    tensor = quantized_tensor(
        ir.tensor(np.ones((2, 2), np.float32)), np.float32(1), np.int8(0), FORMATS["s8"], None, "w"
    )
    assert tensor.numpy() is not tensor.numpy()


# Pairs in the graph

CHAIN = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[2, 4] x) => (float[2, 4] y, float[2, 4] z, float[2, 4] y2) {
  y = Exp(x)
  y2 = Neg(y)
  z = Abs(y)
}
"""
U8 = FORMATS["u8"]


def _values(model):
    return {v.name: v for v in (*model.graph.inputs, *(o for n in model.graph for o in n.outputs))}


def _insert(model, name, *, outputs, readers=None):
    value = _values(model)[name]
    chosen = [(u.node, u.idx) for u in value.uses() if readers is None or u.node.op_type in readers]
    insert_pair(value, chosen, *scale_zero(0.0, 6.0, U8), U8, outputs=outputs, names=Names(model))
    verify(model)


def test_a_pair_behind_an_output_keeps_its_name_and_its_place():
    model = parse(CHAIN)
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    before = ReferenceSession(model).run({"x": x})
    _insert(model, "y", outputs=True)
    assert [v.name for v in model.graph.outputs] == ["y", "z", "y2"]
    assert [n.op_type for n in walk(model)] == ["Exp", "QuantizeLinear", "DequantizeLinear", "Neg", "Abs"]
    after = ReferenceSession(model).run({"x": x})
    for name, sign in (("y", 1), ("z", 1), ("y2", -1)):
        scale, zero = scale_zero(0.0, 6.0, U8)
        on_grid = dequantize(quantize(before["y"], scale, zero, U8), scale, zero)
        assert np.array_equal(after[name], sign * on_grid)


def test_an_output_that_is_not_owned_and_other_readers_keep_reading_the_float():
    model = parse(CHAIN)
    _insert(model, "y", outputs=False, readers={"Abs"})
    producers = {
        node.op_type: node.inputs[0].producer() for node in model.graph if node.op_type in ("Neg", "Abs")
    }
    assert producers["Neg"].op_type == "Exp"
    assert producers["Abs"].op_type == "DequantizeLinear"
    assert model.graph.outputs[0].producer().op_type == "Exp"


def test_a_pair_behind_an_input_comes_first_and_leaves_the_input():
    model = parse(CHAIN)
    _insert(model, "x", outputs=False)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert [n.op_type for n in model.graph][:3] == ["QuantizeLinear", "DequantizeLinear", "Exp"]
    assert is_quantized(model.graph[2].inputs[0])


def test_names_that_are_taken_get_a_number():
    model = parse("""
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[2] x) => (float[2] y) <float "x/scale" = {2}> {
      "x/quantized" = Mul(x, "x/scale")
      "x/dequantized" = Exp("x/quantized")
      y = Add("x/dequantized", x)
    }
    """)
    _insert(model, "x", outputs=False)
    _insert(model, "x/dequantized", outputs=False)
    names = [
        v.name for v in (*model.graph.initializers.values(), *(o for n in model.graph for o in n.outputs))
    ]
    assert len(names) == len(set(names))
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_a_constant_is_read_through_its_own_dequantize_and_stored_once():
    model = parse("""
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[2, 3] x) => (float[2, 2] y, float[2, 2] z) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
      y = MatMul(x, w)
      z = MatMul(x, w)
    }
    """)
    fmt, names = FORMATS["s8"], Names(model)
    weight = model.graph.initializers["w"]
    top = weight_range(weight.const_value.numpy(), 1)
    scale, zero = scale_zero(-top, top, fmt)
    tensor = quantized_tensor(weight.const_value, scale, zero, fmt, 1, "w")
    kept = store(model.graph, "w", tensor, scale, zero, 1, names)
    for node in tuple(model.graph):
        dequantize_constant(node, 1, kept, str(node.name), names)
    verify(model)
    assert sorted(model.graph.initializers) == ["w", "w/q", "w/scale", "w/zero"]
    x = np.eye(2, 3, dtype=np.float32)
    found = ReferenceSession(model, optimize=False).run({"x": x})
    on_grid = dequantize(quantize(weight.const_value.numpy(), scale, zero, fmt, 1), scale, zero, 1)
    # Sums of one product and zeros: exact.
    assert np.array_equal(found["y"], x @ on_grid)
    assert np.array_equal(found["z"], x @ on_grid)
