"""Scales of weights in 4 bits get the precision of the product; what that costs is a rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from optkit.graph import walk
from optkit.passes.base import Context
from optkit.passes.lowering.scales import CastScales
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import check_pass, parse

CONTEXT = Context(target=target("l4"))
HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
NET = "g (float16[N, 64] x) => (float16[N, 12] y) { w = DequantizeLinear<axis = 0, block_size = 16>(%s) %s y = MatMul(x, h) }"
CAST = "h = Cast<to = 10>(w)"


def _weights(*, zeros: bool = False) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    stored = ml_dtypes.uint4 if zeros else ml_dtypes.int4
    found = {
        "q": random.integers(0, 16, (64, 12)).astype(stored) if zeros else random.integers(-8, 8, (64, 12)).astype(stored),
        "s": random.uniform(0.01, 0.1, (4, 12)).astype(np.float32),
    }  # fmt: skip
    return found | ({"z": random.integers(0, 16, (4, 12)).astype(stored)} if zeros else {})


def _model(weights: dict[str, np.ndarray], behind: str = CAST) -> ir.Model:
    return parse(HEAD + NET % (", ".join(weights), behind), **weights)


def _scales(model: ir.Model) -> list[ir.DataType | None]:
    return [n.inputs[1].dtype for n in walk(model) if n.op_type == "DequantizeLinear"]


@pytest.mark.parametrize("zeros", [False, True])
def test_weights_are_unpacked_to_what_they_were_cast_to(zeros):
    # Outputs are sums of 64 products, each off by up to 2**-11 of itself, and rounded to float16.
    model = check_pass(
        CastScales(), _model(_weights(zeros=zeros)), ops=["DequantizeLinear", "MatMul"], context=CONTEXT, atol=1e-2, rtol=2e-3
    )  # fmt: skip
    assert _scales(model) == [ir.DataType.FLOAT16] and "s" not in model.graph.initializers
    assert model.graph[0].outputs[0].name == "w"


def test_a_weight_is_off_by_two_roundings_at_most():
    weights = _weights()
    text = "g (float[N, 64] x) => (float[N, 12] y) { w = DequantizeLinear<axis = 0, block_size = 16>(q, s) h = Cast<to = 10>(w) f = Cast<to = 1>(h) y = MatMul(x, f) }"
    model = parse(HEAD + text, **weights)
    assert CastScales().run(model, CONTEXT)
    found = ReferenceSession(model, optimize=False).run({"x": np.eye(64, dtype=np.float32)})["y"]
    exact = weights["q"].astype(np.float64) * np.repeat(weights["s"].astype(np.float64), 16, 0)
    assert (np.abs(found - exact) <= 2.01 * 2.0**-11 * np.abs(exact)).all()


def test_several_casts_become_one():
    behind = f"{CAST} k = Cast<to = 10>(w) a = MatMul(x, k) b = Relu(a)"
    check_pass(CastScales(), _model(_weights(), behind), context=CONTEXT, atol=1e-2, rtol=2e-3)


@pytest.mark.parametrize("behind", [CAST + " k = Abs(w)", CAST + " k = Cast<to = 16>(w)", "k = Cast<to = 16>(w) h = Cast<to = 10>(k)", "t = Abs(w) h = Cast<to = 10>(t)"])  # fmt: skip
def test_other_readers_keep_the_scales(behind):
    model = _model(_weights(), behind)
    assert not CastScales().run(model, CONTEXT) and _scales(model) == [ir.DataType.FLOAT]


@pytest.mark.parametrize("wild", [1e-6, 5000.0])
def test_scales_that_the_format_has_no_room_for_stay(wild):
    weights = _weights()
    weights["s"][1, 2] = wild
    assert not CastScales().run(_model(weights), CONTEXT)


@pytest.mark.parametrize("zeros", [False, True])
def test_the_scale_of_a_block_of_zeros_may_be_any(zeros):
    weights = _weights(zeros=zeros)
    weights["s"][1, 2] = np.finfo(np.float32).tiny
    weights["q"][16:32, 2] = weights["z"][1, 2] if zeros else 0
    model = check_pass(CastScales(), _model(weights), context=CONTEXT, atol=1e-2, rtol=2e-3)
    scales = next(n.inputs[1].const_value.numpy() for n in walk(model) if n.op_type == "DequantizeLinear")
    assert scales.min() == np.finfo(np.float16).smallest_normal


def test_computed_scales_scales_without_blocks_and_weights_of_8_bits_stay():
    text = HEAD + NET % ("q, t", CAST)
    computed = parse(text.replace("{ w", "{ t = Abs(s) w"), **_weights())
    channels = _weights() | {"s": np.full(12, 0.1, np.float32)}
    single = parse(HEAD + (NET % ("q, s", CAST)).replace("axis = 0, block_size = 16", "axis = 1"), **channels)
    eight = _weights()
    eight["q"] = eight["q"].astype(np.int8)
    for model in (computed, single, _model(eight)):
        assert not CastScales().run(model, CONTEXT)
