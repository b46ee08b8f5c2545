""".aimodel programs: numbers against ONNX Runtime, what is read back from them, and what is refused and how."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import onnx_ir as ir
import pytest

import optkit
from optkit.backends import BACKENDS
from optkit.cli import main
from optkit.cost import costs
from optkit.data import CalibrationData
from optkit.errors import DataError, ModelError, UnsupportedOpError, UsageError
from optkit.legalize import legalize
from optkit.passes.base import Context
from optkit.passes.quantization.static import QuantizeStatic
from optkit.passes.quantization.weights import QuantizeWeights
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.store import save
from optkit.targets import target
from optkit.testing import parse, random_feeds

pytestmark = pytest.mark.needs("coreai_onnx")

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\ng '
APPLE = target("coreai")
MOBILE = (
    HEAD
    + """(float[N, 3, 16, 16] x) => (float[N, 5] y) <int64[2] flat = {0, -1}, float zero = {0}, float six = {6}> {
  [stem] a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]>(x, w0, b0)
  b = Clip(a, zero, six)
  [depthwise] c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 16>(b, w1, b1)
  d = HardSwish(c)
  [point] e = Conv<kernel_shape = [1, 1]>(d, w2, b2)
  f = Add(b, e)
  p = GlobalAveragePool(f)
  r = Reshape(p, flat)
  [head] m = Gemm(r, w3, b3)
  y = Softmax(m)
}
"""
)
_SHAPES = {
    "w0": (16, 3, 3, 3), "b0": (16,), "w1": (16, 1, 3, 3), "b1": (16,), "w2": (16, 16, 1, 1), "b2": (16,), "w3": (16, 5), "b3": (5,),
}  # fmt: skip


def _mobile() -> ir.Model:
    random = np.random.default_rng(0)
    arrays = {
        n: random.normal(size=s).astype(np.float32) / math.sqrt(math.prod(s[1:])) for n, s in _SHAPES.items()
    }
    return parse(MOBILE, **arrays)


def _lower(model, folder, **options):
    backend = BACKENDS.get("coreai")()
    chosen = backend.options.model_validate(options)
    legalize(model, backend, APPLE, name="model")
    folder.mkdir(exist_ok=True)
    backend.lower(model, APPLE, chosen, folder)
    return backend, chosen


def _run(model, folder, feeds, **options):
    backend, chosen = _lower(model, folder, **options)
    with backend.load(folder, APPLE, chosen) as session:
        return session.run(feeds)


@pytest.mark.parametrize("size", [1, 3])
def test_a_network_computes_what_onnx_runtime_computes(tmp_path, size):
    feeds = random_feeds(_mobile(), size=size)
    found = _run(_mobile(), tmp_path / "a", feeds, shapes={"N": size})
    np.testing.assert_allclose(found["y"], ReferenceSession(_mobile()).run(feeds)["y"], rtol=1e-4, atol=1e-6)


def test_two_builds_are_the_same_bytes_without_places_or_times(tmp_path):
    for name in ("one", "two"):
        _lower(_mobile(), tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 4
    for file in files:
        content = (tmp_path / "one" / file).read_bytes()
        assert content == (tmp_path / "two" / file).read_bytes()
        assert str(tmp_path).encode() not in content


def test_weights_in_int8_stay_so_in_the_file_and_give_the_numbers_of_the_graph(tmp_path):
    w = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    model = parse(HEAD + "(float[4, 256] x) => (float[4, 256] y) { [product] y = MatMul(x, w) }", w=w)
    _lower(model.clone(), tmp_path / "fp32")
    QuantizeWeights(bits=8).run(model, Context(target=APPLE))
    feeds = random_feeds(model)
    found = _run(model.clone(), tmp_path / "w8", feeds)

    def size(name):
        return sum(f.stat().st_size for f in (tmp_path / name).rglob("*") if f.is_file())

    assert size("fp32") > w.nbytes > 3 * size("w8")
    np.testing.assert_allclose(
        found["y"], ReferenceSession(model, optimize=False).run(feeds)["y"], rtol=1e-4, atol=1e-4
    )


def test_half_precision_is_read_back_by_products(tmp_path):
    model = _mobile()
    half = [p for p in Recipe.load("coreai-fp16").passes if p.name == "cast"]
    run_passes(model, half, Context(target=APPLE))
    backend, chosen = _lower(model, tmp_path / "a")
    feeds = random_feeds(_mobile(), size=1)
    executed = backend.executed(tmp_path / "a", APPLE, chosen, feeds)
    assert {e.format for e in executed if e.macs} == {"fp16"}
    with backend.load(tmp_path / "a", APPLE, chosen) as session:
        found = session.run(feeds)["y"]
    np.testing.assert_allclose(found, ReferenceSession(_mobile()).run(feeds)["y"], atol=5e-3)


def test_products_have_the_multiply_accumulates_of_the_graph(tmp_path):
    backend, chosen = _lower(_mobile(), tmp_path / "a")
    feeds = random_feeds(_mobile(), size=1)
    executed = backend.executed(tmp_path / "a", APPLE, chosen, feeds)
    fixed = parse(
        MOBILE.replace("float[N, 3", "float[1, 3"), **{n: np.zeros(s, np.float32) for n, s in _SHAPES.items()}
    )
    wanted = [c.macs for c in costs(fixed).nodes.values() if c.macs]
    assert sorted(e.macs for e in executed if e.macs) == sorted(wanted)


def test_biases_on_the_grid_of_the_products_become_floats(tmp_path):
    model = _mobile()
    data = CalibrationData([random_feeds(model, size=1, seed=seed) for seed in range(4)])
    placements = BACKENDS.get("onnxruntime")().placements
    QuantizeStatic(placement="default").run(model, Context(target=APPLE, data=data, placements=placements))
    assert any(v.dtype == ir.DataType.INT32 for v in model.graph.initializers.values())
    feeds = random_feeds(model, size=1, seed=9)
    found = _run(model.clone(), tmp_path / "a", feeds)
    expected = ReferenceSession(model, optimize=False).run(feeds)["y"]
    # A sum next to the border of a step may fall to the other side.
    np.testing.assert_allclose(found["y"], expected, atol=0.02)


def test_types_of_64_bits_are_the_callers_and_what_does_not_fit_is_refused(tmp_path):
    model = parse(
        HEAD + "(int64[2] i, double[2] x) => (int64[2] j, double[2] y) { j = Add(i, i) y = Mul(x, x) }"
    )
    backend, chosen = _lower(model, tmp_path / "a")
    with backend.load(tmp_path / "a", APPLE, chosen) as session:
        assert [s.dtype for s in (*session.inputs, *session.outputs)] == [np.int64, np.float64] * 2
        found = session.run({"i": np.array([3, -4]), "x": np.array([0.5, 3.0])})
        assert found["j"].dtype == np.int64 and found["j"].tolist() == [6, -8]
        assert found["y"].dtype == np.float64 and found["y"].tolist() == [0.25, 9.0]
        with pytest.raises(DataError, match="'i' holds numbers that need 64 bits, and Core AI has 32"):
            session.run({"i": np.array([1 << 40, 0]), "x": np.zeros(2)})


def test_inputs_that_do_not_fit_are_refused(tmp_path):
    backend, chosen = _lower(_mobile(), tmp_path / "a")
    x = random_feeds(_mobile(), size=1)["x"]
    with backend.load(tmp_path / "a", APPLE, chosen) as session:
        assert session.takes({"x": x}) and not session.takes({"x": np.concatenate([x, x])})
        with pytest.raises(DataError, match="the inputs are x; given: z"):
            session.run({"z": x})
        with pytest.raises(DataError, match="input 'x' is float64, the model takes float32"):
            session.run({"x": x.astype(np.float64)})
        with pytest.raises(DataError, match=r"x \[2, 3, 16, 16\]: the program was made for \[1, 3, 16, 16\]"):
            session.run({"x": np.concatenate([x, x])})


def test_results_stay_what_they_were_and_a_running_loop_is_no_obstacle(tmp_path):
    backend, chosen = _lower(_mobile(), tmp_path / "a")
    first, second = (random_feeds(_mobile(), size=1, seed=seed) for seed in (0, 1))

    async def notebook():
        with backend.load(tmp_path / "a", APPLE, chosen) as session:
            found = session.run(first)["y"]
            kept = found.copy()
            assert not np.array_equal(session.run(second)["y"], kept)
            np.testing.assert_array_equal(found, kept)
            np.testing.assert_array_equal(session.run(first)["y"], kept)

    asyncio.run(notebook())


def test_what_cannot_be_translated_is_listed_before_anything_is_written(tmp_path):
    model = parse(HEAD + "(float[4] x) => (float[4] y) { [odd] y = Bernoulli(x) }")
    with pytest.raises(UnsupportedOpError, match=r"odd.*coreai-onnx has no translation of Bernoulli"):
        _lower(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_size_that_is_open_is_named(tmp_path):
    model = parse(HEAD + "(float[N, T] x) => (float[N, T] y) { y = Relu(x) }")
    with pytest.raises(UsageError, match="every axis needs a size, and T may have any"):
        _lower(model, tmp_path / "a")


def test_a_file_that_is_damaged_is_an_error_that_names_it(tmp_path):
    backend, chosen = _lower(_mobile(), tmp_path / "a")
    for file in (tmp_path / "a" / "model.aimodel").iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"model\.aimodel: Core AI cannot load it"):
        backend.load(tmp_path / "a", APPLE, chosen)


def test_every_command_says_that_it_is_experimental(tmp_path, capfd):
    save(_mobile(), tmp_path / "model.onnx")
    out, judge = str(tmp_path / "out"), tmp_path / "judge.py"
    judge.write_text("""
import numpy as np
def samples():
    yield {"x": np.zeros((1, 3, 16, 16), np.float32)}, 1
def score(outputs, label):
    return label
""")
    model = str(tmp_path / "model.onnx")
    assert main(["compile", model, "-t", "coreai", "-r", "coreai-fp32", "-o", out]) == 0
    capfd.readouterr()
    for asked in (
        ["compile", model, "-t", "coreai", "--dry-run"], ["compile", model, "-t", "coreai", "--dry-run", "--json"],
        ["inspect", out], ["inspect", out, "--json"], ["eval", out, "--eval", str(judge)], ["eval", out, "--eval", str(judge), "--json"],
        ["diff", out, "--against", model, "--shape", "x=1x3x16x16"], ["diff", out, "--against", model, "--shape", "x=1x3x16x16", "--json"],
        ["bench", out], ["finalize", out], ["finalize", out, "--json"], ["plan", model, "-t", "coreai", "--shape", "x=1x3x16x16"], ["targets"],
        ["compile", model, "-t", "coreai", "-r", "coreai-fp32", "-o", out, "--json"],
    ):  # fmt: skip
        main(asked)
        said = capfd.readouterr()
        assert "experimental" in (said.out if "--json" in asked else said.out + said.err), asked
    assert "for coreai (experimental)" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_compile_says_that_it_is_experimental_and_claims_no_run_on_apple_hardware(tmp_path, capfd):
    save(_mobile(), tmp_path / "model.onnx")
    out = tmp_path / "out"
    assert main(["compile", str(tmp_path / "model.onnx"), "-t", "coreai", "-o", str(out)]) == 0
    said = capfd.readouterr()
    assert "Core AI is experimental here" in said.out + said.err
    assert "for coreai (experimental)" in said.out + said.err
    assert "not on Apple hardware" in said.out + said.err
    assert "ODIE" not in said.out + said.err
    artifact = optkit.load(out)
    evidence = artifact.manifest.evidence
    assert evidence.emitted and evidence.inspected and evidence.executed_cpu
    assert not (evidence.compiled or evidence.ran_on_device or evidence.timed_on_device)
    assert artifact.run(random_feeds(_mobile(), size=1))["y"].shape == (1, 5)
    assert main(["bench", str(out), "--runs", "5"]) == 2
    assert "no measure of its speed there" in capfd.readouterr().err
    assert main(["finalize", str(out)]) == 2
    assert "xcrun coreai-build" in capfd.readouterr().err
