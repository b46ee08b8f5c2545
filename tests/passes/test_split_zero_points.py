"""Zero points of weights in 4 bits are taken out of products, exactly."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from optkit.graph import walk
from optkit.passes.base import Context
from optkit.passes.lowering.zero_points import SplitZeroPoints
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import check_pass, parse

CONTEXT = Context(target=target("l4"))
DEPTH, COLUMNS, BLOCK = 64, 12, 16
ADDED = ["DequantizeLinear", "Reshape", "ReduceMean", "MatMul", "MatMul", "Add"]


def _weights(
    stored: type = ml_dtypes.uint4, kind: type = np.float32, turned: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    random, low = np.random.default_rng(seed), 0 if stored is ml_dtypes.uint4 else -8
    found = {
        "q": random.integers(low, low + 16, (DEPTH, COLUMNS)).astype(stored),
        "s": random.uniform(0.01, 0.1, (DEPTH // BLOCK, COLUMNS)).astype(kind),
        "z": random.integers(low, low + 16, (DEPTH // BLOCK, COLUMNS)).astype(stored),
    }
    return {k: np.ascontiguousarray(v.T) for k, v in found.items()} if turned else found


def _model(
    body: str, *, x: str = f"float[2, N, {DEPTH}]", y: str = "float", more: str = "", **weights: np.ndarray
) -> ir.Model:
    head = f'<ir_version: 10, opset_import: ["" : 21]>\ng ({x} x{more}) => ({y} y)'
    return parse(f"{head} {{ {body.replace('BLOCKS', f'block_size = {BLOCK}')} }}", **weights)


def _checked(model: ir.Model, ops: list[str] | None = None) -> ir.Model:
    return check_pass(SplitZeroPoints(), model, ops=ops, context=CONTEXT, atol=2e-5, rtol=2e-5)


def _stored(model: ir.Model) -> list[tuple[ir.DataType | None, int]]:
    return [(n.inputs[0].dtype, len(n.inputs)) for n in walk(model) if n.op_type == "DequantizeLinear"]


PLAIN = "w = DequantizeLinear<axis = 0, BLOCKS>(q, s, z) y = MatMul(x, w)"


@pytest.mark.parametrize("stored", [ml_dtypes.uint4, ml_dtypes.int4])
@pytest.mark.parametrize("shape", [f"{DEPTH}", f"N, {DEPTH}", f"2, N, {DEPTH}"])
def test_a_product_is_one_with_integers_around_zero_and_a_small_one_with_means(stored, shape):
    model = _checked(_model(PLAIN, x=f"float[{shape}]", **_weights(stored)), ADDED)
    assert _stored(model) == [(ir.DataType.INT4, 2)]
    assert not {"q", "z"} & set(model.graph.initializers) and "s" in model.graph.initializers


def test_no_zero_point_at_all_is_eight_steps_from_the_middle_in_uint4():
    weights = _weights()
    del weights["z"]
    _checked(_model(PLAIN.replace(", z", ""), **weights), ADDED)


@pytest.mark.parametrize(("stored", "middle"), [(ml_dtypes.uint4, 8), (ml_dtypes.int4, 0)])
def test_nothing_is_added_where_the_integers_stand_around_their_middle(stored, middle):
    weights = _weights(stored)
    weights["z"] = np.full_like(weights["z"], middle)
    model = _checked(_model(PLAIN, **weights), ["DequantizeLinear", "MatMul"])
    assert _stored(model) == [(ir.DataType.INT4, 2)]


def test_weights_that_lie_the_other_way_round_are_summed_along_their_second_axis():
    body = "w = DequantizeLinear<axis = 1, BLOCKS>(q, s, z) t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)"
    ops = ["DequantizeLinear", "Transpose", *ADDED[1:]]
    _checked(_model(body, **_weights(turned=True)), ops)


@pytest.mark.parametrize("turned", [False, True])
def test_a_gemm_keeps_its_factors_and_its_bias(turned):
    body = (
        f"w = DequantizeLinear<axis = {int(turned)}, BLOCKS>(q, s, z) "
        f"y = Gemm<alpha = 0.5, beta = 2.0, transB = {int(turned)}>(x, w, b)"
    )
    bias = np.random.default_rng(3).normal(size=COLUMNS).astype(np.float32)
    model = _model(body, x=f"float[N, {DEPTH}]", b=bias, **_weights(turned=turned))
    _checked(model, [*ADDED[:4], "Gemm", "Add"])


def test_products_of_one_input_share_its_means_whatever_order_the_weights_are_in():
    body = (
        "v = DequantizeLinear<axis = 0, BLOCKS>(q2, s, z2) w = DequantizeLinear<axis = 0, BLOCKS>(q, s, z) "
        "a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b)"
    )
    weights, other = _weights(), _weights(seed=1)
    model = _checked(_model(body, q2=other["q"], z2=other["z"], **weights))
    assert [n.op_type for n in walk(model)].count("ReduceMean") == 1


def test_weights_that_two_products_read_are_stored_once():
    body = "w = DequantizeLinear<axis = 0, BLOCKS>(q, s, z) a = MatMul(x, w) n = Neg(x) b = MatMul(n, w) y = Add(a, b)"
    model = _checked(_model(body, **_weights()))
    assert len(_stored(model)) == 1 and [n.op_type for n in walk(model)].count("ReduceMean") == 2


def test_products_in_bodies_are_rewritten_where_they_stand():
    body = (
        "w = DequantizeLinear<axis = 0, BLOCKS>(q, s, z) "
        "y = If(c) <then_branch = t () => (float[2, N, 12] u) { u = MatMul(x, w) }, "
        "else_branch = e () => (float[2, N, 12] v) { n = Neg(x) v = MatMul(n, w) }>"
    )
    for c in (True, False):
        check_pass(
            SplitZeroPoints(),
            _model(body, more=", bool c", **_weights()),
            context=CONTEXT,
            atol=2e-5,
            x=np.random.default_rng(0).normal(size=(2, 3, DEPTH)).astype(np.float32),
            c=np.array(c),
        )


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(PLAIN + " i = Identity(w) r = ReduceSum(i)", id="something else reads the weights"),
        pytest.param("w = DequantizeLinear<axis = 0, BLOCKS>(q, s, z) y = MatMul(w, x)", id="weights come first"),
        pytest.param("w = DequantizeLinear<axis = 0, BLOCKS>(q, s, z) y = Gather(w, x)", id="a table"),
        pytest.param("w = DequantizeLinear<axis = 0, BLOCKS>(q, s, z) y = Identity(w)", id="no product"),
        pytest.param("w = DequantizeLinear<axis = 0, BLOCKS>(q, s, z) y = Gemm<transA = 1>(x, w)", id="inputs turned"),
    ],
)  # fmt: skip
def test_other_readers_keep_the_zero_points(body):
    shapes = {"MatMul(w": "float[12, 3]", "Gather": "int64[3]", "transA": f"float[{DEPTH}, 3]"}
    x = next((shape for part, shape in shapes.items() if part in body), f"float[2, N, {DEPTH}]")
    model = _model(body, x=x, **_weights())
    assert not SplitZeroPoints().run(model, CONTEXT) and _stored(model) == [(ir.DataType.UINT4, 3)]


def test_blocks_along_the_outputs_and_blocks_that_do_not_divide_keep_their_zero_points():
    across = {"q": np.zeros((DEPTH, 32), ml_dtypes.uint4)}
    across |= {"s": np.ones((DEPTH, 2), np.float32), "z": np.ones((DEPTH, 2), ml_dtypes.uint4)}
    short = {"q": np.zeros((DEPTH - 8, COLUMNS), ml_dtypes.uint4)}
    short |= {"s": np.ones((4, COLUMNS), np.float32), "z": np.ones((4, COLUMNS), ml_dtypes.uint4)}
    single = {"q": np.zeros((DEPTH, COLUMNS), ml_dtypes.uint4)}
    single |= {"s": np.ones(COLUMNS, np.float32), "z": np.ones(COLUMNS, ml_dtypes.uint4)}
    for body, x, weights in (
        (PLAIN.replace("axis = 0", "axis = 1"), DEPTH, across),
        (PLAIN, DEPTH - 8, short),
        (PLAIN.replace("axis = 0, BLOCKS", "axis = 1"), DEPTH, single),
    ):
        assert not SplitZeroPoints().run(_model(body, x=f"float[N, {x}]", **weights), CONTEXT)


def test_scales_that_are_computed_and_weights_of_8_bits_are_left_alone():
    scale = PLAIN.replace("w =", "t = Abs(s) w =").replace("(q, s", "(q, t")
    assert not SplitZeroPoints().run(_model(scale, **_weights()), CONTEXT)
    eight = {k: v.astype(np.uint8) if k in "qz" else v for k, v in _weights().items()}
    assert not SplitZeroPoints().run(_model(PLAIN, **eight), CONTEXT)


def test_what_float16_cannot_hold_keeps_its_zero_points():
    weights = _weights(kind=np.float16)
    weights["s"][:] = 600
    weights["z"][:] = 0
    model = _model(PLAIN, x=f"float16[N, {DEPTH}]", y="float16", **weights)
    assert not SplitZeroPoints().run(model, CONTEXT)


def _rounded_to_16(rows: int, x: np.ndarray, weights: dict[str, np.ndarray]) -> tuple[float, float]:
    """Largest error before and after, as a share of the largest output in float64."""
    model = _model(PLAIN, x=f"float16[{rows}, {DEPTH}]", y="float16", **weights)
    after = model.clone()
    assert SplitZeroPoints().run(after, CONTEXT)
    q, s, z = (weights[k].astype(np.float64) for k in "qsz")
    exact = x.astype(np.float64) @ ((q - np.repeat(z, BLOCK, 0)) * np.repeat(s, BLOCK, 0))
    errors = [
        np.abs(ReferenceSession(m, optimize=False).run({"x": x})["y"].astype(np.float64) - exact).max()
        for m in (model, after)
    ]
    return errors[0] / np.abs(exact).max(), errors[1] / np.abs(exact).max()


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_in_float16_the_error_stays_that_of_float16(mean):
    # Three roundings of sums that largely cancel where inputs have a mean: each is half of 2**-10 of what is summed.
    random = np.random.default_rng(0)
    x = (random.normal(size=(32, DEPTH)) + mean).astype(np.float16)
    before, after = _rounded_to_16(32, x, _weights(kind=np.float16))
    assert before < 1e-3 and after < 3e-3
