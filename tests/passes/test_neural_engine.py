"""What the Neural Engine likes: the same numbers in other layouts and in parts, there and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.passes.base import Context
from optkit.passes.cleanup.layout import CancelLayout
from optkit.passes.lowering.attention import ChunkAttention, SplitHeads
from optkit.passes.lowering.convolution import LinearToConvolution
from optkit.passes.lowering.norm import NormOverChannels
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import check_pass, parse, random_feeds

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
ENGINE = Context(target=target("apple-ane"))
# Takes float32 as well, which shows the same numbers best.
PHONE = target("iphone15")
LINEAR = HEAD + "g (float[%s, 8] x) => (float[%s, 12] y) { m = MatMul(x, w)\n y = %s }"
ATTENTION = (
    HEAD
    + """g (float[2, 4, 40, 8] q, float[2, 4, 8, 24] k, float[2, 4, 24, 16] v, float[%s] mask) => (float[2, 4, 40, 16] y)
    <float scale = {0.35}> {
      a = MatMul(q, k)
      b = Mul(a, scale)
      c = Add(%s)
      p = Softmax<axis = -1>(c)
      y = MatMul(p, v)
    }"""
)


def _matrices() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "w": random.normal(size=(8, 12)).astype(np.float32),
        "b": random.normal(size=12).astype(np.float32),
    }


@pytest.mark.parametrize(
    ("axes", "last", "ops"),
    [
        ("2, 40", "Add(m, b)", ["Transpose", "Unsqueeze", "Conv", "Squeeze", "Transpose"]),
        ("N, T", "Add(b, m)", ["Transpose", "Unsqueeze", "Conv", "Squeeze", "Transpose"]),
        ("2, 5, 7", "Add(m, b)", ["Transpose", "Conv", "Transpose"]),
        ("2, 40", "Relu(m)", ["Transpose", "Unsqueeze", "Conv", "Squeeze", "Transpose", "Relu"]),
    ],
)
def test_a_product_becomes_a_convolution_with_the_sequence_last(axes, last, ops):
    weights = _matrices() if "b" in last else {"w": _matrices()["w"]}
    after = check_pass(
        LinearToConvolution(), parse(LINEAR % (axes, axes, last), **weights), ops=ops, context=ENGINE
    )
    conv = next(n for n in after.graph if n.op_type == "Conv")
    assert list(conv.inputs[1].shape) == [12, 8, 1, 1]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (LINEAR % ("40", "40", "Add(m, b)"), ("w", "b")),
        (HEAD + "g (float[2, 9, 8] x, float[8, 12] w) => (float[2, 9, 12] y) { y = MatMul(x, w) }", ()),
        (HEAD + "g (float[1, 2, 3, 9, 8] x) => (float[1, 2, 3, 9, 12] y) { y = MatMul(x, w) }", ("w",)),
    ],
    ids=["two axes", "weights that are fed", "five axes"],
)
def test_other_products_stay(text, names):
    model = parse(text, **{n: _matrices()[n] for n in names})
    ops = [n.op_type for n in model.graph]
    check_pass(LinearToConvolution(), model, ops=ops, context=ENGINE)


def test_a_sum_with_what_is_no_vector_stays_behind_the_convolution():
    text = (LINEAR % ("2, 40", "2, 40", "Add(m, r)")).replace("x)", "x, float[2, 40, 12] r)", 1)
    after = check_pass(LinearToConvolution(), parse(text, w=_matrices()["w"]), context=ENGINE)
    assert [n.op_type for n in after.graph][-1] == "Add"


NORM = (
    HEAD
    + "g (float[%s] x) => (float[%s] y) { n = %s<axis = -1, epsilon = 1e-3>(x, w%s) y = Transpose<perm = %s>(n) }"
)
THREE, FOUR = ("N, T, 8", "N, 8, T"), ("2, 5, 7, 8", "2, 8, 5, 7")


def _vectors(*names: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {n: random.normal(size=8).astype(np.float32) for n in names}


def _norm(shapes: tuple[str, str], kind: str, bias: bool, order: str) -> ir.Model:
    return parse(
        NORM % (*shapes, kind, ", b" if bias else "", order), **_vectors("w", *(["b"] if bias else []))
    )


_MEAN, _POWER = ["ReduceMean", "Sub"], ["Mul", "ReduceMean", "Add", "Sqrt", "Reciprocal", "Mul", "Mul"]


@pytest.mark.parametrize(
    ("shapes", "kind", "bias", "order", "ops"),
    [
        (FOUR, "LayerNormalization", True, "[0, 3, 1, 2]", ["Transpose", *_MEAN, *_POWER, "Add", "Transpose", "Transpose"]),
        (THREE, "LayerNormalization", False, "[0, 2, 1]", ["Transpose", "Unsqueeze", *_MEAN, *_POWER, "Squeeze", "Transpose", "Transpose"]),
        (THREE, "RMSNormalization", False, "[0, 2, 1]", ["Transpose", "Unsqueeze", *_POWER, "Squeeze", "Transpose", "Transpose"]),
    ],
)  # fmt: skip
def test_a_norm_is_computed_over_the_second_axis(shapes, kind, bias, order, ops):
    model = _norm(shapes, kind, bias, order)
    if kind.startswith("RMS"):
        model.opset_imports[""] = 23
    check_pass(NormOverChannels(), model, ops=ops, context=ENGINE, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        ("axis = -1", "axis = 1"),
        ("perm = [0, 3, 1, 2]", "perm = [0, 3, 2, 1]"),
        ("y = Transpose<perm = [0, 3, 1, 2]>(n)", "y = Relu(n)"),
        ("=> (float[2, 8, 5, 7] y)", "=> (float[2, 8, 5, 7] y, float[2, 5, 7, 8] n)"),
        ("x, w, b", "x, w, v"),
        ("(x, w, b) y =", "(x, w, b) z = Relu(n) y ="),
    ],
    ids=[
        "two axes",
        "another order",
        "nothing moved",
        "an output",
        "a bias that is fed",
        "read in the order that it has",
    ],
)
def test_other_norms_stay(change):
    text = NORM % (*FOUR, "LayerNormalization", ", b", "[0, 3, 1, 2]")
    text = text.replace(*change)
    if "Relu(n)" in change[1] and "y = Relu" in text:
        text = text.replace("2, 8, 5, 7] y", "2, 5, 7, 8] y")
    if "z = " in text:
        text = text.replace("] y)", "] y, float[2, 5, 7, 8] z)")
    if "v)" in text:
        text = text.replace("] x)", "] x, float[8] v)")
    if "axis = 1" in text:
        text = text.replace("g (float[2, 5, 7, 8] x)", "g (float[2, 1, 1, 8] x)").replace(
            "2, 8, 5, 7] y", "2, 8, 1, 1] y"
        )
    model = parse(text, **_vectors("w", "b"))
    assert NormOverChannels().run(model, ENGINE) == []


@pytest.mark.needs("coremltools")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_core_ml_has_one_operation_for_a_norm_over_channels(precision, tmp_path):
    from optkit.backends import BACKENDS
    from optkit.backends.coreml.reference.program import Package

    text = (
        HEAD
        + """g (float[2, 6, 5, 7] x) => (float[2, 4, 5, 7] y) {
      c = Conv(x, k) t = Transpose<perm = [0, 2, 3, 1]>(c) n = LayerNormalization<axis = -1>(t, w, b)
      u = Transpose<perm = [0, 3, 1, 2]>(n) y = Conv(u, l) }"""
    )
    random = np.random.default_rng(1)
    kernels = {
        n: random.normal(size=s).astype(np.float32) for n, s in (("k", (8, 6, 1, 1)), ("l", (4, 8, 1, 1)))
    }
    model, backend = parse(text, **_vectors("w", "b"), **kernels), BACKENDS.get("coreml")()
    feeds = random_feeds(model)
    expected = ReferenceSession(model, optimize=False).run(feeds)["y"]
    run_passes(model, [NormOverChannels(), CancelLayout()], ENGINE)
    options = backend.options.model_validate({"precision": precision})
    backend.lower(model, PHONE, options, tmp_path)
    block = Package(tmp_path / "model.mlpackage").functions["main"].block
    kinds = [o.kind for o in block.operations if o.kind not in ("const", "cast", "identity")]
    # As a batch norm, which coremltools would make of the vectors, they would be off by its epsilon.
    assert kinds == ["conv", "layer_norm", "mul", "add", "conv"]
    assert {o.outputs[0].type.kind for o in block.operations if o.kind == "layer_norm"} == {
        f"FLOAT{precision[2:]}"
    }
    with backend.load(tmp_path, PHONE, options) as session:
        np.testing.assert_allclose(
            session.run(feeds)["y"], expected, atol=4e-5 if precision == "fp32" else 3e-2
        )


@pytest.mark.parametrize(
    "pass_", [LinearToConvolution(), SplitHeads(), ChunkAttention(rows=16), NormOverChannels()]
)
def test_elsewhere_nothing_changes(pass_):
    for text, weights in (
        (NORM % (*FOUR, "LayerNormalization", ", b", "[0, 3, 1, 2]"), _vectors("w", "b")),
        (LINEAR % ("2, 40", "2, 40", "Add(m, b)"), _matrices()),
        (ATTENTION % ("40, 24", "b, mask"), {}),
    ):
        model = parse(text, **weights)
        assert pass_.run(model, Context(target=target("iphone15"))) == []


MASKS = [("40, 24", "b, mask"), ("2, 1, 1, 24", "b, mask"), ("2, 4, 40, 1", "b, mask"), ("24", "mask, b")]


@pytest.mark.parametrize(("shape", "operands"), MASKS)
@pytest.mark.parametrize(
    ("pass_", "parts"), [(SplitHeads(), 4), (ChunkAttention(rows=16), 3), (ChunkAttention(rows=20), 2)]
)
def test_attention_in_parts_gives_the_same_numbers(shape, operands, pass_, parts):
    after = check_pass(pass_, ATTENTION % (shape, operands), context=ENGINE, atol=1e-6, rtol=1e-6)
    ops = [n.op_type for n in after.graph]
    assert ops.count("Softmax") == parts and ops.count("MatMul") == 2 * parts and ops[-1] == "Concat"


def test_masks_that_all_parts_share_are_not_split():
    after = check_pass(SplitHeads(), ATTENTION % ("2, 1, 1, 24", "b, mask"), context=ENGINE)
    assert [n.inputs[0].name for n in after.graph if n.op_type == "Split"] == ["q", "k", "v"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("axis = -1", "axis = 2"),
        ("(float[2, 4, 40, 16] y)", "(float[2, 4, 40, 16] y, float[2, 4, 40, 24] p)"),
        ("b = Mul(a, scale)", "b = Sigmoid(a)"),
        ("float[2, 4, 8, 24] k", "float[2, 1, 8, 24] k"),
        ("[2, 4, 40, 8] q", "[2, H, 40, 8] q"),
    ],
    ids=["softmax over queries", "weights that are read", "no scale", "shared keys", "unknown heads"],
)
def test_what_is_not_attention_of_known_heads_stays(old, new):
    text = (ATTENTION % ("40, 24", "b, mask")).replace(old, new)
    if "H, 40" in new:
        text = text.replace("(float[2, 4, 40, 16] y)", "(float[2, H, 40, 16] y)").replace(
            "4, 8, 24] k", "H, 8, 24] k"
        )
        text = text.replace("4, 24, 16] v", "H, 24, 16] v")
    model = parse(text)
    assert SplitHeads().run(model, ENGINE) == []


@pytest.mark.parametrize("rows", [40, 512])
def test_few_queries_stay_together(rows):
    assert ChunkAttention(rows=rows).run(parse(ATTENTION % ("40, 24", "b, mask")), ENGINE) == []


def _encoder() -> ir.Model:
    """Two layers of a feed-forward block behind attention, as exporters write them."""
    random = np.random.default_rng(0)
    weights = {
        n: random.normal(size=s).astype(np.float32) / 6
        for n, s in {"wq": (32, 32), "wk": (32, 32), "wv": (32, 32), "w1": (32, 64), "w2": (64, 32), "b1": (64,), "b2": (32,)}.items()
    }  # fmt: skip
    return parse(
        HEAD
        + """g (float[1, 48, 32] x) => (float[1, 48, 32] y)
        <int64[4] heads = {1, 48, 4, 8}, int64[3] flat = {1, 48, 32}, float scale = {0.35}> {
          q0 = MatMul(x, wq) q1 = Reshape(q0, heads) q = Transpose<perm = [0, 2, 1, 3]>(q1)
          k0 = MatMul(x, wk) k1 = Reshape(k0, heads) k = Transpose<perm = [0, 2, 3, 1]>(k1)
          v0 = MatMul(x, wv) v1 = Reshape(v0, heads) v = Transpose<perm = [0, 2, 1, 3]>(v1)
          s0 = MatMul(q, k) s1 = Mul(s0, scale) p = Softmax<axis = -1>(s1) o = MatMul(p, v)
          o1 = Transpose<perm = [0, 2, 1, 3]>(o) o2 = Reshape(o1, flat)
          h0 = MatMul(o2, w1) h1 = Add(h0, b1) h2 = Gelu(h1) h3 = MatMul(h2, w2) y = Add(h3, b2)
        }""",
        **weights,
    )


def test_the_recipe_computes_an_encoder_in_convolutions_alone_and_says_so_of_one_target():
    model = _encoder()
    feeds = random_feeds(model)
    expected = ReferenceSession(model, optimize=False).run(feeds)["y"]
    recipe = Recipe.load("neural-engine")
    run_passes(model, recipe.passes, ENGINE)
    ops = [n.op_type for n in model.graph]
    assert ops.count("Conv") == 5 and ops.count("Softmax") == 4
    # Nothing is moved between the two convolutions around Gelu.
    gelu = next(n for n in model.graph if n.op_type == "Gelu")
    assert gelu.inputs[0].producer().op_type in ("Conv", "Squeeze")
    np.testing.assert_allclose(ReferenceSession(model, optimize=False).run(feeds)["y"], expected, atol=1e-5)
    other = _encoder()
    run_passes(other, recipe.passes, Context(target=target("iphone15")))
    assert [n.op_type for n in other.graph].count("MatMul") == 7


@pytest.mark.needs("coremltools")
def test_the_package_for_the_neural_engine_gives_the_same_numbers(tmp_path):
    from optkit.backends import BACKENDS

    model, backend = _encoder(), BACKENDS.get("coreml")()
    feeds = random_feeds(model)
    expected = ReferenceSession(model, optimize=False).run(feeds)["y"]
    run_passes(model, Recipe.load("neural-engine").passes, ENGINE)
    options = backend.options.model_validate({})
    backend.lower(model, PHONE, options, tmp_path)
    with backend.load(tmp_path, PHONE, options) as session:
        np.testing.assert_allclose(session.run(feeds)["y"], expected, atol=1e-5)
