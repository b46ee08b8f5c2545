from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.lowering.gemm import MatMulToGemm
from optkit.testing import check_pass, parse

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[%s, 4] x) => (float[%s, 3] y) <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[3] b = {0.5, -1, 2}> {
  m = MatMul(x, w)
  y = %s
}
"""


@pytest.mark.parametrize("add", ["Add(m, b)", "Add(b, m)"])
def test_a_product_of_matrices_takes_its_bias_without_reshaping(add):
    check_pass(MatMulToGemm(), MODEL % ("N", "N", add), ops=["Gemm"])


def test_one_symbolic_axis_needs_no_computed_shape():
    check_pass(MatMulToGemm(), MODEL % ("N, 7", "N, 7", "Add(m, b)"), ops=["Reshape", "Gemm", "Reshape"])


def test_two_symbolic_axes_are_taken_from_the_input():
    check_pass(
        MatMulToGemm(),
        MODEL % ("N, T", "N, T", "Add(m, b)"),
        ops=["Reshape", "Gemm", "Shape", "Concat", "Reshape"],
    )


def test_a_product_without_bias_becomes_gemm_too():
    check_pass(MatMulToGemm(), MODEL % ("N", "N", "Relu(m)"), ops=["Gemm", "Relu"])


@pytest.mark.parametrize("other", ["Add(m, m)", "Add(m, n)"])
def test_an_add_of_something_else_stays(other):
    text = (MODEL % ("N", "N", other)).replace("m = MatMul", "n = MatMul(x, w) m = MatMul")
    after = check_pass(MatMulToGemm(), text)
    assert [n.op_type for n in after.graph].count("Add") == 1


def test_a_bias_that_is_read_by_two_products_serves_both():
    text = (MODEL % ("N", "N", "Sub(p, q)")).replace(
        "m = MatMul(x, w)", "m = MatMul(x, w) k = MatMul(x, w) p = Add(m, b) q = Add(k, b)"
    )
    check_pass(MatMulToGemm(), text, ops=["Gemm", "Gemm", "Sub"])


def test_a_product_that_is_an_output_keeps_its_name():
    text = (MODEL % ("N", "N", "Add(m, b)")).replace(
        "=> (float[N, 3] y)", "=> (float[N, 3] y, float[N, 3] m)"
    )
    check_pass(MatMulToGemm(), text, ops=["Gemm", "Add"])


@pytest.mark.parametrize("weight", ["x", "v"])
def test_products_of_two_activations_and_of_stacks_of_matrices_stay(weight):
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[2, 4, 4] x) => (float[2, 4, 4] y) {{ y = MatMul(x, {weight}) }}
    """
    weights = {"v": np.ones((2, 4, 4), np.float32)} if weight == "v" else {}
    model = parse(text, **weights)
    check_pass(MatMulToGemm(), model, ops=["MatMul"])


def test_two_layers_share_the_computed_shape():
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[N, T, 2] x) => (float[N, T, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { a = MatMul(x, w) b = Relu(a) y = MatMul(b, w) }
    """
    after = check_pass(MatMulToGemm(), text)
    assert [n.op_type for n in after.graph].count("Shape") == 1
