"""Linear layers in NVFP4 and MXFP8."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from optkit.arithmetic import product_format, products, stored
from optkit.data import CalibrationData
from optkit.errors import BackendUnavailableError
from optkit.graph import walk
from optkit.microscaling import BLOCK_FORMATS, tensor_scale
from optkit.passes.base import Context
from optkit.passes.lowering.cast import CastFloats
from optkit.passes.quantization.microscaling import QuantizeMicroscaling
from optkit.targets import target
from optkit.testing import check_pass, parse, same_numbers

B200 = Context(target=target("b200"))
LINEAR = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 3, 64] x) => (float[N, 3, 40] y) { %s }
"""
GEMM = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 64] x) => (float[N, 40] y) { [p] y = Gemm<transB = 1>(x, w, b) }
"""
# Sums of 64 products of about 1 x 1/8, both factors rounded: by up to 1/6 of the largest of a block in 4 bits, by 1/16 of
# themselves in 8.
CLOSE = {"nvfp4": {"atol": 0.8, "rtol": 0}, "mxfp8": {"atol": 0.2, "rtol": 0}}


def weight(depth=64, columns=40, seed=0):
    return (np.random.default_rng(seed).standard_normal((depth, columns)) / depth**0.5).astype(np.float32)


def calls(model):
    return [n.op_type for n in model.graph if n.domain == "optkit"]


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_both_operands_of_a_product_go_through_blocks(name):
    fmt, model = BLOCK_FORMATS[name], parse(LINEAR % "[p] y = MatMul (x, w)", w=weight())
    after = check_pass(QuantizeMicroscaling(format=name), model, context=B200, **CLOSE[name])
    assert calls(after) == [fmt.dequantize, fmt.quantize, fmt.dequantize]
    product = next(n for n in after.graph if n.name == "p")
    assert product_format(product) == name and products(after) == {name: 1}
    assert [v.shape.rank() for v in product.inputs] == [3, 2]
    held = product.inputs[1].producer().inputs
    assert held[0].const_value.shape == (64, 40) and held[1].const_value.shape == (64 // fmt.size, 40)
    assert stored(product.inputs[1]) is held[0]
    assert {f.name for f in after.functions.values()} == {fmt.quantize, fmt.dequantize}


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_the_blocks_of_a_transposed_matrix_lie_along_its_rows(name):
    model = parse(GEMM, w=weight().T.copy(), b=np.linspace(-1, 1, 40, dtype=np.float32))
    after = check_pass(QuantizeMicroscaling(format=name), model, context=B200, **CLOSE[name])
    (product,) = (n for n in after.graph if n.op_type == "Gemm")
    held = product.inputs[1].producer()
    assert held.inputs[1].const_value.shape == (40, 64 // BLOCK_FORMATS[name].size)
    assert held.attributes.get_int("axis") == 1 and product.inputs[2].is_initializer()


def test_products_that_share_their_activations_share_the_blocks():
    text = LINEAR % "p = MatMul (x, w) r = MatMul (x, u) y = Sub (p, r)"
    model = parse(text, w=weight(), u=weight(seed=1))
    after = check_pass(QuantizeMicroscaling(), model, context=B200, atol=1.6, rtol=0)
    assert calls(after).count("Nvfp4Quantize") == 1


def test_calibration_data_gives_the_scale_of_a_tensor_of_activations():
    batches = [{"x": np.full((2, 3, 64), v, np.float32)} for v in (1.0, -5.0, 2.0)]
    for data, wanted in ((CalibrationData(batches), tensor_scale(5.0)), (None, np.float32(1))):
        model = parse(LINEAR % "y = MatMul (x, w)", w=weight())
        QuantizeMicroscaling().run(model, Context(target=target("b200"), data=data))
        (quantize,) = (n for n in model.graph if n.op_type == "Nvfp4Quantize")
        assert quantize.inputs[1].const_value.numpy() == wanted


@pytest.mark.parametrize(
    ("x", "y", "nodes", "depth", "said"),
    [
        ("N, 3, 72", "N, 3, 40", "y = MatMul (x, w)", 72, "blocks of 16 do not divide 72"),
        ("N, 2, 3, 64", "N, 2, 3, 40", "y = MatMul (x, w)", 64, "not of 2 or 3 axes"),
        ("64", "40", "y = MatMul (x, w)", 64, "not of 2 or 3 axes"),
        ("64, N", "N, 40", "y = Gemm<transA = 1> (x, w)", 64, ""),
        ("N, 3, 64", "N, 3, 40", "v = Identity (w) y = MatMul (x, v)", 64, ""),
        ("N, 64, 5, 5", "N, 40, 5, 5", "t = Transpose (w) k = Reshape (t, form) y = Conv (x, k)", 64, ""),
    ],
)
def test_what_has_no_blocks_stays_in_float_and_it_is_said_why(x, y, nodes, depth, said, caplog):
    head = LINEAR.replace("N, 3, 64", x).replace("N, 3, 40", y)
    form = {"form": np.array([40, 64, 1, 1])} if "form" in nodes else {}
    model = parse(head % nodes, w=weight(depth), **form)
    with caplog.at_level(logging.INFO):
        check_pass(QuantizeMicroscaling(), model, context=B200, ops=[n.op_type for n in walk(model)])
    assert said in caplog.text


def test_small_and_ignored_weights_stay():
    text = LINEAR % "[first] p = MatMul (x, w) [second] r = MatMul (x, u) y = Sub (p, r)"
    for options in ({"ignore": ("=second",)}, {"targets": ("first",)}):
        model = parse(text, w=weight(), u=weight(seed=1))
        assert [c.node for c in QuantizeMicroscaling(**options).run(model, B200)] == ["first"]
    model = parse(text, w=weight(), u=weight(seed=1))
    assert not QuantizeMicroscaling(smallest=10_000).run(model, B200)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("card", ["l4", "h100", "t4", "jetson-orin"])
def test_cards_without_the_format_refuse_and_say_where_it_starts(name, card):
    model = parse(LINEAR % "y = MatMul (x, w)", w=weight())
    with pytest.raises(BackendUnavailableError, match=f"{name} starts with sm_100 and sm_120; {card} is"):
        QuantizeMicroscaling(format=name).run(model, Context(target=target(card)))


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_products_are_in_half_precision_and_their_operands_on_the_same_numbers_as_before(name):
    model = parse(LINEAR % "h = Tanh (x) p = MatMul (h, w) y = Tanh (p)", w=weight())
    QuantizeMicroscaling(format=name).run(model, B200)
    before = model.clone()
    CastFloats().run(model, B200)
    assert products(model) == {name: 1}
    # Tanh and the product are rounded to 11 bits, and so a number may fall to the next one of its block: 1/6 of it at most.
    same_numbers(before, model, {"x": np.ones((2, 3, 64), np.float32)}, atol=0.1)
