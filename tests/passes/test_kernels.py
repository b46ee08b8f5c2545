"""Graphs become calls of kernels, and near misses stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.graph import walk
from optkit.kernels import KERNELS
from optkit.passes.base import Context
from optkit.passes.lowering.kernels import CallKernels
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.targets import target
from optkit.testing import check_pass, parse

H100 = Context(target=target("h100"))
WEIGHTS = {
    "scale": np.linspace(0.5, 1.5, 32, dtype=np.float32),
    "bias": np.linspace(-1, 1, 32, dtype=np.float32),
}


def call(text, **options):
    context = options.pop("context", H100)
    weights = {
        k: v
        for k, v in {**WEIGHTS, **options.pop("weights", {})}.items()
        if f"{k})" in text or f"{k}," in text
    }
    return check_pass(CallKernels(), parse(text, **weights), context=context, **options)


LAYER = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 7, 32] x) => (float[N, 7, 32] y) {
  y = LayerNormalization <axis = %s, epsilon = 0.001> (x, scale, bias)
}
"""


@pytest.mark.parametrize("op", ["LayerNorm", "AddLayerNorm"])
def test_a_norm_without_a_bias_adds_nothing(op):
    text = (LAYER % "-1").replace("(x, scale, bias)", "(x, scale)")
    if op == "AddLayerNorm":
        text = (
            text.replace("float[N, 7, 32] x", "float[N, 7, 32] x, float[N, 7, 32] r")
            .replace("y = Layer", "t = Add (x, r) y = Layer")
            .replace("(x, scale)", "(t, scale)")
        )
    (node,) = walk(call(text, ops=[op]))
    # Programs read all of their operands.
    assert None not in node.inputs


PRE_NORM = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 32] x, float[N, 32] r) => (float[N, 32] y) {
  t = Add (x, r)
  n = LayerNormalization <axis = -1> (t, scale, bias)
  e = Exp (n)
  y = Add (t, e)
}
"""
RMS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 32] x, float[N, 32] r) => (float[N, 32] y) <float two = {2}, int64[1] last = {-1}, float e = {1e-5}> {
  t = Add (x, r)
  p = Pow (t, two)
  m = ReduceMean <keepdims = %s> (p, last)
  a = Add (m, e)
  d = Sqrt (a)
  q = Div (t, d)
  n = Mul (q, scale)
  y = Add (t, n)
}
"""


@pytest.mark.parametrize("axis", ["-1", "2"])
def test_layer_normalization_is_a_kernel(axis):
    after = call(LAYER % axis, ops=["LayerNorm"])
    (node,) = walk(after)
    assert node.domain == "optkit"
    assert np.isclose(node.attributes["epsilon"].value, 0.001)


def test_normalization_of_more_axes_is_left_alone():
    weights = {name: np.ones((7, 32), np.float32) for name in WEIGHTS}
    call(LAYER % "1", ops=["LayerNormalization"], weights=weights)


def test_a_sum_that_others_read_leaves_the_kernel_too():
    after = call(PRE_NORM, ops=["AddLayerNorm", "Exp", "Add"])
    node = next(iter(walk(after)))
    assert node.outputs[1].uses()


def test_a_sum_that_is_read_before_is_added_apart():
    text = PRE_NORM.replace("  n = Layer", "  s = Exp (t)\n  n = Layer").replace("Add (t, e)", "Add (s, e)")
    call(text, ops=["Add", "Exp", "LayerNorm", "Exp", "Add"])


def test_a_sum_that_is_an_output_keeps_its_name():
    text = PRE_NORM.replace("=> (", "=> (float[N, 32] t, ")
    call(text, ops=["AddLayerNorm", "Exp", "Add"])


def test_a_residual_of_another_shape_is_added_apart():
    text = PRE_NORM.replace("float[N, 32] r", "float[32] r")
    call(text, ops=["Add", "LayerNorm", "Exp", "Add"])


def test_rms_normalization_with_its_residual_is_a_kernel():
    call(RMS % "1", ops=["AddRmsNorm", "Add"])


def test_rms_normalization_alone_is_a_kernel():
    text = (RMS % "1").replace("t = Add (x, r)", "t = Exp (x)").replace("y = Add (t, n)", "y = Add (r, n)")
    call(text, ops=["Exp", "RmsNorm", "Add"])


@pytest.mark.parametrize(("old", "new"), [("<float two = {2}", "<float two = {3}"), ("{-1}", "{0}")])
def test_other_definitions_are_left_alone(old, new):
    after = call((RMS % "1").replace(old, new))
    assert not [n for n in walk(after) if n.domain == "optkit"]


def test_rows_that_cannot_be_read_16_bytes_at_a_time_are_left_alone():
    weights = {name: np.ones(24, np.float32) for name in WEIGHTS}
    call((LAYER % "-1").replace("32]", "24]"), ops=["LayerNormalization"], weights=weights)


def test_rows_too_long_for_registers_are_left_alone():
    weights = {name: np.ones(8208, np.float32) for name in WEIGHTS}
    call((LAYER % "-1").replace("32]", "8208]"), ops=["LayerNormalization"], weights=weights)


@pytest.mark.parametrize("name", ["cpu", "t4"])
def test_targets_without_kernels_stay_as_they_are(name):
    call(LAYER % "-1", ops=["LayerNormalization"], context=Context(target=target(name)))


def test_kernels_can_be_chosen():
    after = check_pass(
        CallKernels(kernels=("layer-norm",)), parse(PRE_NORM, **WEIGHTS), context=H100,
        ops=["Add", "LayerNorm", "Exp", "Add"],
    )  # fmt: skip
    assert len(after.functions) == 1


GATED = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, %s] g, float[N, %s] u) => (float[N, 32] y) {
  %s
}
"""


@pytest.mark.parametrize(
    ("nodes", "kernel"),
    [
        ("s = Sigmoid (g) a = Mul (g, s) y = Mul (a, u)", "SwiGlu"),
        ("s = Sigmoid (g) a = Mul (s, u) y = Mul (g, a)", "SwiGlu"),
        ("s = Sigmoid (g) a = Mul (u, g) y = Mul (a, s)", "SwiGlu"),
        ("a = Gelu (g) y = Mul (u, a)", "GeGlu"),
    ],
)
def test_a_gated_activation_is_a_kernel(nodes, kernel):
    call(GATED % (32, 32, nodes), ops=[kernel])


@pytest.mark.parametrize(
    ("gate", "up", "nodes", "ops"),
    [
        (32, 32, 'a = Gelu <approximate = "tanh"> (g) y = Mul (u, a)', ["Gelu", "Mul"]),
        (32, 1, "a = Gelu (g) y = Mul (a, u)", ["Gelu", "Mul"]),
        (32, 32, "s = Sigmoid (u) a = Mul (g, s) y = Mul (a, u)", ["SwiGlu"]),
        (32, 32, "s = Tanh (g) a = Mul (g, s) y = Mul (a, u)", ["Tanh", "Mul", "Mul"]),
        (32, 32, "s = Sigmoid (g) a = Mul (s, s) y = Mul (a, u)", ["Sigmoid", "Mul", "Mul"]),
    ],
)
def test_other_gates_are_left_alone(gate, up, nodes, ops):
    call(GATED % (gate, up, nodes), ops=ops)


PRODUCT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[N, 3, 16] x) => (float16[N, 3, 32] y) {
  %s
}
"""
HALVES = {
    "w": (np.arange(512).reshape(16, 32) % 7 / 8 - 0.4).astype(np.float16),
    "b": np.linspace(-1, 1, 32).astype(np.float16),
}


@pytest.mark.parametrize(
    ("nodes", "ops"),
    [
        ("y = MatMul (x, w)", ["MatMul"]),
        ("p = MatMul (x, w) y = Add (b, p)", ["Linear"]),
        ("p = MatMul (x, w) s = Add (p, b) y = Relu (s)", ["LinearRelu"]),
        ("p = MatMul (x, w) s = Add (p, b) y = Gelu (s)", ["LinearGelu"]),
        ('p = MatMul (x, w) s = Add (p, b) y = Gelu <approximate = "tanh"> (s)', ["Linear", "Gelu"]),
        ("p = MatMul (x, w) s = Exp (p) y = Add (s, b)", ["MatMul", "Exp", "Add"]),
    ],
)
def test_a_product_with_what_follows_is_a_kernel(nodes, ops):
    # Halves: a rounding of the product more or less is 2**-11 of values up to 8.
    after = check_pass(
        CallKernels(), parse(PRODUCT % nodes, **HALVES), context=H100, ops=ops, atol=8e-3, rtol=2e-3
    )
    assert next(iter(walk(after))).domain == "optkit"


def test_products_in_float32_and_of_two_activations_are_left_alone():
    text = PRODUCT.replace("float16", "float") % "y = MatMul (x, w)"
    after = check_pass(CallKernels(), parse(text, w=HALVES["w"].astype(np.float32)), context=H100)
    assert [n.domain for n in walk(after)] == [""]
    both = PRODUCT.replace("x)", "x, float16[16, 32] w)") % "y = MatMul (x, w)"
    after = check_pass(CallKernels(), parse(both), context=H100, atol=8e-3)
    assert [n.domain for n in walk(after)] == [""]


def test_matrices_that_are_not_read_16_bytes_at_a_time_are_left_alone():
    text = PRODUCT.replace("32]", "24]") % "y = MatMul (x, w)"
    after = check_pass(CallKernels(), parse(text, w=HALVES["w"][:, :24].copy()), context=H100, atol=8e-3)
    assert [n.domain for n in walk(after)] == [""]


HEADS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[N, 2, S, 32] q, float16[N, 2, T, 32] k, float16[N, 2, T, 32] v, float16[N, 1, 1, T] mask) => (float16[N, 2, S, 32] y) {
  %s
}
"""
FACTORS = {"eight": np.array(8, np.float16), "half": np.array(0.5, np.float16)}
TURNED = "t = Transpose <perm = [0, 1, 3, 2]> (k) p = MatMul (q, t) "


@pytest.mark.parametrize(
    ("nodes", "kernel"),
    [
        (TURNED + "w = Softmax (p) y = MatMul (w, v)", "Attention"),
        (TURNED + "s = Div (p, eight) w = Softmax <axis = 3> (s) y = MatMul (w, v)", "Attention"),
        (TURNED + "s = Mul (p, half) a = Add (s, mask) w = Softmax (a) y = MatMul (w, v)", "MaskedAttention"),
        (
            TURNED
            + "a = Add (mask, p) f = Cast <to = 1> (a) w = Softmax (f) h = Cast <to = 10> (w) y = MatMul (h, v)",
            "MaskedAttention",
        ),
        (
            TURNED
            + "f = Cast <to = 1> (p) m = Cast <to = 1> (mask) a = Add (f, m) w = Softmax (a) h = Cast <to = 10> (w) y = MatMul (h, v)",
            "MaskedAttention",
        ),
    ],
)
def test_attention_is_a_kernel_that_never_holds_the_scores(nodes, kernel):
    # Halves: scores up to 30 are rounded by 2**-7 before, and shares by 2**-11.
    given = {name: value for name, value in FACTORS.items() if f"{name})" in nodes}
    after = check_pass(CallKernels(), parse(HEADS % nodes, **given), context=H100, atol=2e-2, rtol=2e-2)
    (found,) = [n for n in walk(after) if n.domain == "optkit"]
    assert found.op_type == kernel
    scale = {"Div": 0.125, "Mul": 0.5}
    expected = next((v for k, v in scale.items() if f"{k} (p" in nodes), 1.0)
    assert found.attributes["scale"].value == pytest.approx(expected)


def test_keys_that_the_graph_turned_twice_are_read_as_they_are():
    nodes = "t = Transpose <perm = [0, 2, 3, 1]> (k2) p = MatMul (q, t) w = Softmax (p) y = MatMul (w, v)"
    text = (HEADS % nodes).replace("float16[N, 2, T, 32] k,", "float16[N, T, 2, 32] k2,")
    after = check_pass(CallKernels(), parse(text), context=H100, atol=2e-2, rtol=2e-2)
    (turn,) = [n for n in walk(after) if n.op_type == "Transpose"]
    assert list(turn.attributes["perm"].value) == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Softmax (p)", "Softmax <axis = 2> (p)"),
        ("Softmax (p)", "Exp (p)"),
        ("32]", "24]"),
        ("float16[N, 2, S, 32] q", "float16[N, 1, S, 32] q"),
        ("p = MatMul (q, t)", "p = MatMul (q, t2)"),
    ],
)
def test_what_is_no_attention_of_a_kernel_is_left_alone(old, new):
    text = HEADS % (TURNED + "w = Softmax (p) y = MatMul (w, v)")
    text = text.replace(old, new).replace("float16[N, 1, 1, T] mask", "float16[N, 2, 32, T] t2")
    after = check_pass(CallKernels(), parse(text), context=H100, atol=5e-2, rtol=2e-2)
    assert all(n.domain == "" for n in walk(after))


def test_a_mask_with_axes_that_are_not_known_is_added_apart():
    nodes = TURNED + "a = Add (p, mask) w = Softmax (a) y = MatMul (w, v)"
    text = (HEADS % nodes).replace("float16[N, 1, 1, T] mask", "float16[T] mask")
    after = check_pass(CallKernels(), parse(text), context=H100, atol=2e-2, rtol=2e-2)
    assert all(n.domain == "" for n in walk(after))


INTEGERS = """
<ir_version: 10, opset_import: ["" : 21]>
g (int8[N, 3, 32] q) => (float[N, 3, 16] y) <float s = {0.02}, int8 z = {0}, int8[16] o = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}> {
  x = DequantizeLinear (q, s, z) m = DequantizeLinear <axis = 1> (w, v, o) %s
}
"""
INT8 = {
    "w": (np.arange(512).reshape(32, 16) % 255 - 127).astype(np.int8),
    "v": np.linspace(0.001, 0.01, 16, dtype=np.float32),
}
ADDED = {"b": np.linspace(-1, 1, 16, dtype=np.float32)}


@pytest.mark.parametrize("zero", [0, -7])
@pytest.mark.parametrize("nodes", ["y = MatMul (x, m)", "p = MatMul (x, m) y = Add (p, b)"])
def test_a_linear_layer_of_integers_is_a_kernel_and_its_weights_are_turned(nodes, zero):
    given = {**INT8, **(ADDED if "b)" in nodes else {})}
    after = check_pass(
        CallKernels(),
        parse((INTEGERS % nodes).replace("int8 z = {0}", f"int8 z = {{{zero}}}"), **given),
        context=H100,
        ops=["LinearInt8"],
        atol=1e-4,
        rtol=1e-4,
    )
    (node,) = walk(after)
    assert node.inputs[1].const_value.shape.numpy() == (16, 32)
    np.testing.assert_allclose(node.inputs[2].const_value.numpy(), INT8["v"] * np.float32(0.02), rtol=1e-6)
    np.testing.assert_array_equal(
        node.inputs[3].const_value.numpy(), -zero * INT8["w"].sum(0, dtype=np.int32)
    )


@pytest.mark.parametrize("left_out", ["z", "o", "z o"])
def test_a_zero_point_that_is_left_out_is_zero(left_out):
    text = INTEGERS % "y = MatMul (x, m)"
    for name in left_out.split():
        text = text.replace(f", {name})", ")")
    after = check_pass(
        CallKernels(), parse(text, **INT8), context=H100, ops=["LinearInt8"], atol=1e-4, rtol=1e-4
    )
    (node,) = walk(after)
    assert not node.inputs[3].const_value.numpy().any()


def test_products_that_share_their_integers_are_kernels_each():
    nodes = (
        "n = DequantizeLinear <axis = 1> (w2, v, o) f = Cast <to = 10> (x) m16 = Cast <to = 10> (m) n16 = Cast <to = 10> (n) "
        "p = MatMul (f, m16) r = MatMul (f, n16) t = Add (p, r) y = Cast <to = 1> (t)"
    )
    weights = {**INT8, "w2": INT8["w"][::-1].copy()}
    after = check_pass(CallKernels(), parse(INTEGERS % nodes, **weights), context=H100, atol=2e-2, rtol=2e-2)
    assert [n.op_type for n in walk(after)].count("LinearInt8") == 2
    assert not {"MatMul", "DequantizeLinear", "Dequantize"} & {n.op_type for n in walk(after)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("int8[16] o = {0,", "int8[16] o = {1,"),
        ("<axis = 1> (w, v, o)", "<axis = 0> (w, u, r)"),
        ("MatMul (x, m)", "MatMul (x, t)"),
    ],
)
def test_other_products_of_integers_are_left_alone(old, new):
    nodes = "t = Identity (m) y = MatMul (x, m)"
    text = (INTEGERS % nodes).replace(old, new)
    more = {"u": np.full(32, 0.01, np.float32), "r": np.zeros(32, np.int8)} if "u, r" in text else {}
    after = check_pass(
        CallKernels(),
        parse(text, **{k: v for k, v in INT8.items() if k == "w" or "v, o" in text}, **more),
        context=H100,
        atol=1e-4,
    )
    assert {n.op_type for n in walk(after) if n.domain} <= {"Dequantize"}


EIGHTHS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 3, 256] a, float[N, 3, 2] blocks) => (float[N, 3, 32] y) <float s = {0.02}> {
  q = %s x = DequantizeLinear %s m = DequantizeLinear <axis = %s> (w, v%s) %s
}
"""
SCALED = ("QuantizeLinear (a, s, z)", "(q, s, z)", "1", ", o")
BLOCKED = ("Cast <to = 17> (a)", "<axis = 2, block_size = 128> (q, blocks)", "0, block_size = 128", "")


def _eighths(text):
    rng, kind = np.random.default_rng(0), ir.DataType.FLOAT8E4M3FN.numpy()
    blocks = "block_size" in text
    given = {
        "w": rng.standard_normal((256, 32)).astype(kind), "z": np.zeros((), kind), "o": np.zeros(32, kind),
        "v": rng.uniform(0.01, 0.02, (2, 32) if blocks else 32).astype(np.float32), "b": np.linspace(-1, 1, 32, dtype=np.float32),
    }  # fmt: skip
    return parse(
        text, **{k: v for k, v in given.items() if f"{k})" in text or f"({k}," in text or f" {k}," in text}
    )


def _blocks(text):
    return (
        {"blocks": np.random.default_rng(1).uniform(0.5, 1, (3, 3, 2)).astype(np.float32)}
        if "blocks)" in text
        else {}
    )


@pytest.mark.parametrize("nodes", ["y = MatMul (x, m)", "p = MatMul (x, m) y = Add (p, b)"])
@pytest.mark.parametrize(("form", "kernel"), [(SCALED, "LinearFp8"), (BLOCKED, "LinearFp8Blocks")])
def test_a_linear_layer_of_eight_bit_floats_is_a_kernel_and_its_weights_are_turned(form, kernel, nodes):
    text = EIGHTHS % (*form, nodes)
    after = check_pass(CallKernels(), _eighths(text), context=H100, atol=1e-4, rtol=1e-4, **_blocks(text))
    node = list(walk(after))[-1]
    assert node.op_type == kernel
    assert node.inputs[1].const_value.shape.numpy() == (32, 256)


@pytest.mark.parametrize(("form", "kernel"), [(SCALED, "LinearFp8"), (BLOCKED, "LinearFp8Blocks")])
def test_products_that_share_eight_bit_floats_are_kernels_each(form, kernel):
    other = f"k = DequantizeLinear <axis = {form[2]}> (w, v{form[3]})"
    text = EIGHTHS % (*form, f"{other} p = MatMul (x, m) r = MatMul (x, k) c = Add (r, b) y = Sub (p, c)")
    after = check_pass(CallKernels(), _eighths(text), context=H100, atol=1e-4, rtol=1e-4, **_blocks(text))
    assert [n.op_type for n in walk(after)].count(kernel) == 2


@pytest.mark.parametrize("form", [SCALED, BLOCKED])
def test_eight_bit_floats_stay_before_ada(form):
    context = Context(target=target("a100"))
    text = EIGHTHS % (*form, "y = MatMul (x, m)")
    after = check_pass(CallKernels(), _eighths(text), context=context, atol=1e-4, rtol=1e-4, **_blocks(text))
    assert all(n.domain == "" for n in walk(after))


@pytest.mark.parametrize(
    ("form", "old", "new"),
    [
        (BLOCKED, "MatMul (x, m)", "MatMul (x, t)"),
        (SCALED, "MatMul (x, m)", "MatMul (x, t)"),
        (BLOCKED, "(q, blocks)", "(q, halves)"),
        (BLOCKED, "float[N, 3, 2] blocks", "float[N, 3, 2] blocks, float[N, 3, 256] u"),
    ],
)
def test_other_products_of_eight_bit_floats_are_left_alone(form, old, new):
    text = (EIGHTHS % (*form, "t = Identity (m) y = MatMul (x, m)")).replace(old, new)
    if "halves" in new:  # blocks of 64
        text = text.replace("block_size = 128> (q", "block_size = 64> (q").replace(
            "float[N, 3, 2] blocks", "float[N, 3, 4] halves"
        )
    if " u)" in text:  # weights that come from outside
        text = text.replace("float[N, 3, 256] u", "float8e4m3fn[256, 32] w")
    model = _eighths(text)
    if "32] w)" in text:
        model.graph.initializers.pop("w", None)
        CallKernels().run(model, H100)
        after = model
    else:
        feeds = {"halves": np.ones((3, 3, 4), np.float32)} if "halves" in text else _blocks(text)
        after = check_pass(CallKernels(), model, context=H100, atol=1e-4, rtol=1e-4, **feeds)
    assert {n.op_type for n in walk(after) if n.domain} <= {"Quantize", "Dequantize"}


FOUR = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[N, 3, 64] x) => (float16[N, 3, 32] y) {
  m = DequantizeLinear <axis = 0, block_size = 32> (w, v) %s
}
"""


def _four(text, **given):
    rng = np.random.default_rng(0)
    scales = {"v": rng.uniform(0.01, 0.02, (2, 32)).astype(np.float16)}
    model = parse(text, **{"w": np.zeros((64, 32), np.int8), **scales, **given})
    q = rng.integers(-8, 8, (64, 32)).astype(ir.DataType.INT4.numpy())
    value = model.graph.initializers["w"]
    value.const_value = ir.Tensor(q, dtype=ir.DataType.INT4, name="w")
    value.type = ir.TensorType(ir.DataType.INT4)
    return model


@pytest.mark.parametrize("nodes", ["y = MatMul (x, m)", "p = MatMul (x, m) y = Add (p, b)"])
def test_a_linear_layer_with_weights_of_4_bits_is_a_kernel(nodes):
    more = {"b": np.linspace(-1, 1, 32).astype(np.float16)} if "b)" in nodes else {}
    after = check_pass(
        CallKernels(), _four(FOUR % nodes, **more), context=H100, ops=["LinearInt4"], atol=4e-3, rtol=2e-3
    )
    (node,) = walk(after)
    assert node.inputs[1].const_value.shape.numpy() == (64, 16)


@pytest.mark.parametrize(
    ("rows", "kernel"), [("16, 1", "LinearInt4Decode"), ("17, 1", "LinearInt4"), ("N, 1", "LinearInt4")]
)
def test_few_rows_read_weights_that_lie_together(rows, kernel):
    rng = np.random.default_rng(1)
    scales = rng.uniform(0.01, 0.02, (2, 32)).astype(np.float16)
    text = (FOUR % "p = MatMul (x, m) y = Add (p, b)").replace("N, 3", rows)
    model = _four(text, v=scales, b=np.linspace(-1, 1, 32).astype(np.float16))
    after = check_pass(CallKernels(), model, context=H100, ops=[kernel], atol=4e-3, rtol=2e-3)
    (node,) = walk(after)
    assert node.inputs[1].const_value.shape.numpy() == (
        (32, 32) if kernel == "LinearInt4Decode" else (64, 16)
    )


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [("MatMul (x, m)", "MatMul (x, t)", np.float16), ("float16[", "float[", np.float32)],
)
def test_other_products_with_weights_of_4_bits_are_left_alone(old, new, kind):
    text = (FOUR % "t = Identity (m) y = MatMul (x, m)").replace(old, new)
    model = _four(text, v=np.full((2, 32), 0.01, kind))
    after = check_pass(CallKernels(), model, context=H100, atol=4e-3, rtol=2e-3)
    assert all(n.domain == "" for n in walk(after))


def _from_zero(text, least, *, zeros=True, **given):
    """Weights from ``least`` on with zero points: computed exactly, each has 4 bits."""
    kind, rng = ir.DataType.INT4 if least else ir.DataType.UINT4, np.random.default_rng(2)
    model = _four(
        text.replace("(w, v)", "(w, v, z)" if zeros else "(w, v)"), z=np.zeros((2, 32), np.int8), **given
    )
    for name in "wz" if zeros else "w":
        value = model.graph.initializers[name]
        array = rng.integers(least, least + 16, value.shape.numpy()).astype(kind.numpy())
        value.const_value, value.type = ir.Tensor(array, dtype=kind, name=name), ir.TensorType(kind)
    if not zeros:
        model.graph.initializers.pop("z")
    return model


@pytest.mark.parametrize(("least", "zeros"), [(0, True), (-8, True), (0, False)])
@pytest.mark.parametrize(("rows", "kernel"), [("N, 3", "LinearUint4"), ("1, 3", "LinearUint4Decode")])
def test_weights_of_4_bits_with_zero_points_have_a_kernel_of_their_own(rows, kernel, least, zeros):
    text = (FOUR % "p = MatMul (x, m) y = Add (p, b)").replace("N, 3", rows)
    # Sums of 64 weights of up to 15 steps of 0.02, rounded to float16.
    model = _from_zero(text, least, zeros=zeros, b=np.linspace(-1, 1, 32).astype(np.float16))
    check_pass(CallKernels(), model, context=H100, ops=[kernel], atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize("blocks", [16, 64])
def test_zero_points_of_other_blocks_than_the_kernel_has_are_left_alone(blocks):
    model = _from_zero(FOUR % "y = MatMul (x, m)", 0)
    (dequantize, _) = model.graph
    dequantize.attributes["block_size"] = ir.AttrInt64("block_size", blocks)
    for name in "vz":
        value = model.graph.initializers[name]
        array = np.resize(value.const_value.numpy(), (64 // blocks, 32))
        value.const_value = ir.Tensor(array, dtype=value.dtype, name=name)
        value.shape = ir.Shape(array.shape)
    after = model.clone()
    CallKernels().run(after, H100)
    assert [n.op_type for n in after.graph] == (
        ["DequantizeLinear", "MatMul"] if blocks == 16 else ["LinearUint4"]
    )


ROWS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 3, 64] x) => (float[N, 3, 64] y) { y = Softmax <axis = %s> (x) }
"""


@pytest.mark.parametrize("axis", ["-1", "2"])
def test_softmax_of_the_last_axis_is_a_kernel(axis):
    after = check_pass(CallKernels(), parse(ROWS % axis), context=H100, ops=["Softmax"])
    assert [n.domain for n in walk(after)] == ["optkit"]


@pytest.mark.parametrize(("old", "new"), [("-1", "1"), ("64]", "M]"), ("64]", "24]")])
def test_softmax_of_another_axis_or_of_rows_that_do_not_fit_is_left_alone(old, new):
    after = check_pass(CallKernels(), parse((ROWS % "-1").replace(old, new)), context=H100, ops=["Softmax"])
    assert [n.domain for n in walk(after)] == [""]


TURN = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 4, S, 32] x, float[1, 1, S, 32] c, float[1, 1, S, 32] s) => (float[N, 4, S, 32] y) <int64[2] half = {16, 16}> {
  l, h = Split <axis = 3> (x, half) n = Neg (h) t = Concat <axis = -1> (n, l) a = Mul (x, c) b = Mul (t, s) y = Add (a, b)
}
"""


@pytest.mark.parametrize("axis", ["[1, 1, S", "[N, 1, S"])
def test_rotary_embedding_is_a_kernel_and_the_halves_go(axis):
    check_pass(CallKernels(), parse(TURN.replace("[1, 1, S", axis)), context=H100, ops=["Rotary"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Concat <axis = -1> (n, l)", "Concat <axis = -1> (l, n)"),
        ("Neg (h)", "Neg (l)"),
        ("{16, 16}", "{8, 24}"),
        ("[1, 1, S, 32] s", "[1, 4, S, 32] s"),
        ("32]", "48]"),
    ],
)
def test_other_turns_are_left_alone(old, new):
    text = TURN.replace(old, new)
    if new == "48]":
        text = text.replace("{16, 16}", "{24, 24}")
    if new == "Neg (l)":
        text = text.replace("(n, l)", "(n, h)")
    after = check_pass(CallKernels(), parse(text), context=H100)
    assert all(n.domain == "" for n in walk(after))


PAIRS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 4, S, 32] x, float[1, 1, S, 32] c, float[1, 1, S, 32] s) => (float[N, 4, S, 32] y)
<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] last = {-1}, int64[1] end = {9223372036854775807},
 int64[4] form = {0, 0, -1, 32}> {
  l = Slice (x, zero, end, last, two) h = Slice (x, one, end, last, two) n = Neg (h) un = Unsqueeze (n, last)
  ul = Unsqueeze (l, last) p = Concat <axis = -1> (un, ul) t = Reshape (p, form) a = Mul (x, c) b = Mul (t, s) y = Add (a, b)
}
"""
HEADS_INSIDE = (("4, S, 32]", "S, 4, 32]"), ("1, S, 32]", "S, 1, 32]"), ("{0, 0, -1, 32}", "{0, -1, 4, 32}"))


@pytest.mark.parametrize("angles", ["[1, ", "[N, "])
@pytest.mark.parametrize("inside", [False, True])
def test_neighbours_that_turn_are_a_kernel(angles, inside):
    text = PAIRS.replace("[1, 1, S", f"{angles}1, S")
    for old, new in HEADS_INSIDE if inside else ():
        text = text.replace(old, new)
    after = check_pass(CallKernels(), parse(text), context=H100, ops=["RotaryPairs"])
    (node,) = walk(after)
    found = KERNELS["rotary-pairs"]().problem(node)
    assert (found["batch"], found["inner"]) == (angles == "[N, ", inside)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("int64[1] zero = {0}", "int64[1] zero = {1}"),
        ("x, one, end", "x, zero, end"),
        ("Concat <axis = -1> (un, ul)", "Concat <axis = -1> (ul, un)"),
        ("n = Neg (h)", "k = Neg (l) n = Neg (k)"),
        ("[1, 1, S, 32] s", "[1, 4, S, 32] s"),
    ],
)
def test_neighbours_that_do_not_turn_are_left_alone(old, new):
    text = PAIRS.replace(old, new)
    after = check_pass(CallKernels(), parse(text), context=H100)
    assert all(n.domain == "" for n in walk(after))


GRID = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[N, 3, 32] x) => (int8[N, 3, 32] y) <float s = {0.02}, int8 z = {0}> { f = Cast <to = 1> (x) y = QuantizeLinear (f, s, z) }
"""


@pytest.mark.parametrize("zero", [0, 3, -128])
def test_quantization_of_activations_is_a_kernel(zero):
    text = GRID.replace("int8 z = {0}", f"int8 z = {{{zero}}}")
    check_pass(CallKernels(), parse(text), context=H100, ops=["Quantize"])


def test_a_step_in_half_precision_is_read_as_float32():
    text = GRID.replace("float s = {0.02}, ", "").replace(
        "f = Cast <to = 1> (x) y = QuantizeLinear (f,", "y = QuantizeLinear (x,"
    )
    after = check_pass(
        CallKernels(), parse(text, s=np.array(0.02, np.float16)), context=H100, ops=["Quantize"], atol=1
    )
    (node,) = walk(after)
    assert node.inputs[1].dtype == ir.DataType.FLOAT
    assert not isinstance(KERNELS["quantize"]().problem(node), str)


@pytest.mark.parametrize(
    ("old", "new"),
    [("32]", "24]"), ("int8", "uint8"), ("{0.02}", "{0.02, 0.03}")],
)
def test_other_grids_are_left_alone(old, new):
    text = GRID.replace(old, new)
    if new.startswith("{0.02, "):
        text = text.replace("float s =", "float[2] s =").replace("int8 z = {0}", "int8[2] z = {0, 0}")
        text = text.replace("QuantizeLinear (", "QuantizeLinear <axis = 1> (").replace(
            "[N, 3, 32]", "[N, 2, 32]"
        )
    after = check_pass(CallKernels(), parse(text), context=H100)
    assert all(n.domain == "" for n in walk(after))


@pytest.mark.parametrize("recipe", ["triton-fp16", "triton-int8", "triton-w4"])
def test_norms_that_are_spelled_out_become_kernels_before_their_parts_are_cast(recipe):
    model = parse(RMS % 1, scale=WEIGHTS["scale"])
    steps = [p for p in Recipe.load(recipe).passes if not p.needs_data]
    run_passes(model, tuple(steps), H100)
    (norm,) = [n for n in walk(model) if n.domain == "optkit"]
    assert norm.op_type == "AddRmsNorm"
    assert norm.outputs[0].dtype == ir.DataType.FLOAT16


def test_attention_of_a_fixed_length_in_batches_of_any_size_is_a_kernel():
    """As torch exports it where the batch alone is free: queries are scaled, and put in order by Reshape."""
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[N, 9, 32] x) => (float[N, 9, 32] y) <int64[4] apart = {-1, 9, 2, 16}, int64[3] together = {-1, 9, 32}> {
      a = MatMul (x, w) b = MatMul (x, w) c = MatMul (x, w)
      d = Reshape (a, apart) e = Reshape (b, apart) f = Reshape (c, apart)
      q = Transpose <perm = [0, 2, 1, 3]> (d) k = Transpose <perm = [0, 2, 3, 1]> (e) v = Transpose <perm = [0, 2, 1, 3]> (f)
      r = Mul (q, h) t = Mul (k, h) p = MatMul (r, t) s = Softmax (p) m = MatMul (s, v)
      o = Transpose <perm = [0, 2, 1, 3]> (m) y = Reshape (o, together)
    }
    """
    model = parse(text, w=np.eye(32, dtype=np.float32), h=np.float32(0.5))
    run_passes(model, Recipe.load("triton-fp16").passes, H100)
    assert "Attention" in [n.op_type for n in walk(model)]
