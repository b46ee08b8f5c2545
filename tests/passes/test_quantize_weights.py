from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.passes.quantization.weights import QuantizeWeights
from optkit.testing import check_pass, parse

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
LINEAR = HEAD + "g (float[N, 64] x) => (float[N, 8] y) { y = MatMul(x, w) }"


def _weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _floats(model: ir.Model, name: str) -> np.ndarray:
    """What the stored weights stand for, by ONNX's definition."""
    node = next(n for n in model.graph if n.op_type == "DequantizeLinear" and n.inputs[0].name == f"{name}/q")
    q, scale = (v.const_value.numpy().astype(np.float64) for v in node.inputs[:2])
    axis, block = node.attributes.get_int("axis"), node.attributes.get_int("block_size", 0)
    if block:
        return q * np.repeat(scale, block, axis)
    shape = [-1 if i == axis else 1 for i in range(q.ndim)]
    return q * scale.reshape(shape)


def test_eight_bits_are_off_by_half_a_step_of_their_channel():
    w = _weight(64, 8) * np.array([1, 1, 50, 1, 1, 1, 1, 0], np.float32)
    after = check_pass(
        QuantizeWeights(smallest=1),
        parse(LINEAR, w=w),
        ops=["DequantizeLinear", "MatMul"],
        atol=64 * 4,
        rtol=0,
    )
    steps = np.abs(w).max(0) / 127
    assert (np.abs(_floats(after, "w") - w) <= steps / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("block", [16, 32])
def test_four_bits_have_a_scale_for_each_block_along_the_sum(block):
    w = _weight(64, 8)
    w[:block] *= 100
    after = check_pass(QuantizeWeights(smallest=1, bits=4, block=block), parse(LINEAR, w=w), atol=1e4, rtol=0)
    scale = after.graph.initializers["w/scale"].const_value
    assert after.graph.initializers["w/q"].dtype == ir.DataType.INT4
    assert list(scale.shape) == [64 // block, 8]
    error = np.square(_floats(after, "w") - w)
    # Not worse than rounding to the full range of each block.
    parts = w.reshape(64 // block, block, 8)
    plain = np.abs(parts).max(1, keepdims=True) / 7
    assert error.sum() <= np.square(np.rint(parts / plain) * plain - parts).sum() * (1 + 1e-5)
    assert np.sqrt(error[block:].mean()) < 0.15


def test_negative_scales_let_the_lowest_integer_stand_for_the_largest_weight_of_either_sign():
    w = _weight(64, 8)
    errors = []
    for negative in (False, True):
        step = QuantizeWeights(smallest=1, bits=4, block=16, negative=negative)
        after = check_pass(step, parse(LINEAR, w=w), atol=1e4, rtol=0)
        scale = after.graph.initializers["w/scale"].const_value.numpy()
        assert (scale < 0).any() == negative
        errors.append(np.square(_floats(after, "w") - w).sum())
    assert errors[1] < errors[0]
    # A block of eighths of its largest weight, whose sign decides that of the scale.
    for sign in (1, -1):
        w = np.full((64, 8), 0.375, np.float32) * sign
        w[::16] = sign
        step = QuantizeWeights(smallest=1, bits=4, block=16, negative=True)
        after = check_pass(step, parse(LINEAR, w=w), atol=1e-5, rtol=0)
        np.testing.assert_array_equal(_floats(after, "w"), w)
        assert (after.graph.initializers["w/scale"].const_value.numpy() == -sign / 8).all()


@pytest.mark.parametrize(
    ("graph", "shape", "axis"),
    [
        ("g (float[N, 32] x) => (float[N, 8] y) { y = Gemm<transB = 1>(x, w) }", (8, 32), 0),
        ("g (float[N, 32] x) => (float[N, 8] y) { y = Gemm(x, w) }", (32, 8), 1),
        (
            "g (float[N, 4, 5, 5] x) => (float[N, 8, 3, 3] y) { y = Conv<kernel_shape = [3, 3]>(x, w) }",
            (8, 4, 3, 3),
            0,
        ),
        (
            "g (float[N, 4, 5] x) => (float[N, 8, 6] y) { y = ConvTranspose<kernel_shape = [2]>(x, w) }",
            (4, 8, 2),
            1,
        ),
        ("g (int64[N] x) => (float[N, 8] y) { y = Gather(w, x) }", (16, 8), 0),
    ],
)
def test_scales_lie_along_the_output_channels(graph, shape, axis):
    w = _weight(*shape)
    after = check_pass(QuantizeWeights(smallest=1), parse(HEAD + graph, w=w), atol=0.3, rtol=0.1)
    node = next(n for n in after.graph if n.op_type == "DequantizeLinear")
    assert node.attributes.get_int("axis") == axis and node.inputs[1].shape.numpy() == (shape[axis],)
    assert np.abs(_floats(after, "w") - w).max() <= np.abs(w).max() / 254 * (1 + 1e-5)


def test_wide_kernels_and_odd_sizes_take_eight_bits():
    for graph, shape in (
        (
            "g (float[1, 16, 5, 5] x) => (float[1, 8, 3, 3] y) { y = Conv<kernel_shape = [3, 3]>(x, w) }",
            (8, 16, 3, 3),
        ),
        ("g (float[N, 40] x) => (float[N, 8] y) { y = MatMul(x, w) }", (40, 8)),
    ):
        after = check_pass(
            QuantizeWeights(smallest=1, bits=4), parse(HEAD + graph, w=_weight(*shape)), atol=0.5, rtol=0.1
        )
        assert after.graph.initializers["w/q"].dtype == ir.DataType.INT8


def test_readers_share_what_is_stored():
    text = LINEAR.replace("y = MatMul(x, w)", "a = MatMul(x, w) b = MatMul(x, w) y = Add(a, b)")
    check_pass(
        QuantizeWeights(smallest=1),
        parse(text, w=_weight(64, 8)),
        ops=["DequantizeLinear", "MatMul", "MatMul", "Add"],
        atol=2,
    )


def test_what_blocks_do_not_divide_can_be_left_to_another_pass():
    text = HEAD + "g (float[N, 64] x) => (float[N, 40] y) { a = MatMul(x, w) y = MatMul(a, v) }"
    model = parse(text, w=_weight(64, 50), v=_weight(50, 40))
    # 50 is divided by no size from 32 to 26.
    after = check_pass(
        QuantizeWeights(bits=4, least=26, rest=False, smallest=1), model,
        ops=["DequantizeLinear", "MatMul", "MatMul"], atol=20,
    )  # fmt: skip
    assert "v" in after.graph.initializers
    assert "w" not in after.graph.initializers
    again = check_pass(
        QuantizeWeights(rest=False, smallest=1), parse(text, w=_weight(64, 50), v=_weight(50, 40)), atol=20
    )
    assert not {"v", "w"} & set(again.graph.initializers)


@pytest.mark.parametrize(
    ("graph", "options"),
    [
        ("{ y = MatMul(x, w) }", {"smallest": 513}),
        ("{ y = MatMul(x, w) }", {"ignore": ("MatMul",)}),
        ("{ y = MatMul(x, w) }", {"targets": ("Conv",)}),
        ("{ a = MatMul(x, w) b = ReduceSum(w) y = Add(a, b) }", {}),
        ("{ v = Neg(w) y = MatMul(x, v) }", {}),
    ],
)
def test_other_constants_stay(graph, options):
    model = parse(HEAD + "g (float[N, 64] x) => (float[N, 8] y) " + graph, w=_weight(64, 8))
    after = check_pass(QuantizeWeights(**{"smallest": 1, **options}), model)
    assert "w" in after.graph.initializers


def test_weights_that_are_no_numbers_stay(caplog):
    w = _weight(64, 8)
    w[0, 0] = np.inf
    model = parse(LINEAR, w=w)
    from optkit.passes.base import Context
    from optkit.targets import target

    assert not QuantizeWeights(smallest=1).run(model, Context(target=target("cpu")))
    assert "keeps its weights: they are infinite or NaN" in caplog.text
