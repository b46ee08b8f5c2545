from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from optkit.backends.onnxruntime import OnnxRuntime
from optkit.backends.onnxruntime.lower import OnnxRuntimeOptions
from optkit.errors import DataError, ModelError
from optkit.passes.base import Context
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession, with_outputs
from optkit.targets import target
from optkit.testing import parse

CPU = target("cpu")
TYPES = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 2] x, int64[N] i, bool b) => (float[N, 2] y, int64[N] j, bool c, float16[N, 2] h) {
  y = Neg(x)
  j = Neg(i)
  c = Not(b)
  h = Cast<to = 10>(x)
}
"""
NORM = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[2, 4] x) => (float[2, 4] y) <float[4] s = {1, 1, 1, 1}> { y = LayerNormalization(x, s) }
"""


@pytest.fixture
def lowered(tmp_path):
    OnnxRuntime().lower(parse(TYPES), CPU, OnnxRuntimeOptions(), tmp_path)
    return tmp_path


def _feeds(n=3):
    return {"x": np.ones((n, 2), np.float32), "i": np.arange(n), "b": np.array(True)}


def test_one_place_writes_one_file(lowered):
    assert [p.name for p in lowered.iterdir()] == ["model.onnx"]


def test_a_session_tells_names_types_and_shapes_and_runs(lowered):
    with OnnxRuntime().load(lowered, CPU, OnnxRuntimeOptions(), threads=1) as session:
        assert [str(s) for s in session.inputs] == ["x: float32[N, 2]", "i: int64[N]", "b: bool[]"]
        assert [str(s) for s in session.outputs] == [
            "y: float32[N, 2]",
            "j: int64[N]",
            "c: bool[]",
            "h: float16[N, 2]",
        ]
        found = session.run(_feeds())
        assert list(found) == ["y", "j", "c", "h"]
        assert (found["y"] == -1).all()
        assert found["j"].tolist() == [0, -1, -2]
        assert not found["c"]


@pytest.mark.parametrize(
    "change", [{"x": None}, {"z": np.ones(1)}], ids=["missing", "unknown"]
)  # fmt: skip
def test_feeds_of_other_names_are_refused(lowered, change):
    feeds = {k: v for k, v in {**_feeds(), **change}.items() if v is not None}
    with (
        OnnxRuntime().load(lowered, CPU, OnnxRuntimeOptions(), threads=1) as session,
        pytest.raises(DataError),
    ):
        session.run(feeds)


def test_feeds_that_do_not_fit_end_in_one_line(lowered):
    with OnnxRuntime().load(lowered, CPU, OnnxRuntimeOptions(), threads=1) as session:
        with pytest.raises(ModelError, match="ONNX Runtime stopped: ") as caught:
            session.run({**_feeds(), "x": np.ones((3, 5), np.float32)})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a" * 100])
def test_a_file_that_is_no_model_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        OnnxRuntime().load(tmp_path, CPU, OnnxRuntimeOptions(), threads=1)


@pytest.mark.parametrize(
    "options", [{"thread": 1}, {"threads": -1}, {"prepacking": "often"}, {"accuracy_level": 2}]
)
def test_options_are_checked(options):
    with pytest.raises(ValidationError):
        OnnxRuntimeOptions.model_validate(options)


@pytest.mark.parametrize(("layout", "refused"), [(0, False), (1, True)])
def test_a_batch_that_comes_first_is_refused_with_the_node(layout, refused):
    model = parse(
        f"""<ir_version: 10, opset_import: ["" : 21]>
g (float[5, 2, 3] x) => (y) {{ y = GRU<hidden_size = 4, layout = {layout}>(x, w, r) }}""",
        w=np.zeros((1, 12, 3), np.float32),
        r=np.zeros((1, 12, 4), np.float32),
    )
    (node,) = model.graph
    reason = OnnxRuntime().unsupported(node, target("cpu"))
    assert ("layout 1" in (reason or "")) == refused


def test_a_layer_norm_makes_the_fusion_that_may_slow_it_down_worth_timing(tmp_path):
    backend, options = OnnxRuntime(), OnnxRuntimeOptions()
    assert backend.variants(parse(TYPES), CPU, options, tmp_path, []) == ()
    (variant,) = backend.variants(parse(NORM), CPU, options, tmp_path, [])
    assert variant.disabled_optimizers == ()
    assert backend.variants(parse(NORM), CPU, variant, tmp_path, []) == ()


def test_disabled_optimizers_stay_off(tmp_path):
    """The option reaches ONNX Runtime: Add and LayerNormalization stay two nodes."""
    model = parse("""
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[1, 2, 4] x, float[1, 2, 4] z) => (float[1, 2, 4] y) <float[4] s = {1, 1, 1, 1}, float[4] t = {0, 0, 0, 0}> {
      a = Add(x, z)
      y = LayerNormalization(a, s, t)
    }
    """)
    backend = OnnxRuntime()
    feeds = {k: np.random.default_rng(0).normal(size=(1, 2, 4)).astype(np.float32) for k in "xz"}
    ran = {}
    for options in (OnnxRuntimeOptions(), OnnxRuntimeOptions(disabled_optimizers=())):
        backend.lower(model, CPU, options, tmp_path)
        ran[options.disabled_optimizers] = [e.op for e in backend.executed(tmp_path, CPU, options, feeds)]
    assert ran["SkipLayerNormFusion",] == ["Add", "LayerNormalization"]
    assert ran[()] == ["SkipLayerNormalization"]


def _four_bits(tmp_path, level):
    """A product by weights in 4 bits as ``onnxruntime-w4`` leaves it: kernels and their formats, and the output."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(256, 128)).astype(np.float32)
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, 256] x) => (float[N, 128] y) {\n'
        "m = MatMul(x, w)\ny = Add(m, b)\n}",
        w=weights, b=random.normal(size=128).astype(np.float32),
    )  # fmt: skip
    recipe = Recipe.load("onnxruntime-w4")
    (found,) = (p for p in recipe.passes if p.name == "quantize-weights")
    found.run(model, Context(target=CPU))
    assert isinstance(recipe.options, dict)
    options = OnnxRuntimeOptions.model_validate({**recipe.options, "accuracy_level": level})
    feeds = {"x": random.normal(size=(3, 256)).astype(np.float32)}
    backend = OnnxRuntime()
    backend.lower(model, CPU, options, tmp_path)
    with backend.load(tmp_path, CPU, options, threads=1) as session:
        y = session.run(feeds)["y"]
    ran = {e.op: (e.format, e.macs) for e in backend.executed(tmp_path, CPU, options, feeds) if e.macs}
    # The same integers, multiplied in float64.
    q, scale = (
        i.const_value.numpy() for i in (model.graph.initializers["w/q"], model.graph.initializers["w/scale"])
    )
    exact = feeds["x"].astype(np.float64) @ (q.astype(np.float64) * np.repeat(scale, 32, 0))
    return ran, y, exact + model.graph.initializers["b"].const_value.numpy()


@pytest.mark.parametrize(("level", "error"), [(1, 1e-5), (4, 2e-2)])
def test_products_with_weights_in_four_bits_are_one_kernel_and_keep_them(tmp_path, level, error):
    ran, y, exact = _four_bits(tmp_path, level)
    assert ran == {"MatMulNBits": ("int4", 3 * 256 * 128)}
    worst = np.abs(y - exact).max() / np.abs(exact).max()
    assert worst < error
    # At level 4 the activations are rounded.
    assert (worst > 1e-4) == (level == 4)


# The reference


def test_the_reference_takes_a_graph_and_a_file_alike(lowered):
    graph, file = ReferenceSession(parse(TYPES)), ReferenceSession(lowered / "model.onnx")
    for name, value in graph.run(_feeds()).items():
        assert np.array_equal(file.run(_feeds())[name], value)
    assert graph.inputs == file.inputs == ("x", "i", "b")


def test_inner_values_can_be_asked_for_and_the_graph_stays_as_it_is():
    model = parse("""
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[2] x) => (float[2] y) { a = Exp(x) b = Neg(a) y = Abs(b) }
    """)
    model.graph[0].outputs[0].type = None
    found = ReferenceSession(model, outputs=["b", "x", "a"]).run({"x": np.float32([0, 1])})
    assert list(found) == ["b", "x", "a"]
    assert found["b"].tolist() == (-found["a"]).tolist()
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert with_outputs(model, ["a"]).graph[0].op_type == "Exp"


def test_an_input_without_a_value_is_named():
    with pytest.raises(DataError, match="no value for the input 'i'"):
        ReferenceSession(parse(TYPES)).run({"x": np.ones((1, 2), np.float32)})


def test_lazy_weights_are_evaluated_for_the_session():
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21]>\ng (float[2] x, float[2] w) => (float[2] y) { y = Add(x, w) }'
    )
    weight = model.graph.inputs.pop()
    weight.const_value = ir.LazyTensor(
        lambda: ir.tensor(np.float32([3, 4])), dtype=ir.DataType.FLOAT, shape=ir.Shape([2]), name="w"
    )
    model.graph.register_initializer(weight)
    assert ReferenceSession(model).run({"x": np.zeros(2, np.float32)})["y"].tolist() == [3, 4]
