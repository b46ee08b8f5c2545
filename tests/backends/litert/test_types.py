"""Element types: each kernel is given those that it takes, what others compute wraps around as in ONNX, and nothing aborts."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.errors import ModelError, UnsupportedOpError
from optkit.legalize import legalize
from optkit.targets import target
from optkit.testing import parse

pytestmark = pytest.mark.needs("ai_edge_litert")

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\ng '
PHONE = target("android-cpu")
ARITHMETIC = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Max": np.maximum, "Min": np.minimum}
COMPARED = {
    "Equal": np.equal, "Greater": np.greater, "GreaterOrEqual": np.greater_equal, "Less": np.less, "LessOrEqual": np.less_equal,
}  # fmt: skip


def _opened(text, folder, **weights):
    from optkit.backends.litert.lower import LiteRt, LiteRtOptions

    model, backend, options = parse(HEAD + text, **weights), LiteRt(), LiteRtOptions()
    legalize(model, backend, PHONE, name="model")
    backend.lower(model, PHONE, options, folder)
    return backend.load(folder, PHONE, options, threads=1)


def _all(dtype):
    """Each of some values beside each other, with both ends of the type."""
    ends = np.iinfo(dtype)
    few = np.asarray([ends.min, ends.min + 1, 0, 1, 2, 7, 100, ends.max], np.int64).astype(dtype)
    x, z = np.meshgrid(few, few)
    return x, z


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_integers_without_a_grid_wrap_around_as_numpy_says(tmp_path, dtype):
    binary = ARITHMETIC | COMPARED
    outputs = ", ".join(f"{'bool' if n in COMPARED else dtype}[8, 8] y{n}" for n in binary)
    nodes = " ".join(f"y{n} = {n}(x, z)" for n in binary)
    session = _opened(f"({dtype}[8, 8] x, {dtype}[8, 8] z) => ({outputs}) {{ {nodes} }}", tmp_path)
    x, z = _all(dtype)
    # Twice: an output that no kernel writes would hold what the call before gave.
    for a, b in ((x, z), (z[::-1].copy(), x)):
        found = session.run({"x": a, "z": b})
        for name, function in binary.items():
            with np.errstate(over="ignore"):
                expected = function(a, b)
            assert found[f"y{name}"].dtype == expected.dtype
            np.testing.assert_array_equal(found[f"y{name}"], expected, err_msg=name)


def test_a_relu_of_wide_sums_comes_after_they_wrapped_around(tmp_path):
    text = """(int8[4] x, int8[4] z) => (int8[4] y) <int8 low = {0}, int8 high = {6}> { a = Add(x, z) y = Clip(a, low, high) }"""
    x, z = np.asarray([100, 3, -100, 1], np.int8), np.asarray([100, 1, -100, 127], np.int8)
    found = _opened(text, tmp_path).run({"x": x, "z": z})["y"]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, np.clip(x + z, 0, 6))


def test_kernels_without_a_form_for_booleans_compute_in_integers(tmp_path):
    text = """(bool[3, 4] x, bool[3, 0] n) => (bool[3] a, bool[3] b, bool[3, 2] c, bool[3, 2] d, bool[3] e, bool[3] f)
        <int64[1] one = {1}, int64[2] halves = {2, 2}> {
        a = ReduceMax<keepdims = 0>(x, one) b = ReduceMin<keepdims = 0>(x, one) c, d = Split<axis = 1>(x, halves)
        e = ReduceMax<keepdims = 0>(n, one) f = ReduceMin<keepdims = 0>(n, one) }"""
    x = np.asarray([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    none = np.zeros((3, 0), bool)
    found = _opened(text, tmp_path).run({"x": x, "n": none})
    expected = {
        "a": x.any(1),
        "b": x.all(1),
        "c": x[:, :2],
        "d": x[:, 2:],
        "e": none.any(1),
        "f": none.all(1),
    }
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


def test_all_nodes_that_no_kernel_takes_are_named_together(tmp_path):
    text = """(int64[3, 4] x, float[1, 1, 1, 1, 1, 2] p) => (int64[3] a, float[] b) <int64[12] e = {0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1}> {
        [largest] a = ArgMax<axis = 1, keepdims = 0>(x) [wide] q = Pad(p, e) b = Neg(q) }"""
    with pytest.raises(UnsupportedOpError) as caught:
        _opened(text, tmp_path)
    said = str(caught.value)
    assert "largest (ArgMax): LiteRT's ARG_MAX takes bool, float32, int32, int8, uint8, not int64" in said
    assert "wide (Pad): LiteRT's PADV2 takes at most 5 axes, not 6" in said
    assert "2 unsupported" in said


def test_a_file_that_kills_litert_kills_a_child_alone(tmp_path):
    from optkit.backends.litert import flat
    from optkit.backends.litert.trial import survives

    file = flat.File()
    graph = flat.Graph(file, "g")
    x, z, y = (graph.tensor(n, (2, 3), np.uint8) for n in "xzy")
    # Past the check of types, as a kernel that nobody knew to be so would be.
    graph.op("MAXIMUM", [x, z], [y], ("MaximumMinimumOptions", {}))
    graph.table.operators[0].opcodeIndex = file.code("ADD", {"uint8"})
    graph.table.operators[0].builtinOptionsType = flat.schema.BuiltinOptions.AddOptions
    graph.table.operators[0].builtinOptions = flat.schema.AddOptionsT()
    file.add(graph, "serving_default", {"x": x, "z": z}, {"y": y})
    path = tmp_path / "model.tflite"
    path.write_bytes(file.bytes())
    with pytest.raises(
        ModelError, match=r"model.tflite: the process in which LiteRT ran it died \(SIGABRT\)"
    ):
        survives(path)
