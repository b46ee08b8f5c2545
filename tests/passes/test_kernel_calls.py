"""Grids of 8 bits, depthwise convolutions, losses and selections become calls of kernels, and near misses stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.graph import walk
from optkit.kernels import KERNELS
from optkit.passes.base import Context
from optkit.passes.lowering.kernels import CallKernels
from optkit.targets import target
from optkit.testing import check_pass, parse

H100 = Context(target=target("h100"))
EIGHT = ir.DataType.FLOAT8E4M3FN.numpy()


def calls(model, **options):
    after = check_pass(CallKernels(), model, context=options.pop("context", H100), **options)
    return [n.op_type for n in walk(after) if n.domain == "optkit"]


BACK = """
<ir_version: 10, opset_import: ["" : 21]>
g (int8[N, 3, 32] x) => (%s[N, 3, 32] y) <float s = {0.02}, int8 z = {0}> { %s }
"""
ONE, CAST = "y = DequantizeLinear (x, s, z)", "f = DequantizeLinear (x, s, z) y = Cast <to = 10> (f)"


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize(("kind", "nodes"), [("float", ONE), ("float16", CAST)])
def test_integers_that_become_floats_are_a_kernel(kind, nodes, zero):
    text = (BACK % (kind, nodes)).replace("int8 z = {0}", f"int8 z = {{{zero}}}")
    assert calls(parse(text)) == ["Dequantize"]


def test_floats_of_eight_bits_go_and_come_back_by_kernels():
    text = (BACK % ("float", "e = QuantizeLinear (x, s, z) y = DequantizeLinear (e, s, z)")).replace(
        "int8[N", "float[N"
    )
    model = parse(text.replace(", int8 z = {0}", ""), z=np.zeros((), EIGHT))
    assert calls(model) == ["Quantize", "Dequantize"]
    model = parse(text.replace(", int8 z = {0}", ""), z=np.zeros((), EIGHT))
    assert calls(model, context=Context(target=target("a100"))) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("32]", "24]"),
        ("int8", "uint8"),
        ("float s = {0.02}", "float[3] s = {0.02, 0.03, 0.04}"),
    ],
)
def test_other_ways_back_are_left_alone(old, new):
    text = (BACK % ("float", ONE)).replace(old, new)
    if "[3] s" in new:
        text = text.replace("int8 z = {0}", "int8[3] z = {0, 0, 0}").replace(
            "DequantizeLinear (", "DequantizeLinear <axis = 1> ("
        )
    assert calls(parse(text)) == []


IMAGES = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 4, 9, H] x) => (float[N, 4, P, Q] y) { %s }
"""
CONV = "Conv <group = 4, strides = [2, 1], pads = [1, 1, 1, 1]>"
WINDOWS = {
    "w": np.random.default_rng(0).standard_normal((4, 1, 3, 3)).astype(np.float32), "b": np.linspace(-1, 1, 4, dtype=np.float32),
}  # fmt: skip


def images(nodes, **given):
    weights = {k: v for k, v in {**WINDOWS, **given}.items() if f"{k})" in nodes or f" {k}," in nodes}
    return parse(IMAGES % nodes, **weights)


@pytest.mark.parametrize(
    ("nodes", "kernel"),
    [
        (f"y = {CONV} (x, w)", "DepthwiseConv"),
        (f"y = {CONV} (x, w, b)", "DepthwiseConv"),
        (f"c = {CONV} (x, w, b) y = Relu (c)", "DepthwiseConvRelu"),
        (f"c = {CONV} (x, w) y = Relu (c)", "DepthwiseConvRelu"),
    ],
)
def test_a_window_for_each_channel_is_a_kernel(nodes, kernel):
    assert calls(images(nodes), atol=1e-5) == [kernel]


@pytest.mark.parametrize(
    ("old", "new", "given"),
    [
        ("group = 4", "group = 2", {"w": np.ones((4, 2, 3, 3), np.float32)}),
        ("group = 4", "group = 4", {"w": np.ones((8, 1, 3, 3), np.float32), "b": np.ones(8, np.float32)}),
        ("group = 4,", "group = 4, dilations = [2, 1],", {}),
        ("pads = [1, 1, 1, 1]", 'auto_pad = "SAME_UPPER"', {}),
        ("group = 4", "group = 4", {"w": np.ones((4, 1, 9, 1), np.float32)}),
    ],
)
def test_other_convolutions_are_left_alone(old, new, given):
    nodes = f"y = {CONV} (x, w, b)".replace(old, new)
    text = IMAGES.replace("4, P", "8, P") if given.get("w", np.ones(4)).shape[0] == 8 else IMAGES
    model = parse(text % nodes, **{**WINDOWS, **given})
    assert calls(model, size=5, atol=1e-4) == []


LOSS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 32] x, int64[N] labels) => (float%s y) { y%s = SoftmaxCrossEntropyLoss %s (x, labels) }
"""
LABELS = np.array([0, 31, 7], np.int64)


@pytest.mark.parametrize(
    ("shape", "reduction", "ops"),
    [
        ("[N]", '<reduction = "none">', ["CrossEntropy"]),
        ("", "", ["CrossEntropy", "ReduceMean"]),
        ("", '<reduction = "sum">', ["CrossEntropy", "ReduceSum"]),
    ],
)
def test_a_loss_is_a_kernel(shape, reduction, ops):
    model = parse(LOSS % (shape, "", reduction))
    check_pass(CallKernels(), model, context=H100, ops=ops, labels=LABELS, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (LOSS % ("[N]", "", '<reduction = "none", ignore_index = 7>'), LABELS),
        ((LOSS % ("[N]", ", p", '<reduction = "none">')).replace("y) {", "y, float[N, 32] p) {"), LABELS),
        ((LOSS % ("[N]", "", '<reduction = "none">')).replace("int64", "int32"), LABELS.astype(np.int32)),
        ((LOSS % ("[N]", "", '<reduction = "none">')).replace("32]", "24]"), LABELS % 24),
        (
            (LOSS % ("[N, 5]", "", '<reduction = "none">')).replace("[N, 32]", "[N, 32, 5]").replace("int64[N]", "int64[N, 5]"),
            np.zeros((3, 5), np.int64),
        ),
    ],
)  # fmt: skip
def test_other_losses_are_left_alone(text, labels):
    assert calls(parse(text), labels=labels, atol=1e-5) == []


SELECT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 40] x) => (float[N, K] y, int64[N, K] places) <int64[1] k = {%s}> { y, places = TopK %s (x, k) }
"""


def test_the_largest_of_a_row_are_a_kernel():
    assert calls(parse(SELECT % (7, ""))) == ["TopK"]


@pytest.mark.parametrize(
    ("k", "attributes", "shape"),
    [(7, "<largest = 0>", "40]"), (2, "<axis = 0>", "40]"), (2, "", "M]"), (1025, "", "2000]"), (7, "", "131073]")],
)  # fmt: skip
def test_other_selections_are_left_alone(k, attributes, shape):
    text = (SELECT % (k, attributes)).replace("40]", shape)
    assert calls(parse(text), size=9) == []


DETECT = """
<ir_version: 10, opset_import: ["" : 21, "optkit" : 1]>
g (float[2, %s, 5] x, float[2, %s, 4] boxes) => (float[2, 10] y, int64[2, 10] labels, float[2, 10, 4] found) {
  y, labels, found = optkit.TopDetections <k = %s> (x, boxes)
}
"""


@pytest.mark.parametrize(
    ("boxes", "k", "found"),
    [
        ("20", 10, {"format": "fp32", "k": 10}),
        ("B", 10, "the number of scores is not fixed"),
        ("20", 101, "101 of 100 scores: from 1 to 1024 are found"),
        ("30000", 10, "150000 scores are more than 131072"),
    ],
)
def test_detections_are_called_by_name(boxes, k, found):
    (node,) = walk(parse(DETECT % (boxes, boxes, k)))
    assert KERNELS["top-detections"]().problem(node) == found


EXPERTS = """
<ir_version: 10, opset_import: ["" : 21, "optkit" : 1]>
g (float16[T, 32] x, float16[4, 32, 48] w, int32[R] order, int32[4] ends) => (float16[R, 48] y) {
  y = optkit.GroupedLinear (x, w, order, ends)
}
"""


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("48]", "48]", {"format": "fp16", "columns": 48, "depth": 32, "experts": 4}),
        ("float16", "float", "no format of grouped-linear"),
        ("float16[T", "bfloat16[T", "no format of grouped-linear"),
        ("int32[R]", "int64[R]", "places are not int32"),
        ("float16[4, 32, 48]", "float16[E, 32, 48]", "the matrices have no fixed shape"),
        ("48]", "40]", "32 x 40 are no multiples of 16"),
        ("[4", "[513", "513 matrices are more than 512"),
    ],
)
def test_products_of_experts_are_called_by_name(old, new, found):
    (node,) = walk(parse(EXPERTS.replace(old, new)))
    assert KERNELS["grouped-linear"]().problem(node) == found
