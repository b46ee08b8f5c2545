from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import optkit
from optkit.backends.onnxruntime.spelling import spelled
from optkit.errors import ModelError
from optkit.graph import walk
from optkit.reference import ReferenceSession, turned_operand, unsound
from optkit.store import save
from optkit.testing import parse, random_feeds

QUANTIZED = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[4] x) => (float[4] y) {
  a = Neg(x)
  c = %s
  q = QuantizeLinear(c, s, z)
  y = DequantizeLinear(q, s, z)
}
"""


@pytest.mark.parametrize("activation", ["Clip(a, low, high)", "Relu(a)"])
@pytest.mark.parametrize("as_file", [False, True])
def test_what_lies_in_front_of_floats_of_8_bits_is_computed(activation, as_file, tmp_path):
    zero = np.zeros((), ml_dtypes.float8_e4m3fn)
    model = parse(QUANTIZED % activation, low=np.float32(0), high=np.float32(60), s=np.float32(0.5), z=zero)
    source = model
    if as_file:
        source = tmp_path / "model.onnx"
        onnx.save(ir.to_proto(model), source)
    found = ReferenceSession(source, disabled=unsound(model)).run({"x": np.array([1, -1, -5, 9], np.float32)})
    assert found["y"].tolist() == [0, 1, 5, 0]


def test_integers_keep_every_optimizer():
    model = parse(QUANTIZED % "Relu(a)", s=np.float32(0.5), z=np.int8(0))
    assert unsound(model) == ()


BRAIN = """
<ir_version: 10, opset_import: ["" : 21]>
g (bfloat16[N, 4] x, float[N, 4] c) => (float[N, 4] y, bfloat16[N, 4] z) { f = Cast <to = 1> (x) y = Add (f, c) z = Cast <to = 16> (y) }
"""


def _session(file):
    ReferenceSession(file)


def _graph(file):
    ReferenceSession(ir.load(file))


def _bundle(file):
    optkit.compile(file, target="h100", out=file.parent / "out")


def _kernels(file):
    optkit.compile(
        file, target="h100", backend="triton", recipe="triton-fp16", data="random", out=file.parent / "out"
    )


def _here(file):
    optkit.compile(file, target="cpu", out=file.parent / "out")


@pytest.mark.parametrize(
    "act", [_session, _graph, _bundle, pytest.param(_kernels, marks=pytest.mark.needs("triton")), _here]
)
def test_types_that_numpy_does_not_have_are_refused_by_name(tmp_path, act):
    save(parse(BRAIN), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"NumPy: x \(bfloat16\), z \(bfloat16\)$") as caught:
        act(tmp_path / "m.onnx")
    assert "float32" in str(caught.value.hint)


def test_formats_that_have_no_kernel_on_a_processor_are_said_to_be_why():
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[N, 4] x) => (float[N, 4] y) { b = Cast <to = 16> (x) m = MatMul (b, w) y = Cast <to = 1> (m) }
    """
    with pytest.raises(ModelError, match="MatMul") as caught:
        ReferenceSession(parse(text, w=np.ones((4, 4), ml_dtypes.bfloat16)))
    assert "float32" in str(caught.value.hint)


MOVED = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[1, 2, 3] x) => (float[] y) <int64[3] shape = {1, 3, 2}> {
  q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) m = %s y = Neg(m) }
"""


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("moved", ["Transpose(d)", "Reshape(d, shape)", "MaxPool<kernel_shape = [1]>(d)"])
def test_pairs_of_int8_in_front_of_what_moves_elements_are_computed(moved, as_file, tmp_path):
    """ONNX Runtime 1.32 stops there on x86: it writes another pair behind, and makes its zero point alone unsigned."""
    model = parse(MOVED % moved, s=np.float32(0.5), z=np.int8(-3))
    source = model
    if as_file:
        source = tmp_path / "model.onnx"
        onnx.save(ir.to_proto(model), source)
    x = np.array([[[-90, -0.3, 0.4], [1, 2.5, 90]]], np.float32)
    found = ReferenceSession(source, disabled=unsound(model)).run({"x": x})
    grid = np.clip(np.round(x / 0.5) - 3, -128, 127) + 3
    assert sorted(-found["y"].ravel()) == sorted(grid.ravel() * 0.5)


def test_what_stands_in_for_other_hardware_adds_integers_exactly_on_every_processor():
    """Without VNNI ``vpmaddubsw`` would stop at 32767, where two products of 255 by 127 are 64770."""
    model = parse(
        """
<ir_version: 10, opset_import: ["" : 21]>
g (float[3, 64] x) => (float[3, 8] y) <float s = {0.01}, int8 z = {0}> {
  a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) u = DequantizeLinear(w, s, z) y = MatMul(b, u) }
""",
        w=np.full((64, 8), 127, np.int8),
    )
    feeds = {"x": np.full((3, 64), 1.27, np.float32)}
    found = ReferenceSession(model).run(feeds)["y"]
    np.testing.assert_allclose(found, np.full((3, 8), 64 * 1.27 * 1.27), rtol=1e-6)


TURNED = """
<ir_version: 10, opset_import: ["" : 21]>
g (%s) => (%s y) { %s }
"""
# Loaded with all rewrites of ONNX Runtime 1.32 on a processor, each ends the process.
ENDS = {
    "half precision": ("float16[b, t, 16] x", "float16[t, b, 4]", "p = Transpose<perm = [1, 0, 2]>(x) y = MatMul(p, h)"),
    "on the right": ("float16[16, b, t] x", "float16[b, 3, t]", "p = Transpose<perm = [1, 0, 2]>(x) y = MatMul(v, p)"),
    "casts": (
        "int32[b, t, 16] x", "float[t, b, 4]",
        "p = Transpose<perm = [1, 0, 2]>(x) c = Cast<to = 1>(p) y = MatMul(c, w)",
    ),
    "turned twice": (
        "float16[16, b, t] x", "float[b, t, 4]",
        "p = Transpose<perm = [1, 2, 0]>(x) c = Cast<to = 1>(p) y = MatMul(c, w)",
    ),
}  # fmt: skip
# Near forms that it loads.
LOADS = {
    "batch first": ("float16[b, 16, t] x", "float[b, t, 4]", "p = Transpose<perm = [0, 2, 1]>(x) c = Cast<to = 1>(p) y = MatMul(c, w)"),
    "no cast": ("float[b, t, 16] x", "float[t, b, 4]", "p = Transpose<perm = [1, 0, 2]>(x) y = MatMul(p, w)"),
    "cast first": ("float16[b, t, 16] x", "float[t, b, 4]", "c = Cast<to = 1>(x) p = Transpose<perm = [1, 0, 2]>(c) y = MatMul(p, w)"),
    "four axes": (
        "float16[b, t, 3, 16] x", "float[t, b, 3, 4]",
        "p = Transpose<perm = [1, 0, 2, 3]>(x) c = Cast<to = 1>(p) y = MatMul(c, w)",
    ),
}  # fmt: skip


def _turned(case: tuple[str, str, str]) -> ir.Model:
    w = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float16)
    given = {"w": w.astype(np.float32), "h": w, "v": w.T[:3]}
    return parse(
        TURNED % case, **{k: v for k, v in given.items() if f"{k})" in case[2] or f"({k}," in case[2]}
    )


def _plainly(model: ir.Model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("name", ENDS)
def test_a_product_of_what_was_turned_and_cast_ends_no_process(name, tmp_path):
    model = _turned(ENDS[name])
    assert "MatmulTransposeFusion" in unsound(model)
    feeds = random_feeds(model)
    expected = ReferenceSession(model, optimize=False).run(feeds)["y"]
    np.testing.assert_allclose(ReferenceSession(model).run(feeds)["y"], expected, rtol=1e-2, atol=1e-2)
    # What is shipped has to be loaded by any session.
    (plain,) = _plainly(spelled(model)).run(None, feeds)
    np.testing.assert_allclose(plain, expected, rtol=1e-2, atol=1e-2)
    assert not any(turned_operand(n) is not None for n in walk(spelled(model)))


@pytest.mark.parametrize("name", LOADS)
def test_what_it_loads_stays_as_it_is(name):
    model = _turned(LOADS[name])
    assert not any(turned_operand(n) is not None for n in walk(model))
    assert spelled(model) is model
    _plainly(model)
