"""Linear layers on e4m3 with a scale for each block: the pass, and the kernels that are called for what it writes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.errors import BackendUnavailableError
from optkit.graph import walk
from optkit.passes.base import Context
from optkit.passes.lowering.cast import CastFloats
from optkit.passes.lowering.kernels import CallKernels
from optkit.passes.quantization.blocks import QuantizeBlocks
from optkit.targets import target
from optkit.testing import check_pass, parse

H100 = Context(target=target("h100"))
LINEAR = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 3, 256] x) => (float[N, 3, 160] y) { %s }
"""
EIGHT = ir.DataType.FLOAT8E4M3FN
# Sums of 256 products of about 1 x 1/16, each factor rounded by at most 2**-4 of itself.
CLOSE = {"atol": 0.2, "rtol": 0}


def weight(depth=256, columns=160, seed=0):
    """Columns and rows of very unlike sizes, which one scale for all would lose."""
    rng = np.random.default_rng(seed)
    size = np.where(np.arange(columns) < 128, 1.0, 1e-3) * np.where(np.arange(depth) < 128, 1.0, 0.1)[:, None]
    return (rng.standard_normal((depth, columns)) / depth**0.5 * size).astype(np.float32)


def test_each_block_of_activations_and_weights_has_a_scale_of_its_own():
    w = weight()
    after = check_pass(QuantizeBlocks(), parse(LINEAR % "y = MatMul (x, w)", w=w), context=H100, **CLOSE)
    (product,) = (n for n in walk(after) if n.op_type == "MatMul")
    back, stored = (v.producer() for v in product.inputs)
    assert back.op_type == stored.op_type == "DequantizeLinear"
    assert back.attributes["block_size"].value == stored.attributes["block_size"].value == 128
    assert back.inputs[0].dtype == stored.inputs[0].dtype == EIGHT
    scales = stored.inputs[1].const_value.numpy()
    assert scales.shape == (2, 160)
    tops = [[np.abs(w[r : r + 128, c : c + 128]).max() for c in (0, 128)] for r in (0, 128)]
    np.testing.assert_allclose(scales[:, [0, 127, 128, 159]], np.repeat(tops, 2, 1) / 448, rtol=1e-6)


def test_products_that_share_their_activations_share_the_grid():
    text = LINEAR % "p = MatMul (x, w) r = MatMul (x, u) y = Sub (p, r)"
    after = check_pass(QuantizeBlocks(), parse(text, w=weight(), u=weight(seed=1)), context=H100, atol=0.4)
    assert [n.op_type for n in walk(after)].count("QuantizeLinear") == 1


@pytest.mark.parametrize(("old", "new"), [("256]", "200]"), ("MatMul (x, w)", "MatMul (x, v)")])
def test_what_blocks_do_not_divide_and_other_products_stay(old, new):
    text = (LINEAR % "v = Identity (w) y = MatMul (x, w)").replace(old, new)
    model = parse(text, w=weight(200 if "200]" in text else 256))
    check_pass(QuantizeBlocks(), model, context=H100, ops=[n.op_type for n in walk(model)])


def test_cards_without_fp8_refuse():
    with pytest.raises(BackendUnavailableError, match="fp8"):
        QuantizeBlocks().run(parse(LINEAR % "y = MatMul (x, w)", w=weight()), Context(target=target("a100")))


@pytest.mark.parametrize("nodes", ["y = MatMul (x, w)", "p = MatMul (x, w) y = Add (p, b)"])
def test_what_it_writes_is_called_as_kernels(nodes):
    more = {"b": np.linspace(-1, 1, 160, dtype=np.float32)} if "b)" in nodes else {}
    model = parse(LINEAR % nodes, w=weight(), **more)
    QuantizeBlocks().run(model, H100)
    check_pass(
        CallKernels(), model, context=H100, ops=["QuantizeBlocks", "LinearFp8Blocks"], atol=1e-4, rtol=1e-4
    )


def test_activations_in_half_precision_go_onto_the_grid_as_they_are():
    model = parse(LINEAR % "h = Tanh (x) p = MatMul (h, w) y = Tanh (p)", w=weight())
    for step in (QuantizeBlocks(), CallKernels(kernels=("quantize-blocks",)), CastFloats(), CallKernels()):
        step.run(model, H100)
    kinds = {n.op_type: n.inputs[0].dtype for n in walk(model)}
    assert (kinds["QuantizeBlocks"], kinds["LinearFp8Blocks"]) == (ir.DataType.FLOAT16, EIGHT)
    (made,) = (n for n in walk(model) if n.op_type == "QuantizeBlocks")
    assert [v.dtype for v in made.outputs] == [EIGHT, ir.DataType.FLOAT]


@pytest.mark.parametrize(
    ("old", "new"),
    [("Max (d, least)", "Max (d, most)"), ("Div (m, most)", "Div (m, least)"), ("Abs (r)", "Abs (o)")],
)
def test_steps_of_anything_else_are_no_kernel(old, new):
    nodes = (
        "o = Reshape (z, form) r = Reshape (x, form) a = Abs (r) m = ReduceMax <keepdims = 0> (a, last) d = Div (m, most) "
        f"s = Max (d, least) q = QuantizeLinear <axis = 2, block_size = 128, output_dtype = {int(EIGHT)}> (x, s) "
        "y = DequantizeLinear <axis = 2, block_size = 128> (q, s)"
    )
    given = {
        "form": np.array([0, 0, -1, 128]), "last": np.array([-1]), "most": np.array(448, np.float32),
        "least": np.array(1e-30, np.float32), "z": np.ones((2, 3, 256), np.float32),
    }  # fmt: skip
    text = (LINEAR % nodes).replace("[N, 3, 160]", "[2, 3, 256]").replace("[N, 3, 256] x", "[2, 3, 256] x")
    for asked, calls in ((text, ["QuantizeBlocks"]), (text.replace(old, new), [])):
        model = parse(asked, **given)
        CallKernels(kernels=("quantize-blocks",)).run(model, H100)
        assert [n.op_type for n in walk(model) if n.domain == "optkit"] == calls
