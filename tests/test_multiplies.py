"""Multiply-accumulates of operators from elsewhere, against products by hand."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from optkit.arithmetic import product_format
from optkit.multiplies import macs, uncounted

FLOAT, BYTE = ir.DataType.FLOAT, ir.DataType.UINT8


def node(op, inputs, outputs, domain="com.microsoft", dtype=FLOAT, **attributes):
    def value(shape):
        return None if shape is None else ir.Value(shape=ir.Shape(shape), type=ir.TensorType(dtype))

    given = [ir.Attr(k, ir.AttributeType.STRING if isinstance(v, str) else ir.AttributeType.INT, v) for k, v in attributes.items()]  # fmt: skip
    return ir.Node(domain, op, [value(s) for s in inputs], given, outputs=[value(s) for s in outputs])


S = ()  # a scalar
X = (2, 16, 64)


@pytest.mark.parametrize(
    ("made", "count"),
    [
        (node("QLinearMatMul", [(8, 64), S, S, (64, 32), S, S, S, S], [(8, 32)], ""), 8 * 64 * 32),
        (node("QLinearConv", [(1, 3, 8, 8), S, S, (16, 3, 3, 3), S, S, S, S], [(1, 16, 6, 6)], ""), 16 * 36 * 27),
        (node("ConvInteger", [(1, 3, 8, 8), (16, 3, 3, 3)], [(1, 16, 6, 6)], ""), 16 * 36 * 27),
        (node("DeformConv", [(1, 3, 8, 8), (16, 3, 3, 3), (1, 18, 6, 6)], [(1, 16, 6, 6)], ""), 16 * 36 * 27),
        (node("Einsum", [X, (64, 32)], [(2, 16, 32)], "", equation="bsh,hk->bsk"), 2 * 16 * 64 * 32),
        (node("Einsum", [X, (64, 32)], [(2, 16, 32)], "", equation="...h,hk->...k"), 2 * 16 * 64 * 32),
        # k is summed before anything is multiplied.
        (node("Einsum", [X, (64, 32)], [(2, 16)], "", equation="bsh,hk->bs"), 2 * 16 * 64),
        (node("Attention", [(2, 4, 16, 8), (2, 2, 24, 8), (2, 2, 24, 8)], [(2, 4, 16, 8)], ""), 2 * 4 * 16 * 24 * 16),
        (node("Attention", [X, X, X], [X], "", q_num_heads=4, kv_num_heads=4), 2 * 16 * 16 * 128),
        (node("Attention", [X, X, X], [X], "", q_num_heads=4, kv_num_heads=4, is_causal=1), 2 * (16 * 17 // 2) * 128),
        (node("Attention", [X, (64, 192), (192,)], [X], num_heads=4), 2 * 16 * 64 * 192 + 2 * 2 * 16 * 16 * 64),
        (node("MultiHeadAttention", [X, (2, 24, 64), (2, 24, 64)], [X], num_heads=4), 2 * 16 * 24 * 128),
        (
            node(
                "GroupQueryAttention", [(2, 1, 64), (2, 1, 32), (2, 1, 32), (2, 2, 9, 16), (2, 2, 9, 16)], [(2, 1, 64)],
                num_heads=4, kv_num_heads=2,
            ),
            2 * 10 * 128,
        ),
        (
            node(
                "GroupQueryAttention", [X, (2, 16, 32), (2, 16, 32)], [X], num_heads=4, kv_num_heads=2, local_window_size=5
            ),
            2 * (1 + 2 + 3 + 4 + 5 * 12) * 128,
        ),
        (node("MatMulNBits", [(8, 64), (32, 2, 16), (64,)], [(8, 32)], K=64, N=32), 8 * 64 * 32),
        (node("FusedMatMul", [(64, 8), (64, 32)], [(8, 32)], transA=1), 8 * 64 * 32),
    ],
)  # fmt: skip
def test_they_are_counted(made, count):
    assert macs(made) == count
    assert not uncounted(made)


@pytest.mark.parametrize("op", ["MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"])
def test_products_of_bytes_are_int8_whatever_their_domain(op):
    made = node(op, [(8, 64), (64, 32)], [(8, 32)], dtype=BYTE)
    assert (macs(made), product_format(made)) == (8 * 64 * 32, "int8")


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (node("Inverse", [(8, 8)], [(8, 8)]), True),
        (node("Foo", [(8, 8)], [(8, 8)], "mine"), True),
        (node("STFT", [(1, 64, 1), S], [(1, 4, 9, 2)], ""), True),
        (node("Einsum", [(4, 8), (8, 16), (16, 2)], [(4, 2)], "", equation="ab,bc,cd->ad"), True),
        (node("Relu", [(8, 8)], [(8, 8)], ""), False),
        (node("SkipLayerNormalization", [(8, 8), (8, 8), (8,)], [(8, 8)]), False),
    ],
)
def test_of_what_is_not_counted_it_is_known_whether_it_multiplies(made, named):
    assert macs(made) == 0
    assert uncounted(made) is named


def test_free_axes_leave_counts_open():
    assert macs(node("Einsum", [(2, "n", 64), (64, 32)], [(2, "n", 32)], "", equation="bsh,hk->bsk")) is None
