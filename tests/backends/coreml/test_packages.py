"""What a package says and takes: names, types, sizes, states, and what is refused before one is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import optkit
from optkit.backends import BACKENDS
from optkit.cli import main
from optkit.errors import DataError, ModelError, RecipeError, UnsupportedOpError, UsageError
from optkit.graph import walk
from optkit.legalize import legalize
from optkit.passes.base import Silent
from optkit.recipe import Recipe, validated
from optkit.reference import ReferenceSession
from optkit.request import request
from optkit.store import save
from optkit.targets import target
from optkit.testing import parse, random_feeds

pytestmark = pytest.mark.needs("coremltools")

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
PHONE = target("iphone15")
# Float16 holds them.
LAST_LARGEST = np.maximum(np.arange(70000, dtype=np.float32) - 69990, 0)[None]
LINEAR = HEAD + "g (float[batch, n, 8] x) => (float[batch, n, 4] y) { h = MatMul(x, w) y = Relu(h) }"
MASKED = (
    HEAD
    + """g (float[2, 8] x, float[2, 8] m) => (float[2, 8] y) <float lowest = {-3.4028235e38}, float one = {1}> {
  i = Sub(one, m) p = Mul(i, lowest) s = Add(x, p) y = Softmax(s) }"""
)


def _linear() -> ir.Model:
    weight = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    return parse(LINEAR, w=weight)


def _lower(model: ir.Model, folder: Path, where=PHONE, **options):
    backend = BACKENDS.get("coreml")()
    chosen = backend.options.model_validate(options)
    legalize(model, backend, where, name="model")
    folder.mkdir(exist_ok=True)
    backend.lower(model, where, chosen, folder)
    return backend.load(folder, where, chosen)


def _description(folder: Path):
    from optkit.backends.coreml.reference.program import Package

    return Package(folder / "model.mlpackage").spec.description


def _same(model: ir.Model, session, feeds, tolerance: float = 1e-5) -> None:
    found = session.run(feeds)
    for name, expected in ReferenceSession(model, optimize=False).run(feeds).items():
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape
        np.testing.assert_allclose(found[name], expected, rtol=tolerance, atol=tolerance)


def test_a_program_that_a_pass_breaks_is_refused_at_the_end_of_all(tmp_path, monkeypatch):
    """coremltools looks after each of a hundred passes; here once, after the last."""
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    last = type(PASS_REGISTRY["mil_backend::sanitize_name_strings"])

    def forgets(self, program):
        relu = next(op for op in program.functions["main"].operations if op.op_type == "relu")
        relu.x.child_ops.remove(relu)

    monkeypatch.setattr(last, "apply", forgets)
    with pytest.raises(Exception, match="should be consumed by op"):
        _lower(_linear(), tmp_path / "broken", precision="fp32")


def test_diff_runs_a_package_on_linux_and_sees_a_wrong_weight(tmp_path, capsys):
    model = parse(HEAD + "g (float[2, 8] x) => (float[2, 4] y) { h = MatMul(x, w) y = Relu(h) }",
                  w=np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32))  # fmt: skip
    save(model, tmp_path / "model.onnx")
    optkit.compile(tmp_path / "model.onnx", target="iphone15", recipe="coreml-fp16", out=tmp_path / "out")
    weight = model.graph.initializers["w"]
    changed = weight.const_value.numpy().copy()
    changed[0, 0] += 1
    weight.const_value = ir.tensor(changed, name="w")
    save(model, tmp_path / "other.onnx")
    for name, code in (("model.onnx", 0), ("other.onnx", 3)):
        assert (
            main(["diff", str(tmp_path / "out"), "--against", str(tmp_path / name), "--min-sqnr", "40"])
            == code
        )
    capsys.readouterr()


def test_two_builds_are_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        _lower(_linear(), tmp_path / name, precision="fp16").close()
    files = [
        sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*") if p.is_file())
        for n in ("one", "two")
    ]
    assert files[0] == files[1] and len(files[0]) == 4
    for file in files[0]:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_a_free_axis_is_a_range_around_the_usual_size(tmp_path):
    model = _linear()
    with _lower(model, tmp_path, usual={"x": [2, 16, 8]}) as session:
        for shape in ((1, 1, 8), (2, 16, 8), (5, 3, 8)):
            _same(model, session, {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)})
        with pytest.raises(DataError, match="axis n is 5000; the package takes 1 to 4096"):
            session.run({"x": np.zeros((1, 5000, 8), np.float32)})
    array = _description(tmp_path).input[0].type.multiArrayType
    assert list(array.shape) == [2, 16, 8]
    assert [(r.lowerBound, r.upperBound) for r in array.shapeRange.sizeRanges] == [
        (1, 4096),
        (1, 4096),
        (8, 8),
    ]


def test_a_range_may_be_given(tmp_path):
    with _lower(
        _linear(), tmp_path, shapes={"batch": 1, "n": {"min": 4, "max": 32, "default": 8}}
    ) as session:
        assert session.run({"x": np.zeros((1, 32, 8), np.float32)})["y"].shape == (1, 32, 4)
        with pytest.raises(DataError, match="axis n is 33; the package takes 4 to 32"):
            session.run({"x": np.zeros((1, 33, 8), np.float32)})
        with pytest.raises(DataError, match="the package takes"):
            session.run({"x": np.zeros((2, 8, 8), np.float32)})


def test_listed_sizes_become_enumerated_shapes(tmp_path):
    model = _linear()
    with _lower(model, tmp_path, shapes={"batch": 1, "n": [4, 16]}) as session:
        for n in (4, 16):
            _same(model, session, {"x": np.random.default_rng(1).normal(size=(1, n, 8)).astype(np.float32)})
        assert session.takes({"x": np.zeros((1, 4, 8), np.float32)})
        assert not session.takes({"x": np.zeros((1, 5, 8), np.float32)})
        with pytest.raises(DataError, match=r"n 5 is none of the listed sizes \(n: 4, 16\)"):
            session.run({"x": np.zeros((1, 5, 8), np.float32)})
    shapes = _description(tmp_path).input[0].type.multiArrayType.enumeratedShapes.shapes
    assert [list(s.shape) for s in shapes] == [[1, 4, 8], [1, 16, 8]]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"height": 3}, "options.shapes.height: no free axis has this name"),
        ({"batch": [1, 2], "n": [1, 2, 3]}, "as long as one another"),
        ({"batch": [1, 2]}, "n is a range, and others are lists"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(shapes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        _lower(_linear(), tmp_path, shapes=shapes)


@pytest.mark.parametrize(
    ("backend", "size", "message"),
    [
        ("coreml", [12], "shapes.n.sizes: tuple should have at least 2 items after validation, not 1"),
        ("coreml", [16, 0], "shapes.n.sizes.1: input should be greater than or equal to 1, not 0"),
        ("litert", [16, 0], "shapes.n.sizes.1: input should be greater than or equal to 1, not 0"),
        ("litert", 0, "shapes.n.size: input should be greater than or equal to 1, not 0"),
        ("coreml", {"max": "a"}, "shapes.n.range.max: input should be a valid integer"),
        ("coreml", {"min": 8, "max": 4}, "shapes.n.range: min 8, default 8 and max 4 are not in order"),
        ("coreml", {"least": 8}, "unknown option 'shapes.n.range.least'"),
    ],
)
def test_a_size_that_is_none_is_refused_for_what_it_is(backend, size, message):
    with pytest.raises(RecipeError) as found:
        validated(BACKENDS.get(backend)().options, "options", {"shapes": {"n": size}})
    assert message in str(found.value) and found.value.hint is None


def test_a_range_in_disorder_is_refused():
    from optkit.backends.coreml.shapes import Range

    with pytest.raises(ValueError, match="min 8, default 8 and max 4 are not in order"):
        Range(min=8, max=4)


def test_lists_for_two_inputs_need_ios_18(tmp_path):
    model = parse(HEAD + "g (float[n] x, float[n] z) => (float[n] y) { y = Add(x, z) }")
    with pytest.raises(UsageError, match=r"lists of sizes for 2 inputs \(x, z\) need iOS 18"):
        _lower(model, tmp_path, shapes={"n": [2, 4]}, deployment="iOS17")


def test_names_types_and_scalars_are_the_models_own(tmp_path):
    model = parse(
        HEAD
        + """g (int64[2] i, bool[2] c, float s) => (int64[2] j, bool[2] d, float t) {
        j = Add(i, i) d = Not(c) t = Exp(s) }"""
    )
    for value, name in zip(
        (*model.graph.inputs, *model.graph.outputs), ("input:0", "1st", "s", "out/0", "d", "t"), strict=True
    ):
        value.name = name
    with _lower(model, tmp_path) as session:
        feeds = {
            "input:0": np.array([3, -4]), "1st": np.array([True, False]), "s": np.array(0.5, np.float32)
        }  # fmt: skip
        _same(model, session, feeds)
        with pytest.raises(DataError, match="integers beyond 32 bits"):
            session.run({**feeds, "input:0": np.array([1 << 40, 0])})
        with pytest.raises(DataError, match="input '1st' is int64, the model takes bool"):
            session.run({**feeds, "1st": np.array([1, 0])})
        with pytest.raises(DataError, match="the inputs are input:0, 1st, s; given: s"):
            session.run({"s": feeds["s"]})
    assert [f.name for f in _description(tmp_path).input] == ["input_0", "_1st", "s"]


# What coremltools renames while it converts (its NameSanitizer), and names that are one as soon as they are written its way.
WORDS = (
    "any", "bool", "program", "func", "tensor", "list", "dict", "tuple", "true", "false", "string", "bf16", "fp16", "fp32", "fp64",
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "state",
)  # fmt: skip


def test_inputs_may_be_called_by_words_of_core_mls_language(tmp_path):
    names = [*WORDS, "a.b", "a_b", "a/b"]
    inputs, outputs = (", ".join(f"float[2] {c}{n}" for n in range(len(names))) for c in "xy")
    nodes = " ".join(f"y{n} = Add(x{n}, x{n})" for n in range(len(names)))
    model = parse(HEAD + f"g ({inputs}) => ({outputs}) {{ {nodes} }}")
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name
    with _lower(model, tmp_path) as session:
        _same(model, session, random_feeds(model))
    features = [f.name for f in (*_description(tmp_path).input, *_description(tmp_path).output)]
    assert len(set(features)) == len(features) and not set(features) & set(WORDS)


@pytest.mark.parametrize("states", [{}, {"state": "string"}])
def test_outputs_states_and_values_between_may_be_called_by_words_of_core_mls_language(states, tmp_path):
    model = parse(
        HEAD + "g (float[4] x, float[4] state) => (float[4] tensor, float[4] string) {"
        " list = Mul(x, x) string = Add(list, state) tensor = Mul(string, x) }"
    )
    with _lower(model, tmp_path, states=states) as session:
        # States are kept in float16: half a step of 11 bits.
        _same(model, session, random_feeds(model), tolerance=2**-11 if states else 1e-6)


def test_masks_stay_finite_in_half_precision(tmp_path):
    model = parse(MASKED)
    mask = np.array([[1] * 5 + [0] * 3, [1] * 8], np.float32)
    with _lower(model, tmp_path, precision="fp16") as session:
        feeds = {"x": random_feeds(model)["x"], "m": mask}
        _same(model, session, feeds, tolerance=2e-3)
        assert (session.run(feeds)["y"][0, 5:] == 0).all()


def test_half_precision_rounds_to_eleven_bits(tmp_path):
    model = _linear()
    with _lower(model, tmp_path, precision="fp16") as session:
        x = np.random.default_rng(2).normal(size=(3, 4, 8)).astype(np.float32)
        found, exact = session.run({"x": x})["y"], ReferenceSession(model, optimize=False).run({"x": x})["y"]
    # Inputs, weights and the sum are rounded to 2^-11 of their size each, at most; eight products of values around 1.
    assert 0 < np.abs(found - exact).max() < 8 * 3 * 3 * 2**-11


LONG = (
    ("(float[1, 70000] x) => (float[1, 3] v, int64[1, 3] y) <int64[1] k = {3}> { v, y = TopK(x, k) }", {"x": LAST_LARGEST}),
    ("(int64[3, 1] i) => (float[3, 4] y) { y = GatherND(rows, i) }", {"i": np.array([[69999], [40000], [0]])}),
    ("(int64[3] i) => (float[3, 4] y) { y = Gather(rows, i) }", {"i": np.array([69999, 40000, 0])}),
    ("(int32[3] t, int64[3] i) => (int32[3] y) { y = Gather(t, i) }", {"t": np.array([100000, -70000, 40000], np.int32)}),
    ("(int32[3, 1] t) => (int32[3] y) <int64[1] a = {1}> { y = Squeeze(t, a) }", {"t": np.array([[100000], [-70000], [4]], np.int32)}),
)  # fmt: skip


@pytest.mark.parametrize(("graph", "given"), LONG)
def test_integers_beyond_16_bits_are_themselves_in_half_precision(graph, given, tmp_path):
    rows = np.arange(70000 * 4, dtype=np.float32).reshape(70000, 4) % 2048
    model = parse(HEAD + f"g {graph}", **({"rows": rows} if "rows" in graph else {}))
    feeds = {**random_feeds(model), **given}
    _same(model, _lower(model, tmp_path, precision="fp16"), feeds)


def test_what_logarithms_are_taken_of_stays_in_single_precision(tmp_path):
    """Powers of a few 1e-9 are 0 in float16, and their logarithms then those of the smallest offset."""
    from optkit.backends.coreml.reference.program import Package

    graph = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[1, 8, 16] x) => (float[1, 4, 16] y, float[1, 8, 16] z)
    <float tiny = {1e-10}, int64[1] axis = {1}> {
      p = Mul(x, x)
      f = MatMul(m, p)
      o = Add(f, tiny)
      y = Log(o)
      s = Softmax(x)
      z = Log(s)
    }"""
    m = np.abs(np.random.default_rng(0).normal(size=(4, 8))).astype(np.float32)
    model = parse(graph, m=m)
    x = np.random.default_rng(1).normal(size=(1, 8, 16)).astype(np.float32) * np.float32(1e-4)
    backend = BACKENDS.get("coreml")()
    options = backend.options.model_validate({"precision": "fp16"})
    backend.lower(model, PHONE, options, tmp_path)
    with backend.load(tmp_path, PHONE, options) as session:
        found = session.run({"x": x})
    np.testing.assert_allclose(found["y"], np.log(m @ (x * x) + 1e-10), atol=2e-2)
    kinds = {
        o.kind: o.outputs[0].type.kind
        for o in Package(tmp_path / "model.mlpackage").functions["main"].block.operations
    }
    assert kinds["softmax"] == "FLOAT16"
    assert kinds["log"] == kinds["mul"] == kinds["matmul"] == "FLOAT32"


def test_a_variance_as_a_difference_of_means_stays_in_single_precision(tmp_path):
    """Values around 3 with a spread of 0.01: the means are 9 and 9, and float16 has four digits of them."""
    from optkit.backends.coreml.reference.program import Package

    graph = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[1, 64, 8] x, float[1, 64, 8] u) => (float[1, 64, 8] y, float[1, 1, 8] z)
    <float tiny = {1e-6}, float zero = {0.0}, int64[1] axis = {1}> {
      s = Mul(x, x)
      a = ReduceMean(s, axis)
      m = ReduceMean(x, axis)
      b = Mul(m, m)
      v = Sub(a, b)
      c = Max(v, zero)
      o = Add(c, tiny)
      r = Sqrt(o)
      d = Sub(x, m)
      y = Div(d, r)
      p = ReduceMean(u, axis)
      z = Sub(p, m)
    }"""
    model = parse(graph)
    random = np.random.default_rng(1)
    x = (3 + 0.01 * random.normal(size=(1, 64, 8))).astype(np.float16).astype(np.float32)
    feeds = {"x": x, "u": random.normal(size=(1, 64, 8)).astype(np.float32)}
    with _lower(model, tmp_path, precision="fp16") as session:
        found = session.run(feeds)["y"]
    wide = x.astype(np.float64)
    exact = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    # x is on float16's grid, and its mean is not: half a step of numbers around 3, over the spread. Float32 leaves the variance
    # of 1e-4 as a difference of two nines within 2 %.
    assert np.abs(found - exact).max() < 2**-10 / wide.std(1).min() + 0.02 * np.abs(exact).max()
    operations = Package(tmp_path / "model.mlpackage").functions["main"].block.operations
    kinds = [(o.kind, o.outputs[0].type.kind) for o in operations]
    assert kinds.count(("sub", "FLOAT32")) == 1
    assert kinds.count(("sub", "FLOAT16")) == 2
    assert ("sqrt", "FLOAT32") in kinds
    assert ("real_div", "FLOAT16") in kinds
    # The mean of u is that of no variance.
    assert kinds.count(("reduce_mean", "FLOAT16")) == 1


def test_squares_that_float16_cannot_hold_stay_in_single_precision(tmp_path):
    """Streams of decoders reach thousands, and 256 squared is infinite in float16."""
    graph = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[1, 4, 32] x, float[1, 4, 32] u) => (float[1, 4, 32] y, float[1, 4, 32] z)
    <float tiny = {1e-5}, int64[1] axis = {-1}> {
      s = Mul(x, x)
      a = ReduceMean(s, axis)
      o = Add(a, tiny)
      r = Sqrt(o)
      y = Div(x, r)
      z = Mul(u, u)
    }"""
    from optkit.backends.coreml.reference.program import Package

    model = parse(graph)
    random = np.random.default_rng(1)
    feeds = {n: random.normal(size=(1, 4, 32)).astype(np.float32) for n in "xu"}
    feeds["x"] *= 1000
    with _lower(model, tmp_path, precision="fp16") as session:
        found = session.run(feeds)
    wide = feeds["x"].astype(np.float64)
    exact = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True))
    # Values below 4, rounded when they are read, when the root is, and after the division.
    assert np.abs(found["y"] - exact).max() < 3 * 4 * 2**-11
    operations = Package(tmp_path / "model.mlpackage").functions["main"].block.operations
    kinds = [(o.kind, o.outputs[0].type.kind) for o in operations if o.kind in ("mul", "square")]
    # No root is taken of the other square.
    assert sorted(kind for _, kind in kinds) == ["FLOAT16", "FLOAT32"]


def test_angles_of_positions_and_steps_stay_in_single_precision(tmp_path):
    """900.5 times a frequency is rounded by up to a quarter of a radian in float16."""
    from optkit.backends.coreml.reference.program import Package

    graph = """<ir_version: 10, opset_import: ["" : 21]>
    g (int64[1, 6] p, float[1] t, float[1, 8] x) => (float[1, 6, 16] y, float[1, 8] z, float[1, 8] s)
    {
      f = Cast <to = 1> (p)
      u = Unsqueeze(f, two)
      m = MatMul(u, w)
      d = Concat <axis = -1> (m, m)
      a = Cos(d)
      b = Sin(d)
      y = Add(a, b)
      e = Mul(t, v)
      z = Sin(e)
      n = MatMul(x, square)
      s = Sin(n)
    }"""
    random = np.random.default_rng(0)
    frequencies = (10000.0 ** (-np.arange(8) / 8)).astype(np.float32)
    weights = {
        "w": frequencies.reshape(1, 1, 8), "v": frequencies.reshape(1, 8), "two": np.array([2]),
        "square": random.normal(size=(8, 8)).astype(np.float32),
    }  # fmt: skip
    feeds = {
        "p": np.array([[0, 1, 511, 1021, 2047, 4001]]), "t": np.array([901], np.float32),
        "x": random.normal(size=(1, 8)).astype(np.float32),
    }  # fmt: skip
    model = parse(graph, **weights)
    with _lower(model, tmp_path, precision="fp16") as session:
        found = session.run(feeds)
    expected = ReferenceSession(model, optimize=False).run(feeds)
    # Numbers up to 2 on float16's grid: a sine and a cosine, rounded alone and as a sum.
    for name in "yz":
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2**-9)
    operations = Package(tmp_path / "model.mlpackage").functions["main"].block.operations
    kinds = sorted(o.outputs[0].type.kind for o in operations if o.kind == "sin")
    # What the network computed itself is a half.
    assert kinds == ["FLOAT16", "FLOAT32", "FLOAT32"]


@pytest.mark.parametrize("looped", [False, True])
def test_floats_that_sizes_are_rounded_from_stay_in_single_precision(looped, tmp_path):
    """3.0005 is 3 in float16: each of 16 syllables would last 3 frames instead of 4."""
    from optkit.backends.coreml.reference.program import Package

    steps = "n = Loop(times, yes, r) <body = b (int64 i, bool c, float k) => (bool d, float l) { d = Identity(c) l = Identity(k) }>"
    graph = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[16] x) => (float[n] y, float[16] z)
    <float one = {{1}}, float zero = {{0}}, int64 times = {{2}}, bool yes = {{1}}> {{
      l = Sin(x)
      e = Div(l, l)
      m = Mul(e, x)
      u = Ceil(m)
      r = ReduceSum <keepdims = 0> (u)
      {steps if looped else "n = Identity(r)"}
      t = Cast <to = 7> (n)
      a = Range(start, t, step)
      y = Cast <to = 1> (a)
      z = Exp(x)
    }}"""
    model = parse(graph, start=np.array(0), step=np.array(1))
    feeds = {"x": np.full(16, 3.0005, np.float32)}
    with _lower(model, tmp_path, precision="fp16") as session:
        found = session.run(feeds)
    np.testing.assert_array_equal(found["y"], np.arange(64))
    operations = Package(tmp_path / "model.mlpackage").functions["main"].block.operations
    kinds = {o.kind: o.outputs[0].type.kind for o in operations}
    # Nothing is counted by the other one.
    assert kinds["ceil"] == kinds["sin"] == kinds["reduce_sum"] == "FLOAT32" and kinds["exp"] == "FLOAT16"


def test_scores_that_are_compared_and_counted_are_halves(tmp_path):
    from optkit.backends.coreml.reference.program import Package

    graph = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[16] x) => (int64[1, n] y) <float half = {0.5}> {
      s = Sigmoid(x) k = Greater(s, half) y = NonZero(k)
    }"""
    model = parse(graph)
    x = np.arange(-8, 8).astype(np.float32) + np.float32(0.5)
    with _lower(model, tmp_path, precision="fp16") as session:
        np.testing.assert_array_equal(session.run({"x": x})["y"], np.arange(8, 16)[None])
    operations = Package(tmp_path / "model.mlpackage").functions["main"].block.operations
    assert {o.outputs[0].type.kind for o in operations if o.kind == "sigmoid"} == {"FLOAT16"}


@pytest.mark.parametrize("most", ["int64 most = {4}", "int64 most = {40}"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_classes_without_a_box_leave_those_of_the_others(precision, most, tmp_path):
    """Core ML has no tensors without elements: as long as one class has a box, none is made."""
    graph = f"""g (float[2, 32, 4] b, float[2, 3, 32] s) => (int64[n, 3] y) <{most}, float overlap = {{0.5}}, float least = {{0.6}}> {{
      y = NonMaxSuppression(b, s, most, overlap, least) }}"""
    model = parse(HEAD + graph)
    random = np.random.default_rng(0)
    # Whole numbers up to 2048 and these scores float16 has.
    corners = random.integers(0, 300, (2, 32, 2))
    boxes = np.concatenate([corners, corners + random.integers(20, 140, (2, 32, 2))], 2).astype(np.float32)
    scores = random.permuted(np.tile(np.arange(32) / 32, (2, 3, 1)), axis=2).astype(np.float32)
    scores[0, 1], scores[1, 0], scores[1, 2] = 0.5, 0, 0.25
    _same(model, _lower(model, tmp_path, precision=precision), {"b": boxes, "s": scores})


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        ("(float[0, 4] x) => (float[4] y) { y = ReduceSum<keepdims = 0>(x, axis) }", r"'x' is \[0, 4\], and Core ML has"),
        ("(float[2, 4] x) => (float[2, 0] y) { y = Slice(x, four, four, one) }", "'y' is .*, and Core ML has"),
        (
            "(float[2, 4] x) => (float[2] y) { e = Slice(x, four, four, one)\n y = ReduceSum<keepdims = 0>(e, one) }",
            "Slice.* without elements",
        ),
        (
            "(float[2, 4] x) => (float[2] y) { e, f = Split<axis = 1>(x, all)\n y = ReduceSum<keepdims = 0>(e, one) }",
            "Split.* without elements",
        ),
    ],
)  # fmt: skip
def test_tensors_without_elements_are_refused_before_anything_is_written(graph, said, tmp_path):
    weights = {"axis": [0], "one": [1], "four": [4], "all": [0, 4]}
    model = parse(f"{HEAD}g {graph}", **{k: np.array(v) for k, v in weights.items()})
    with pytest.raises(ModelError, match=said):
        _lower(model, tmp_path)
    assert not (tmp_path / "model.mlpackage").exists()


def test_boxes_are_dropped_by_areas_in_single_precision(tmp_path):
    """300 x 300 is infinite in float16."""
    from optkit.backends.coreml.reference.program import Package

    graph = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[1, 32, 4] b, float[1, 1, 32] s) => (int64[n, 3] y) <int64 most = {9}, float overlap = {0.5}> {
      y = NonMaxSuppression(b, s, most, overlap)
    }"""
    model = parse(graph)
    random = np.random.default_rng(0)
    corners = random.integers(0, 300, (1, 32, 2))
    boxes = np.concatenate([corners, corners + random.integers(200, 340, (1, 32, 2))], 2).astype(np.float32)
    # Whole numbers up to 2048 and these scores float16 has.
    feeds = {"b": boxes, "s": random.permutation(32).reshape(1, 1, 32).astype(np.float32) / 32}
    with _lower(model, tmp_path, precision="fp16") as session:
        _same(model, session, feeds)
    operations = Package(tmp_path / "model.mlpackage").functions["main"].block.operations
    kinds = [o.outputs[0].type.kind for o in operations if o.kind == "non_maximum_suppression"]
    assert kinds == ["FLOAT32"]


def test_states_are_kept_between_runs(tmp_path):
    model = parse(
        HEAD
        + "g (float[4] x, float[4] old) => (float[4] y, float[4] new) { new = Add(x, old) y = Mul(new, x) }"
    )
    with _lower(model, tmp_path, states={"old": "new"}) as session:
        assert [s.name for s in session.inputs] == ["x"] and [s.name for s in session.outputs] == ["y"]
        x = np.arange(4, dtype=np.float32)
        for total in (x, 2 * x, 3 * x):
            np.testing.assert_array_equal(session.run({"x": x})["y"], total * x)
        session.reset()
        np.testing.assert_array_equal(session.run({"x": x})["y"], x * x)


def test_states_that_are_given_are_set_and_their_next_values_come_back(tmp_path):
    """So that a package with states can be held against the graph, which is given them."""
    text = """g (float[4] x, float[4] a, float[4] b) => (float[4] y, float[4] c, float[4] d) {
      c = Add(x, a) d = Mul(x, b) y = Sub(c, d) }"""
    x, a, b = (np.arange(4, dtype=np.float32) + n for n in (0, 1, 2))
    with _lower(parse(HEAD + text), tmp_path, states={"a": "c", "b": "d"}) as session:
        found = session.run({"x": x, "a": a, "b": b})
        assert list(found) == ["y", "c", "d"] and found["c"].dtype == np.float32
        np.testing.assert_array_equal(found["c"], x + a)
        np.testing.assert_array_equal(found["d"], x * b)
        # What is not given goes on from there.
        np.testing.assert_array_equal(session.run({"x": x})["y"], (x + a + x) - x * b * x)
        with pytest.raises(DataError, match="the inputs are x, a, b; given: x, a"):
            session.run({"x": x, "a": a})


def test_compile_takes_a_decoder_with_states_and_compares_it_step_by_step(tmp_path):
    text = "g (float[2, 8] x, float[2, 8] k) => (float[2, 8] y, float[2, 8] l) { l = Add(x, k) y = Relu(l) }"
    artifact, report = optkit.compile(
        parse(HEAD + text), target="iphone15", recipe="coreml-fp32", overrides=["options.states={k: l}"], out=tmp_path / "out"
    )  # fmt: skip
    assert report.manifest.fidelity is not None and report.manifest.fidelity.cosine > 0.9999
    x = np.full((2, 8), 0.5, np.float32)
    model = optkit.load(artifact.folder)
    assert [model.run({"x": x})["y"][0, 0] for _ in range(3)] == [0.5, 1.0, 1.5]
    model.reset()
    assert [model.run({"x": x})["y"][0, 0] for _ in range(2)] == [0.5, 1.0]


def test_eval_holds_a_decoder_with_states_against_its_model_over_the_same_samples(tmp_path, capsys):
    text = "g (float[1, 4] x, float[1, 4] k) => (float[1, 4] y, float[1, 4] l) { l = Add(x, k) y = Relu(l) }"
    save(parse(HEAD + text), tmp_path / "m.onnx")
    out = tmp_path / "out"
    optkit.compile(
        tmp_path / "m.onnx", target="iphone15", recipe="coreml-fp32", overrides=["options.states={k: l}"], out=out
    )  # fmt: skip
    evaluator = tmp_path / "close.py"
    evaluator.write_text("""
import numpy as np
def samples():
    for n in range(3):
        x = np.full((1, 4), n - 1.5, np.float32)
        yield {"x": x, "k": x * 3}, np.maximum(x * 4, 0)
def score(outputs, label):
    return float(np.abs(outputs["y"] - label).max() < 1e-6)
""")
    asked = ["eval", str(out), "--eval", str(evaluator), "--against", str(tmp_path / "m.onnx"), "--json"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["reference"], found["candidate"], found["n"]) == (1.0, 1.0, 3)
    assert "not on iphone15" in found["not_run_on"][str(out)]
    assert main(["diff", str(out), "--against", str(tmp_path / "m.onnx"), "--min-sqnr", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["outputs"]) == ["y", "l"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"states": {"gone": "y"}}, "options.states: the model has no 'gone'"),
        ({"states": {"x": "gone"}}, "options.states: the model has no 'gone'"),
        ({"states": {"x": "y"}, "deployment": "iOS17"}, "states need iOS 18, the package is for iOS 17"),
        ({"states": {"x": "y"}}, "must have one fixed shape"),
        ({"pictures": {"gone": {"scale": 1, "bias": [0]}}}, "options.pictures: the model has no 'gone'"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        _lower(_linear(), tmp_path, **options)


def test_counters_are_no_states_since_float16_would_stop_at_2048(tmp_path):
    text = "g (%s[4] n, float[4] x) => (float[4] y, %s[4] m) <%s one = {1}> { m = Add(n, one) c = Cast<to = 1>(n) y = Mul(c, x) }"
    for kind in ("int64", "int32"):
        with pytest.raises(UsageError, match=f"n is {kind}, and Core ML keeps float16") as found:
            _lower(parse(HEAD + text % (kind, kind, kind)), tmp_path, states={"n": "m"})
        assert "counters and positions" in str(found.value.hint)
    small = "g (uint8[4] n, float[4] x) => (float[4] y, uint8[4] m) { m = Max(n, n) c = Cast<to = 1>(n) y = Mul(c, x) }"
    _lower(parse(HEAD + small), tmp_path, states={"n": "m"}).close()


def test_words_of_options_are_taken_in_any_case(tmp_path):
    picture = {"scale": 1, "bias": [0], "color": "bgr"}
    kind = BACKENDS.get("coreml")().options
    options = validated(
        kind, "options", {"deployment": "ios17", "units": "cpu_only", "pictures": {"x": picture}}
    )
    assert (options.deployment, options.units, options.pictures["x"].color) == ("iOS17", "CPU_ONLY", "BGR")
    with pytest.raises(RecipeError, match="'iOS16', 'iOS17' or 'iOS18', not 'iOS15'"):
        validated(kind, "options", {"deployment": "iOS15"})
    recipe = {"recipe": 1, "backend": "coreml"}
    overrides = ["options.deployment=IOS17", "options.units=cpu_and_ne"]
    artifact, _ = optkit.compile(
        _linear(), target="iphone15", recipe=recipe, overrides=overrides, out=tmp_path / "out"
    )
    assert artifact.manifest.options["deployment"] == "iOS17"
    assert artifact.manifest.options["units"] == "CPU_AND_NE"


def test_a_picture_is_what_the_network_gets_after_scale_and_bias(tmp_path):
    model = parse(HEAD + "g (float[1, 3, 4, 4] x) => (float[1, 3, 4, 4] y) { y = Relu(x) }")
    picture = {"scale": 1 / 127.5, "bias": [-1.0, -1.0, -1.0]}
    with _lower(model, tmp_path, pictures={"x": picture}) as session:
        pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 4))
        _same(model, session, {"x": (pixels / 127.5 - 1).astype(np.float32)})
        for wrong in (pixels, np.full(pixels.shape, np.nan)):
            with pytest.raises(
                DataError, match=r"input 'x' holds .* which no picture gives as pixel \* 0.00784"
            ):
                session.run({"x": wrong.astype(np.float32)})
    assert _description(tmp_path).input[0].type.WhichOneof("Type") == "imageType"


@pytest.mark.parametrize(
    ("shape", "picture", "shapes", "message"),
    [
        ("1, 3, 4, 4", {"scale": 0, "bias": [0]}, {}, "a scale of 0 makes all pixels alike"),
        ("1, 3, 4, 4", {"scale": 1, "bias": [1, 2]}, {}, r"RGB has 3 channel\(s\), and bias 2 numbers"),
        ("1, 1, 4, 4", {"scale": 1, "bias": [1, 2, 3], "color": "G"}, {}, r"G has 1 channel\(s\), and bias 3 numbers"),
        ("1, 3, 4, 4", {"scale": 1, "bias": [0], "color": "G"}, {}, r"'x' is \[1, 3, 4, 4\], and a picture in G is \[1, 1, h"),
        ("1, 1, 4, 4", {"scale": 1, "bias": [0]}, {}, r"'x' is \[1, 1, 4, 4\], and a picture in RGB is \[1, 3, h"),
        ("1, 4, 4, 3", {"scale": 1, "bias": [0]}, {}, "for three, which come first"),
        ("2, 3, 4, 4", {"scale": 1, "bias": [0]}, {}, r"'x' is \[2, 3, 4, 4\]"),
        ("n, 3, 4, 4", {"scale": 1, "bias": [0]}, {}, r"'x' is \['n', 3, 4, 4\].*give options.shapes.n=1"),
        ("n, 3, 4, 4", {"scale": 1, "bias": [0]}, {"n": 2}, r"'x' is \[2, 3, 4, 4\].*give options.shapes.n=1"),
        ("n, 3, 4, 4", {"scale": 1, "bias": [0]}, {"n": [1, 2]}, r"'x' is \['n', 3, 4, 4\].*give options.shapes.n=1"),
    ],
)  # fmt: skip
def test_what_no_picture_is_is_refused_before_any_work(shape, picture, shapes, message, tmp_path):
    model = parse(HEAD + f"g (float[{shape}] x) => (float[{shape}] y) {{ y = Relu(x) }}")
    recipe = {"recipe": 1, "backend": "coreml", "options": {"pictures": {"x": picture}, "shapes": shapes}}
    with pytest.raises(UsageError) as found:
        request(model, target="iphone15", recipe=recipe).work(tmp_path, Silent())
    assert re.search(message, f"{found.value} {found.value.hint}"), found.value


def test_pictures_become_floats_and_are_no_states(tmp_path):
    integers = parse(HEAD + "g (uint8[1, 3, 4, 4] x) => (float[1, 3, 4, 4] y) { y = Cast<to = 1>(x) }")
    with pytest.raises(UsageError, match="'x' is of type UINT8, and pictures become floats"):
        _lower(integers, tmp_path, pictures={"x": {"scale": 1, "bias": [0]}})
    kept = parse(HEAD + "g (float[1, 3, 4, 4] x) => (float[1, 3, 4, 4] y) { y = Relu(x) }")
    with pytest.raises(UsageError, match="'x' is a state, and pictures become floats"):
        _lower(kept, tmp_path, pictures={"x": {"scale": 1, "bias": [0]}}, states={"x": "y"})


@pytest.mark.parametrize("data", [None, "random"])
def test_inputs_drawn_for_a_picture_are_pixels(data, tmp_path):
    """Numbers around 0 would be cut off at the end of the pixels, and the package judged on what no picture holds."""
    weight = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    model = parse(HEAD + "g (float[1, 3, 8, 8] x) => (float[1, 8, 6, 6] y) { y = Conv(x, w) }", w=weight)
    picture = {"scale": 1 / 127.5, "bias": [-1.0]}
    recipe = {"recipe": 1, "backend": "coreml", "options": {"pictures": {"x": picture}}}
    _, report = optkit.compile(model, target="iphone15", recipe=recipe, data=data, out=tmp_path / "out")
    assert report.manifest.fidelity.cosine > 1 - 1e-6
    work = request(model, target="iphone15", recipe=recipe, data=data).work(tmp_path, Silent())
    for batch in work.unseen:
        pixels = (batch["x"] + 1) * 127.5
        np.testing.assert_allclose(pixels, np.rint(pixels), atol=1e-3)
        assert pixels.min() >= 0 and pixels.max() <= 255 and len(np.unique(pixels)) > 32


def test_examples_of_a_module_become_the_nearest_pixels():
    from optkit.backends.coreml.interface import Picture

    picture = Picture(scale=0.5, bias=(-10.0, 0.0, 10.0))
    given = np.array([-100.0, -0.1, 0.3, 200.0], np.float32).reshape(1, 1, 1, 4).repeat(3, axis=1)
    found = picture.fed(given, drawn=False)
    assert found.dtype == np.float32
    # From bias to bias + 127.5, in steps of a half.
    np.testing.assert_array_equal(
        found[0, :, 0], [[-10, 0, 0.5, 117.5], [0, 0, 0.5, 127.5], [10, 10, 10, 137.5]]
    )


CLASSES = "g (float[%s, 8] x) => (float[%s, 3] p, float[%s, 3] z) { z = MatMul(x, w) p = Softmax(z) }"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_classes_have_names_and_the_numbers_stay_those_of_the_model(precision, tmp_path):
    weight = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    model, names = parse(HEAD + CLASSES % ("n", "n", "n"), w=weight), ("cat", "dog", "bird")
    x = np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32)
    with _lower(model, tmp_path, labels={"p": names}, shapes={"n": 1}, precision=precision) as session:
        _same(model, session, {"x": x}, tolerance=1e-5 if precision == "fp32" else 1e-2)
        found = session.compute(session.features({"x": x}))
    expected = ReferenceSession(model, optimize=False).run({"x": x})["p"][0]
    assert found["classLabel"] == names[int(expected.argmax())]
    description = _description(tmp_path)
    assert description.predictedFeatureName == "classLabel"
    kinds = {f.name: f.type.WhichOneof("Type") for f in description.output}
    assert kinds == {"classLabel": "stringType", "classLabel_probs": "dictionaryType", "z": "multiArrayType"}


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ("n", {"p": ("a", "b", "c")}, r"3 names for 'p', which is \['n', 3\]"),
        ("1", {"p": ("a", "b")}, r"2 names for 'p', which is \[1, 3\]"),
        ("1", {"p": ("a", "b", "a")}, "a is there twice"),
        ("1", {"q": ("a", "b", "c")}, "options.labels: the model has no 'q'"),
    ],
)
def test_names_that_do_not_fit_the_classes_are_refused(rows, labels, message, tmp_path):
    model = parse(HEAD + CLASSES % (rows, rows, rows), w=np.ones((8, 3), np.float32))
    with pytest.raises(UsageError, match=message):
        _lower(model, tmp_path, labels=labels)


def test_metadata_is_kept(tmp_path):
    _lower(
        _linear(), tmp_path, metadata={"author": "A", "license": "MIT", "version": "3", "description": "D"}
    ).close()
    own = _description(tmp_path).metadata
    assert (own.author, own.license, own.versionString, own.shortDescription) == ("A", "MIT", "3", "D")


def test_everything_that_core_ml_lacks_is_listed_at_once():
    model = parse(
        HEAD
        + """g (float[2, 2] x, float[1, 1, 4, 4] p, float[5, 2, 3] u, uint8[1, 1, 4, 4] v) => (float[] d, float[] e, float[] f, float[] i, float[] m, int64[] n, float[] o, float[] a, uint8[] b) <bool t = {1}, int32[2] lengths = {5, 3}> {
        d = Det(x) e = MaxPool<kernel_shape = [2, 2], dilations = [2, 2]>(p) f = Resize<coordinate_transformation_mode = "tf_crop_and_resize">(p, , s)
        i = Einsum<equation = "ii">(x) m, n = MaxPool<kernel_shape = [2, 2]>(p) o = Dropout(x, , t)
        a = GRU<hidden_size = 4>(u, w, r, , lengths) b = Resize<mode = "linear">(v, , s) }""",
        s=np.ones(4, np.float32),
        w=np.ones((1, 12, 3), np.float32),
        r=np.ones((1, 12, 4), np.float32),
    )
    with pytest.raises(UnsupportedOpError) as found:
        legalize(model, BACKENDS.get("coreml")(), PHONE, name="model")
    text = str(found.value)
    for part in (
        "8 unsupported",
        "sequences that are shorter than the input, of 5 steps: [5, 3]",
        "'linear' of uint8",
        "pooling gives no indices",
        "it drops at random: training_mode is not off",
        "no translation of Det",
        "no dilated pooling",
        "'tf_crop_and_resize'",
        "an equation without '->'",
    ):
        assert part in text, text


def test_quantized_activations_need_ios_17(tmp_path):
    model = parse(
        HEAD
        + """g (float[2, 4] x) => (float[2, 4] y, float[2, 4] z) <float s = {0.1}, int8 o = {0}> {
        q = QuantizeLinear(x, s, o) y = DequantizeLinear(q, s, o) p = QuantizeLinear(y, s, o) z = DequantizeLinear(p, s, o) }"""
    )
    with pytest.raises(UnsupportedOpError, match="4 unsupported") as found:
        _lower(model, tmp_path, deployment="iOS16")
    assert "needs iOS 17, the package is for iOS 16" in str(found.value)
    _lower(model, tmp_path, deployment="iOS17").close()


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ("g (float[] x) => (float[] y) { y = Relu(x) }", "the rank of the input 'x' is not known"),
        ("g (double[2] x, float[1, 1, 1, 1, 1, 1] z) => (double[2] y) { y = Abs(x) }", "'z' has 6 axes"),
        ("g (int64[2] x) => (int64[2] y) { y = Add(x, big) }", "integers beyond 32 bits"),
        (
            "g (float[n] x, int64[2] s) => (float[] y) { r = ReduceSum(x, s) y = Relu(r) }",
            "axes of a reduction are computed at run time",
        ),
        (
            "g (float[n, 3] x, int64[m] s) => (float[] y) { y = Reshape(x, s) }",
            "the rank depends on the inputs",
        ),
        (
            'g (float[1, 3, 8, 8] x, int64[4] s) => (float[1, 3, h, w] y) { y = Resize<mode = "nearest">(x, , , s) }',
            r"\(Resize\): its sizes 's' depend on data",
        ),
        (
            'g (float[1, 3, 8, 8] x, int64[4] s) => (float[1, 3, h, w] y) { y = Resize<mode = "linear">(x, , , s) }',
            r"\(Resize\): its sizes 's' depend on data",
        ),
        (
            "g (float[3, 4] x, int64[2, 4] i, float[2, 4] u) => (float[3, 4] y) { y = ScatterElements<axis = 1>(x, i, u) }",
            r"\(ScatterElements\): its indices are \['2', '4'\] for data of \['3', '4'\]",
        ),
        (
            "g (uint64[2] x) => (uint64[2] y) { y = Add(x, x) }",
            "of type uint64, which no input or output of Core ML has",
        ),
    ],
)
def test_what_cannot_be_written_is_said(graph, message, tmp_path):
    big = {"big": np.array([1 << 40, 0])} if "big" in graph else {}
    with pytest.raises(ModelError, match=message):
        _lower(parse(HEAD + graph, **big), tmp_path)


def test_nodes_that_turn_out_not_to_fit_are_listed_at_once_with_those_of_bodies(tmp_path):
    model = parse(
        HEAD
        + """g (float[n, 4] x, int64[2] s, bool on) => (float[] y, float[2, 2] z, float[4] o, int64[2] b) {
        r = ReduceSum(x, s) y = Relu(r) z = Reshape(x, s) f = Flatten<axis = 0>(x) b = Add(s, big)
        o = If(on)<then_branch = t () => (float[4] p) { h = ReduceMax(x, s) p = Reshape(h, four) },
                   else_branch = e () => (float[4] q) { q = ReduceMin<keepdims = 0>(x, first) }> }""",
        big=np.array([1 << 40, 0]),
        first=np.array([0]),
        four=np.array([4]),
    )
    for node in walk(model):
        if node.op_type == "ReduceMax":
            node.metadata_props.update({"optkit.module": "head.max", "optkit.source": "net.py:7"})
    with pytest.raises(ModelError) as found:
        _lower(model, tmp_path)
    text = str(found.value)
    for part in (
        "3 nodes do not fit",
        "(ReduceSum): the axes of a reduction are computed at run time",
        "(ReduceMax: head.max, net.py:7): the axes of a reduction",
        "(Add): the constant 'big' holds integers beyond 32 bits",
    ):
        assert part in text, text


ENDLESS = """g (float[4] x, bool on) => (float[4] y) <bool yes = {1}> {
  y = Loop(%s, on, x)<body = b (int64 i, bool c, float[4] v) => (bool d, float[4] w) { %s w = Add(v, v) }> }"""


@pytest.mark.parametrize("condition", ["d = Identity(c)", "e = Identity(yes) d = Identity(e)"])
def test_a_loop_without_an_end_is_refused(condition):
    backend = BACKENDS.get("coreml")()
    with pytest.raises(UnsupportedOpError, match="neither a count nor a condition that changes"):
        legalize(parse(HEAD + ENDLESS % ("", condition)), backend, PHONE, name="model")
    # Not so where data may end it.
    legalize(
        parse(HEAD + ENDLESS % ("", "s = ReduceMax<keepdims = 0>(v) z = Abs(s) d = Less(s, z)")),
        backend,
        PHONE,
        name="model",
    )


def test_the_evaluator_ends_a_loop_whose_condition_never_fails(tmp_path, monkeypatch):
    from optkit.backends.coreml.reference import machine

    monkeypatch.setattr(machine, "_ROUNDS", 10)
    text = ENDLESS % ("", "s = ReduceMax<keepdims = 0>(v) z = Abs(s) d = LessOrEqual(s, z)")
    with (
        _lower(parse(HEAD + text), tmp_path) as session,
        pytest.raises(ModelError, match="goes on after 10 rounds"),
    ):
        session.run({"x": np.ones(4, np.float32), "on": np.array(True)})


MISSING = """
import json, sys
class Missing:
    def find_spec(self, name, *_):
        if name == "coremltools":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
from optkit.backends import BACKENDS
from optkit.errors import BackendUnavailableError
try:
    BACKENDS["coreml"]
except BackendUnavailableError as error:
    print(json.dumps([str(error), error.hint, error.exit_code]))
"""


def test_without_the_package_it_is_refused_with_what_to_install():
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=False)
    said = [
        "backend 'coreml' needs the package 'coremltools', which is not installed",
        "pip install 'optkit[coreml]'",
        4,
    ]
    assert json.loads(done.stdout) == said, done.stderr


@pytest.mark.parametrize(
    ("domain", "name"),
    [("", "ConvInteger"), ("", "DynamicQuantizeLinear"), ("com.microsoft", "DynamicQuantizeLSTM")],
)
def test_integers_with_scales_of_each_run_are_refused_with_what_to_do(domain, name):
    from optkit.backends.coreml.lower import CoreMl

    node = ir.node(name, [], domain=domain)
    said = CoreMl().unsupported(node, PHONE)
    assert said is not None and "computed in each run" in said and "compile the model in float" in said


@pytest.mark.parametrize(
    ("given", "inputs", "message"),
    [
        ("", "b, s", "asks for no boxes"),
        ("", "b, s, none", "asks for no boxes"),
        (", float t", "b, s, most, t", "its iou_threshold is computed"),
        (", float t", "b, s, most, half, t", "its score_threshold is computed"),
    ],
)
def test_boxes_that_core_ml_cannot_choose_so_are_refused(given, inputs, message):
    text = f"""g (float[1, 8, 4] b, float[1, 1, 8] s{given}) => (int64[n, 3] y) <int64 most = {{5}}, int64 none = {{0}}, float half = {{0.5}}> {{
      y = NonMaxSuppression({inputs}) }}"""
    with pytest.raises(UnsupportedOpError, match=message):
        legalize(parse(HEAD + text), BACKENDS.get("coreml")(), PHONE, name="model")


def test_a_loop_that_collects_values_as_often_as_data_say_is_refused():
    model = parse(
        HEAD
        + """g (float[4] x, int64 times) => (float[4] y, float[n, 4] z) <bool on = {1}> {
        y, z = Loop(times, on, x)<body = b (int64 i, bool c, float[4] v) => (bool d, float[4] w, float[4] s) {
          d = Identity(c) w = Add(v, v) s = Neg(v) }> }"""
    )
    with pytest.raises(
        UnsupportedOpError, match="no tensors that grow, and how many steps it has depends on data"
    ):
        legalize(model, BACKENDS.get("coreml")(), PHONE, name="model")


def test_a_loop_that_collects_values_until_data_end_it_is_refused(tmp_path):
    model = parse(
        HEAD
        + """g (float[4] x) => (float[4] y, float[n, 4] z) <bool on = {1}, int64 times = {9}, float most = {40}> {
        y, z = Loop(times, on, x)<body = b (int64 i, bool c, float[4] v) => (bool d, float[4] w, float[4] s) {
          w = Add(v, v) s = Neg(v) m = ReduceMax<keepdims = 0>(w) d = Less(m, most) }> }"""
    )
    with pytest.raises(ModelError, match="how many steps it has depends on data"):
        _lower(model, tmp_path)


def test_a_loop_whose_values_change_their_rank_is_refused():
    model = parse(
        HEAD
        + """g (float x, int64 times) => (float[M] y) <bool on = {1}> {
        y = Loop(times, on, x)<body = b (int64 i, bool c, float v) => (bool d, float[3] w) <float[3] z = {1, 2, 3}> {
          d = Identity(c) w = Neg(z) }> }"""
    )
    with pytest.raises(
        UnsupportedOpError, match="carries 'v' with 0 axes into its first step and 1 into the next"
    ):
        legalize(model, BACKENDS.get("coreml")(), PHONE, name="model")


def test_a_loop_whose_values_change_their_rank_while_it_runs_is_refused(tmp_path):
    """What it carries out says how many axes it has, and a file need not declare it right."""
    model = parse(
        HEAD
        + """g (float x) => (float y) <int64 times = {2}, bool on = {1}, int64[1] zeroth = {0}> {
        y = Loop(times, on, x)<body = b (int64 i, bool c, float v) => (bool d, float w) { d = Identity(c) w = Unsqueeze(v, zeroth) }> }"""
    )
    with pytest.raises((ModelError, UnsupportedOpError), match="carries 'v' with 0 axes"):
        _lower(model, tmp_path)


def _kinds(folder: Path) -> set[str]:
    from optkit.backends.coreml.reference.program import Package

    block = Package(folder / "model.mlpackage").functions["main"].block
    return {operation.kind for operation in block.operations}


SCAN = """g (float[4] x, float[%s, 4] u) => (float[4] y, float[%s, 4] z) {
    y, z = Scan<num_scan_inputs = 1, body = b (float[4] v, float[4] a) => (float[4] w, float[4] s) { w = Add(v, a) s = Neg(w) }>(x, u) }"""


def test_a_scan_whose_steps_are_not_known_gives_no_booleans(tmp_path):
    graph = """g (float[4] x, float[T, 4] u) => (float[4] y, bool[T, 4] z) {
      y, z = Scan<num_scan_inputs = 1, body = b (float[4] v, float[4] a) => (float[4] w, bool[4] s) { w = Add(v, a) s = Less(w, v) }>(x, u) }"""
    with pytest.raises(
        ModelError, match="how many steps it has is not fixed, and 1 of what they give are booleans"
    ):
        _lower(parse(HEAD + graph), tmp_path / "free")


def test_a_scan_is_written_out_where_its_steps_are_few(tmp_path):
    model = parse(HEAD + SCAN % ("T", "T"))
    with _lower(model, tmp_path / "fixed", shapes={"T": 3}) as session:
        feeds = {"x": np.ones(4, np.float32), "u": np.arange(12, dtype=np.float32).reshape(3, 4)}
        found = session.run(feeds)
    np.testing.assert_array_equal(found["y"], 1 + feeds["u"].sum(0))
    np.testing.assert_array_equal(found["z"], -1 - np.cumsum(feeds["u"], 0))
    assert "while_loop" not in _kinds(tmp_path / "fixed")
    with _lower(model, tmp_path / "long", shapes={"T": 1025}) as session:
        feeds = {"x": np.ones(4, np.float32), "u": np.ones((1025, 4), np.float32)}
        np.testing.assert_array_equal(session.run(feeds)["z"], -1 - np.cumsum(feeds["u"], 0))
    assert "while_loop" in _kinds(tmp_path / "long")


def test_compile_ends_in_a_report_that_claims_no_run_on_apple_hardware(tmp_path, capsys):
    batches = [{"x": np.random.default_rng(i).normal(size=(2, 16, 8)).astype(np.float32)} for i in range(8)]
    artifact, report = optkit.compile(
        _linear(),
        target="iphone15",
        data=batches,
        out=tmp_path / "out",
        recipe="coreml-fp16",
    )
    evidence = artifact.manifest.evidence
    assert evidence.emitted and evidence.inspected and evidence.executed_cpu
    assert not (evidence.compiled or evidence.ran_on_device or evidence.timed_on_device)
    assert report.latency is None
    assert any("not executed on Apple hardware" in step for step in artifact.manifest.deferred)
    assert artifact.manifest.achieved.formats.keys() == {"fp16"}
    options = Recipe.load(tmp_path / "out" / "recipe.yaml").options
    assert options["usual"] == {"x": [2, 16, 8]}

    assert main(["bench", str(tmp_path / "out"), "--runs", "5"]) == 2
    assert "no measure of its speed there" in capsys.readouterr().err
    y = optkit.load(tmp_path / "out").run(batches[0])["y"]
    assert y.shape == (2, 16, 4)


def test_the_command_line_compiles_and_coremltools_prints_nothing(tmp_path):
    import onnx

    onnx.save(ir.to_proto(_linear()), tmp_path / "m.onnx")
    command = [sys.executable, "-m", "optkit", "compile", "m.onnx", "--target", "iphone15", "--recipe", "coreml-fp32", "--json", "--set",
               "options.shapes={batch: 1, n: 16}", "-o", "out"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["manifest"]["backend"] == "coreml"
    assert not any(word in done.stderr.lower() for word in ("coremltools", "libcoreml", "warning", "%|"))
    assert (tmp_path / "out" / "model.mlpackage" / "Manifest.json").is_file()


def test_coremltools_says_nothing_about_values_that_it_computes(tmp_path, caplog):
    text = "g (float[4, 5] x) => (float[3, 5] y) <int64 axis = {0}, int64[3] v = {0, 0, 1}> { i = CumSum(v, axis) y = Gather(x, i) }"
    _lower(parse(f'<ir_version: 10, opset_import: ["" : 21]> {text}'), tmp_path).close()
    assert not caplog.records


def test_a_broken_artifact_is_refused(tmp_path):
    _lower(_linear(), tmp_path).close()
    backend = BACKENDS.get("coreml")()
    (tmp_path / "interface.json").write_text("{}")
    with pytest.raises(ModelError, match="the artifact's description of its inputs cannot be read"):
        backend.load(tmp_path, PHONE, backend.options())


@pytest.mark.parametrize(
    "name", ["iphone12", "iphone15", "iphone17", "ipad-m4", "mac-m1", "mac-m5", "apple-ane"]
)
def test_apple_targets_say_what_they_can_and_where_that_is_from(name):
    import coremltools

    row = target(name)
    assert row.backends == ("coreml",) and row.system == "iOS18" and row.source and not row.runs_here
    assert "fp16" in row.formats
    # What coremltools writes for the system is what the row says that it reads.
    assert row.specification == getattr(coremltools.target, row.system).value
    assert row.compute_units == ("Neural Engine", "GPU", "CPU") and "'Set the Compute Units'" in row.source


def test_the_command_lists_system_file_format_and_units_of_apples_targets(capsys):
    assert main(["targets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    wanted = {"system": "iOS18", "specification": 9, "compute_units": ["Neural Engine", "GPU", "CPU"]}
    assert wanted.items() <= rows["iphone15"].items() and wanted.items() <= rows["apple-ane"].items()
    assert not any(rows["cpu"][key] for key in wanted)
    assert main(["targets"]) == 0
    (line,) = (li for li in capsys.readouterr().out.splitlines() if li.startswith("mac-m1 "))
    assert "iOS18, format 9" in line and "Neural Engine, GPU, CPU" in line


@pytest.mark.parametrize(
    "asked",
    [{"recipe": "coreml-fp32"}, {"precision": "fp32"}, {"overrides": ["options.precision=fp32"]}],
)
def test_the_neural_engine_computes_in_float16_alone(asked, tmp_path):
    with pytest.raises(UsageError, match="apple-ane: the Neural Engine computes in float16"):
        optkit.compile(_linear(), target="apple-ane", out=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_float16_that_is_asked_for_by_name_is_core_mls_own(tmp_path):
    """The usual recipe casts parts of the graph, and leaves norms and softmax to units that compute in float32."""
    asked = request(_linear(), target="apple-ane", precision="fp16", out=tmp_path / "out")
    assert asked.recipe.backend == "coreml" and asked.recipe.options["precision"] == "fp16"
    assert "linear-to-convolution" in [p.name for p in asked.recipe.passes]


@pytest.mark.parametrize("where", ["apple-ane", "iphone15"])
def test_a_precision_that_core_ml_has_no_recipe_for_is_refused_and_not_advised(where, tmp_path):
    with pytest.raises(UsageError, match="'int8-dyn': no recipe makes it for coreml") as refused:
        request(_linear(), target=where, precision="int8-dyn", out=tmp_path / "out")
    assert "coreml-w8" in str(refused.value.hint)
    with pytest.raises(DataError) as needed:
        request(_linear(), target=where, precision="int8", out=tmp_path / "out")
    assert "int8-dyn" not in str(needed.value.hint)


def test_integers_for_the_neural_engine_need_data_whatever_its_floor_is(tmp_path):
    recipe = {"recipe": 1, "candidates": ["fp32", "coreml-int8"]}
    with pytest.raises(DataError, match="coreml-int8 needs calibration data"):
        optkit.compile(_linear(), target="apple-ane", recipe=recipe, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("recipe", "shipped"), [("auto", "coreml-fp16"), ("coreml-palette4", "float"), ("coreml-fp16", "recipe")]
)
def test_what_ships_for_the_neural_engine_where_nothing_keeps_the_limits_is_float16(
    recipe, shipped, tmp_path
):
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    model = parse(
        HEAD + "g (float[1, 64] x) => (float[1, 64] y) { h = MatMul(x, w) y = Sigmoid(h) }", w=weight
    )
    overrides = ["limits.min_cosine=1", "repair=false"]
    artifact, report = optkit.compile(
        model, target="apple-ane", recipe=recipe, overrides=overrides, out=tmp_path / "out"
    )
    assert artifact.manifest.options["precision"] == "fp16"
    assert [c.name for c in report.candidates if c.verdict == "shipped"] == [shipped]
    assert any("cosine" in reason for reason in report.missed)


BY_SIZE = """g (float[1, N] x) => (float[P, Q] y) <int64 one = {1}, int64 last = {1}> {
    s = Shape(x) n = Gather(s, last) c = Equal(n, one)
    y = If(c) <then_branch = t () => (float u) { u = Squeeze(x) }, else_branch = e () => (float[1, K] v) { v = Neg(x) }> }"""


def test_branches_of_different_rank_are_taken_by_sizes_that_are_fixed(tmp_path):
    model = parse(HEAD + BY_SIZE)
    with _lower(model, tmp_path / "fixed", shapes={"N": 3}) as session:
        x = np.array([[1, 2, 3]], np.float32)
        np.testing.assert_array_equal(session.run({"x": x})["y"], -x)
    with pytest.raises(ModelError, match="different rank, and the sizes leave open which it is"):
        _lower(model, tmp_path / "free")


def test_packages_are_written_and_run_where_torch_is_not_installed(tmp_path):
    """coremltools imports it where it finds it; that of a process which finds none is enough."""
    save(_linear(), tmp_path / "m.onnx")
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import optkit
artifact, _ = optkit.compile(sys.argv[1], target="iphone15", recipe="coreml-fp32", out=sys.argv[2])
assert "torch" not in sys.modules
assert artifact.manifest.fidelity.cosine > 0.99999, artifact.manifest.fidelity
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.onnx"), str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
