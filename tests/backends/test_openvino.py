from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import optkit
from optkit.backends import BACKENDS
from optkit.backends.openvino.cache import folder as cache_folder
from optkit.backends.openvino.kernels import available, layers
from optkit.backends.openvino.messages import refused
from optkit.backends.openvino.placement import PLACEMENTS
from optkit.backends.openvino.profile import read_runtime, runtime_nodes
from optkit.data import CalibrationData
from optkit.errors import BackendUnavailableError, DataError, ModelError, UnsupportedOpError
from optkit.graph import constant, walk
from optkit.ops import OPS
from optkit.passes.base import Context
from optkit.passes.quantization.static import QuantizeStatic
from optkit.recipe import Recipe, shipped
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.targets.host import features
from optkit.testing import parse, random_feeds

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
CPU = target("cpu")
needs_openvino = pytest.mark.needs("openvino")

# The blocks of mobile networks: a convolution, a depthwise one, one of 1x1, an addition around them, a linear layer.
MOBILE = (
    HEAD
    + """g (float[N, 3, 16, 16] x) => (float[N, 5] y) <int64[2] flat = {0, -1}> {
  a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w0, b0)
  b = Clip(a, zero, six)
  c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 16>(b, w1, b1)
  d = HardSwish(c)
  e = Conv<kernel_shape = [1, 1]>(d, w2, b2)
  f = Add(b, e)
  p = GlobalAveragePool(f)
  r = Reshape(p, flat)
  m = MatMul(r, w3)
  y = Softmax(m)
}
"""
)


def _mobile() -> ir.Model:
    random = np.random.default_rng(0)
    shapes = {
        "w0": (16, 3, 3, 3),
        "b0": (16,),
        "w1": (16, 1, 3, 3),
        "b1": (16,),
        "w2": (16, 16, 1, 1),
        "b2": (16,),
        "w3": (16, 5),
    }
    weights = {k: random.normal(size=s).astype(np.float32) * 0.4 for k, s in shapes.items()}
    return parse(MOBILE, **weights, zero=np.float32(0), six=np.float32(6))


def _quantized(model: ir.Model, placement: str) -> ir.Model:
    data = CalibrationData([random_feeds(model, size=1, seed=seed) for seed in range(4)])
    after = model.clone()
    QuantizeStatic(placement=placement).run(after, Context(target=CPU, data=data, placements=PLACEMENTS))
    return after


def _lower(model: ir.Model, path: Path, **options):
    backend = BACKENDS["openvino"]()
    path.mkdir(exist_ok=True)
    chosen = backend.options(**options)
    backend.lower(model, CPU, chosen, path)
    return backend, chosen


def _ops(model: ir.Model) -> list[str]:
    short = {"QuantizeLinear": "Q", "DequantizeLinear": "DQ"}
    weights = {n for n in walk(model) if n.op_type == "DequantizeLinear" and n.inputs[0].is_initializer()}
    return [short.get(n.op_type, n.op_type) for n in walk(model) if n not in weights]


# Without the package


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_row_of_every_placement_names_a_known_operator(placement):
    assert PLACEMENTS[placement].name == placement
    for op, row in PLACEMENTS[placement].rows.items():
        assert op == row.op
        assert op in OPS
        assert row.role != "compute" or OPS[op].weight is not None
        assert all(OPS[name].activation for name in row.absorbs - {"Swish"})


MISSING = """
import json, sys
sys.modules["openvino"] = None
import onnx_ir as ir
import optkit
from optkit.backends import BACKENDS
from optkit.errors import BackendUnavailableError
said = []
for ask in (
    lambda: BACKENDS["openvino"],
    lambda: optkit.compile(ir.load(sys.argv[1]), recipe="openvino-fp32", out=sys.argv[2]),
):
    try:
        ask()
    except BackendUnavailableError as error:
        said.append([str(error), error.hint, error.exit_code])
recipe = {"recipe": 1, "candidates": ["fp32", "openvino-fp32", "openvino-bf16"]}
_, report = optkit.compile(ir.load(sys.argv[1]), recipe=recipe, out=sys.argv[2])
print(json.dumps([said, {c.name: [c.verdict, c.reason] for c in report.candidates}, report.manifest.backend]))
"""


def test_without_the_package_it_is_refused_with_what_to_install_and_auto_lists_it_without_a_warning(tmp_path):
    ir.save(_mobile(), tmp_path / "model.onnx")
    command = [sys.executable, "-c", MISSING, str(tmp_path / "model.onnx"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, verdicts, backend = json.loads(done.stdout)
    message, hint = (
        "backend 'openvino' needs the package 'openvino', which is not installed",
        "pip install 'optkit[openvino]'",
    )
    assert said == [[message, hint, 4]] * 2
    assert verdicts["openvino-fp32"] == verdicts["openvino-bf16"] == ["unavailable", f"{message}: {hint}"]
    assert backend == "onnxruntime"
    assert done.stderr == ""


def _batches() -> list[dict[str, np.ndarray]]:
    return [random_feeds(_mobile(), size=2, seed=seed) for seed in range(6)]


@pytest.mark.parametrize("name", [n for n in shipped() if n.startswith("openvino")])
def test_its_recipes_name_it_and_its_own_placements(name):
    recipe = Recipe.load(name)
    assert recipe.backend == "openvino"
    assert all(p.placement in PLACEMENTS for p in recipe.passes if isinstance(p, QuantizeStatic))


@pytest.mark.parametrize("placement", ["default", "conv"])
def test_grids_that_are_nearly_as_far_on_both_sides_of_zero_have_no_zero_point_to_make_up_for(placement):
    model = _mobile()
    x = random_feeds(model, size=4)["x"]
    after = model.clone()
    data = CalibrationData([{"x": np.clip(x, -1.9, 2).astype(np.float32)}])
    QuantizeStatic(placement=placement).run(after, Context(target=CPU, data=data, placements=PLACEMENTS))
    first = next(n for n in walk(after) if n.op_type == "QuantizeLinear")
    assert first.inputs[0].name == "x"
    assert int(constant(first.inputs[2])) == 128


def test_pairs_lie_between_the_layers_or_in_front_of_them_alone():
    assert _ops(_quantized(_mobile(), "conv")) == (
        [
            "Q",
            "DQ",
            "Conv",
            "Clip",
            "Q",
            "DQ",
            "Conv",
            "HardSwish",
            "Q",
            "DQ",
            "Conv",
            "Add",
            "GlobalAveragePool",
            "Reshape",
            "Q",
            "DQ",
            "MatMul",
            "Softmax",
        ]
    )
    assert _ops(_quantized(_mobile(), "default")) == (
        [
            "Q",
            "DQ",
            "Conv",
            "Clip",
            "Q",
            "DQ",
            "Conv",
            "HardSwish",
            "Q",
            "DQ",
            "Conv",
            "Add",
            "Q",
            "DQ",
            "GlobalAveragePool",
            "Q",
            "DQ",
            "Reshape",
            "Q",
            "DQ",
            "MatMul",
            "Softmax",
        ]
    )
    assert _ops(_quantized(_mobile(), "linear"))[-5:] == ["Reshape", "Q", "DQ", "MatMul", "Softmax"]


RESIDUAL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[1, 4, 8, 8] x) => (%s)
<float[4, 4, 3, 3] w, float[4] b>
{ [first] a = Conv<pads = [1, 1, 1, 1]>(x, w, b)
  [first_relu] r = Relu(a)
  [second] c = Conv<pads = [1, 1, 1, 1]>(r, w, b)
  %s
  [relu] t = Relu(s)
  [last] y = Conv<pads = [1, 1, 1, 1]>(t, w, b) }
"""
_Y = "float[1, 4, 8, 8] y"


def _residual(body: str, outputs: str = _Y) -> ir.Model:
    random = np.random.default_rng(0)
    weights = {
        "w": random.normal(size=(4, 4, 3, 3)).astype(np.float32), "b": random.normal(size=4).astype(np.float32)
    }  # fmt: skip
    return parse(RESIDUAL % (outputs, body), **weights)


def _unpaired(model: ir.Model) -> set[str]:
    """Operands of the sum that no pair lies in front of, by the node that makes them."""
    add = next(n for n in model.graph if n.op_type == "Add")
    makers = [v.producer() for v in add.inputs]
    return {str(n.name) for n in makers if n is not None and n.op_type != "DequantizeLinear"}


@pytest.mark.parametrize(
    ("body", "unpaired"),
    [
        ("[add] s = Add(c, r)", {"second"}),
        ("[add] s = Add(r, c)", {"second"}),
        ("[short] d = Conv<pads = [1, 1, 1, 1]>(x, w, b)  [add] s = Add(c, d)", {"short"}),
    ],
)
def test_the_convolution_made_last_adds_what_the_other_branch_stored(body, unpaired):
    assert _unpaired(_quantized(_residual(body), "default")) == unpaired


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("[act] e = Relu(c)  [add] s = Add(e, r)", _Y),
        ("[add] s = Add(c, c)", _Y),
        ("[add] s = Add(c, r)", f"{_Y}, float[1, 4, 8, 8] c"),
        ("[add] s = Add(c, r)  [other] z = Conv<pads = [1, 1, 1, 1]>(c, w, b)", f"{_Y}, float[1, 4, 8, 8] z"),
    ],
)
def test_a_sum_of_what_is_stored_anyway_has_a_pair_before_each_operand(body, outputs):
    assert _unpaired(_quantized(_residual(body, outputs), "default")) == set()


def test_what_no_quantized_layer_reads_stays_float():
    after = _quantized(_residual("[add] u = Add(c, r)  [sine] s = Sin(u)"), "default")
    assert _ops(after) == [
        "Q",
        "DQ",
        "Conv",
        "Relu",
        "Q",
        "DQ",
        "Conv",
        "Add",
        "Sin",
        "Relu",
        "Q",
        "DQ",
        "Conv",
    ]


JOINED = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y)
<float[4, 4, 3, 3] w, float[4] b, float[4, %d, 1, 1] last, int64[2] sizes = {2, 2}, float[4, 2, 1, 1] v>
{ a = Conv<pads = [1, 1, 1, 1]>(x, w, b)
  %s
  y = Conv(t, last) }
"""


def _joined(body: str, channels: int) -> ir.Model:
    random = np.random.default_rng(0)
    shapes = {"w": (4, 4, 3, 3), "b": (4,), "last": (4, channels, 1, 1), "v": (4, 2, 1, 1)}
    weights = {k: random.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    return parse(JOINED % (channels, body), **weights)


def _grids(model: ir.Model) -> dict[str, tuple[float, int]]:
    """Scale and zero point behind each value that has a pair."""
    pairs = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    return {
        str(n.inputs[0].name): (float(n.inputs[1].const_value.numpy()), int(n.inputs[2].const_value.numpy())) for n in pairs
    }  # fmt: skip


def test_what_a_concatenation_joins_lies_on_the_widest_grid_and_goes_on_without_a_pair():
    body = "r = Relu(a)  d = Conv<pads = [1, 1, 1, 1]>(r, w, b)  t = Concat<axis = 1>(r, d)"
    after = _quantized(_joined(body, 8), "default")
    grids = _grids(after)
    assert set(grids) == {"x", "r", "d"}
    # r is not negative and d is: neither alone has this zero point.
    assert grids["r"] == grids["d"] != grids["x"]
    assert grids["r"][1] > 0
    alone = _grids(_quantized(_joined("r = Relu(a)  t = Concat<axis = 1>(r, r)", 8), "default"))
    assert alone["r"][1] == 0


def test_concatenations_that_have_an_operand_in_common_have_one_grid():
    body = """
    p, q = Split<axis = 1>(a, sizes)
    d = Conv(q, v)
    s = Concat<axis = 1>(p, d)
    e = Conv(q, v)
    t = Concat<axis = 1>(s, e)
    """
    grids = _grids(_quantized(_joined(body, 10), "default"))
    assert grids["a"] == grids["p"] == grids["q"] == grids["d"] == grids["e"]
    assert {"s", "t"}.isdisjoint(grids)


def test_a_concatenation_with_something_that_is_not_stored_as_integers_stays_in_float():
    after = _quantized(_joined("d = Sin(a)  t = Concat<axis = 1>(a, d)", 8), "default")
    assert set(_grids(after)) == {"x", "t"}


def test_biases_stay_in_float_where_the_placement_says_so():
    after = _quantized(_residual("[add] s = Add(c, r)"), "default")
    assert {str(n.inputs[2].name) for n in after.graph if n.op_type == "Conv"} == {"b"}
    assert "int32" not in {str(v.dtype).lower() for v in after.graph.initializers.values()}


SWISH = (
    HEAD
    + """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y%s) {
  a = Conv(x, w)
  s = Sigmoid(a)
  b = Mul(%s)
  m = MaxPool<kernel_shape = [1, 1]>(b)
  y = Conv(m, v)%s
}
"""
)


@pytest.mark.parametrize(
    ("more", "operands", "end", "whole"),
    [
        ("", "a, s", "", True),
        ("", "s, a", "", True),
        ("", "a, a", "", False),
        (", float[1, 4, 8, 8] s", "a, s", "", False),
        (", float[1, 4, 8, 8] a", "a, s", "", False),
        (", float[1, 4, 8, 8] z", "a, s", "\n z = Relu(a)", False),
        (", float[1, 4, 8, 8] z", "a, s", "\n z = Relu(s)", False),
    ],
)
def test_the_pair_of_a_swish_written_out_is_behind_it_where_nothing_else_reads_its_parts(
    more, operands, end, whole
):
    w = np.random.default_rng(0).normal(size=(4, 4, 1, 1)).astype(np.float32)
    after = _quantized(parse(SWISH % (more, operands, end), w=w, v=w), "default")
    pool = next(n for n in after.graph if n.op_type == "MaxPool")
    assert (pool.inputs[0].producer().op_type == "DequantizeLinear") == whole


def test_the_front_ends_refusals_are_read_with_their_nodes():
    message = """Check 'false' failed at src/x.cpp:151:
FrontEnd API failed with OpConversionFailure:
Model wasn't fully converted. Failed operations detailed log:
-- Conv-16 with a message:
While validating ONNX node '<Node(Conv): /decoder/2>': Check 'rank' failed at src/conv.cpp:38:
FrontEnd API failed with GeneralFailure:
The input data tensor's rank has to be known (static)

-- Loop-14 with a message:
Check '(a >= b)' failed at src/loop.cpp:310:
While validating ONNX node '<Node(Loop): gru.0>':
The provided loop body has 18 inputs

Summary:
-- Conversion is failed for: Conv-16, Loop-14
"""
    assert refused(message) == [
        ("/decoder/2 (Conv)", "The input data tensor's rank has to be known (static)"),
        ("gru.0 (Loop)", "The provided loop body has 18 inputs"),
    ]
    unknown = "Summary:\n-- No conversion rule found for operations: Det-21, a.b.Mine-1"
    assert [node for node, _ in refused(unknown)] == ["Det", "a.b.Mine"]
    assert refused("Model file broken.xml cannot be opened!") == []


def test_the_runtime_graph_gives_formats_by_products():
    nodes = [
        {"name": "w", "layerType": "Const", "runtimePrecision": "i8", "execTimeMcs": "not_executed"},
        {"name": "c", "layerType": "Convolution", "runtimePrecision": "u8", "execTimeMcs": "20", "originalLayersNames": "c,relu"},
        {"name": "s", "layerType": "Subgraph", "runtimePrecision": "f32", "execTimeMcs": "5", "originalLayersNames": "qk,softmax,"},
        {"name": "e", "layerType": "Eltwise", "runtimePrecision": "bf16", "execTimeMcs": "not_executed"},
    ]  # fmt: skip
    found = read_runtime(nodes, {"c": 100, "qk": 7, "av": 8})
    assert [(e.op, e.format, e.macs) for e in found] == [
        ("Convolution", "int8", 100),
        ("Subgraph", "fp32", 15),
    ]
    assert found[0].seconds == pytest.approx(20e-6)


def test_only_finished_artifacts_are_cached_and_each_content_has_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "cache"))
    path, files = tmp_path / "artifact", ("model.xml", "model.bin")
    path.mkdir()
    for name in files:
        (path / name).write_bytes(b"1")
    assert cache_folder(path, files, "here") is None
    listed = [{"path": name, "sha256": "0"} for name in files]
    (path / "manifest.json").write_text(json.dumps({"files": listed}))
    first = cache_folder(path, files, "here")
    assert first is not None
    assert first.parent == tmp_path / "cache" / "openvino"
    assert cache_folder(path, files, "here") == first
    assert cache_folder(path, files, "elsewhere") != first
    (path / "model.bin").write_bytes(b"22")
    assert cache_folder(path, files, "here") != first
    (path / "manifest.json").write_text("broken")
    assert cache_folder(path, files, "here") is None


def test_what_was_not_used_for_longest_leaves_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("optkit.backends.openvino.cache._MOST", 2)
    path = tmp_path / "artifact"
    path.mkdir()
    (path / "m").write_bytes(b"1")
    (path / "manifest.json").write_text(json.dumps({"files": [{"path": "m", "sha256": "0"}]}))
    folders = [cache_folder(path, ("m",), str(machine)) for machine in range(4)]
    assert [f.is_dir() for f in folders] == [False, False, True, True]


# With it


@needs_openvino
@pytest.mark.parametrize("size", [1, 3])
def test_float_artifacts_compute_what_onnx_runtime_computes(tmp_path, size):
    model = _mobile()
    backend, options = _lower(model, tmp_path)
    feeds = random_feeds(model, size=size)
    with backend.load(tmp_path, CPU, options, threads=1) as session:
        assert [(s.name, s.dtype, s.shape) for s in session.inputs] == [("x", np.float32, (None, 3, 16, 16))]
        found = session.run(feeds)
    # Sums of up to 144 products of numbers around 1, each rounded to 6e-8.
    np.testing.assert_allclose(found["y"], ReferenceSession(model).run(feeds)["y"], rtol=1e-4, atol=1e-5)


@needs_openvino
@pytest.mark.parametrize("placement", ["default", "conv"])
def test_all_convolutions_run_in_int8_also_depthwise_ones(tmp_path, placement):
    model = _quantized(_mobile(), placement)
    backend, options = _lower(model, tmp_path)
    feeds = random_feeds(model, size=2)
    executed = backend.executed(tmp_path, CPU, options, feeds)
    products = {e.name: e for e in executed if e.macs}
    # 16x16 pixels: 27 products for each of 16 channels, 9 (depthwise), 16; a linear layer of 16x5; batch 2.
    assert sorted(e.macs for e in products.values()) == sorted(
        [2 * 256 * 16 * 27, 2 * 256 * 16 * 9, 2 * 256 * 16 * 16, 2 * 16 * 5]
    )
    assert {e.format for e in products.values() if e.op == "Convolution"} == {"int8"}
    with backend.load(tmp_path, CPU, options, threads=1) as session:
        found = session.run(feeds)["y"]
    exact = ReferenceSession(_mobile()).run(feeds)["y"]
    # Four layers of 8 bits, each off by less than a percent of its range.
    assert np.abs(found - exact).max() < 0.1


def _kernels(folder: Path, options) -> tuple[set[str], np.ndarray]:
    """Of all convolutions but depthwise ones; and the output."""
    backend = BACKENDS.get("openvino")()
    feeds = random_feeds(_mobile(), size=2)
    with backend.load(folder, CPU, options, threads=1) as session:
        found = session.run(feeds)["y"]
        nodes = runtime_nodes(session.compiled)
    names = {n["primitiveType"] for n in nodes if n["layerType"] == "Convolution"}
    return {n for n in names if "_dw" not in n}, found


@needs_openvino
@pytest.mark.skipif(not available(features()), reason="the processor has no kernels beside OpenVINO's choice")
@pytest.mark.parametrize("usual", [None, {"x": (2, 3, 16, 16)}])
@pytest.mark.parametrize("kernel", available(features()))
def test_other_kernels_of_convolutions_compute_the_same(tmp_path, usual, kernel):
    model = _quantized(_mobile(), "conv")
    backend, options = _lower(model, tmp_path)
    names = layers(tmp_path / "model.xml")
    assert len(names) == 2
    other = options.model_copy(update={"shapes": usual, "kernels": dict.fromkeys(names, kernel)})
    usual_kernels, expected = _kernels(tmp_path, options)
    assert all("brg" in n for n in usual_kernels)
    kernels, found = _kernels(tmp_path, other)
    # Too few channels for AMX: OpenVINO's choice stands.
    assert kernels and all(n.startswith((kernel, "brg") if "amx" in kernel else kernel) for n in kernels)
    np.testing.assert_array_equal(found, expected)
    feeds = random_feeds(_mobile(), size=2)
    assert {e.format for e in backend.executed(tmp_path, CPU, other, feeds) if e.macs} == {
        e.format for e in backend.executed(tmp_path, CPU, options, feeds) if e.macs
    }


@needs_openvino
@pytest.mark.skipif(not available(features()), reason="the processor has no kernels beside OpenVINO's choice")
def test_counters_of_layers_name_the_kernels_of_every_convolution(tmp_path, monkeypatch):
    backend, options = _lower(_quantized(_mobile(), "conv"), tmp_path)
    seen = []

    def planted(names, families, measure):
        seen.extend([set(names), measure({}), measure(dict.fromkeys(names, "jit_avx512"))])
        return [{names[0]: "jit_avx512"}]

    monkeypatch.setattr("optkit.backends.openvino.lower.fastest", planted)
    feeds = [random_feeds(_mobile(), size=2, seed=k) for k in range(2)]
    (found,) = backend.variants(_mobile(), CPU, options, tmp_path, feeds)
    names, usual, other = seen
    assert names <= usual.keys() & other.keys()
    assert all(usual[n].seconds > 0 and "brg" in usual[n].kernel for n in names)
    assert {other[n].kernel.split("_1x1")[0].rsplit("_", 1)[0] for n in names} <= {"jit_avx512", "jit"}
    assert list(found.kernels.values()) == ["jit_avx512"]
    # What is chosen stays.
    assert not backend.variants(_mobile(), CPU, found, tmp_path, feeds)


@needs_openvino
def test_kernels_are_not_timed_for_a_graph_without_convolutions(tmp_path, monkeypatch):
    model = parse(HEAD + "g (float[N] x) => (float[N] y) { y = Relu(x) }")
    backend, options = _lower(model, tmp_path)
    monkeypatch.setattr("optkit.backends.openvino.lower.times", lambda *_: pytest.fail("timed"))
    assert not backend.variants(model, CPU, options, tmp_path, [{"x": np.ones(2, np.float32)}])


@needs_openvino
def test_with_chosen_kernels_too_a_broken_file_is_a_clear_error(tmp_path):
    backend, options = _lower(_mobile(), tmp_path)
    (tmp_path / "model.xml").write_text("<net")
    with pytest.raises(ModelError, match=r"model\.xml: is not XML"):
        backend.load(tmp_path, CPU, options.model_copy(update={"kernels": {"c": "jit_avx512"}}), threads=1)


@needs_openvino
def test_weights_stay_integers_in_the_file(tmp_path):
    w = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    model = parse(HEAD + "g (float[N, 256] x) => (float[N, 256] y) { y = MatMul(x, w) }", w=w)
    _lower(model, tmp_path / "f32")
    _lower(_quantized(model, "linear"), tmp_path / "int8")
    assert (tmp_path / "f32/model.bin").stat().st_size == pytest.approx(w.nbytes, rel=0.01)
    assert (tmp_path / "int8/model.bin").stat().st_size < w.nbytes / 4 * 1.05


@needs_openvino
def test_the_same_model_gives_the_same_bytes_without_places_or_times(tmp_path):
    for name in ("one", "another"):
        _lower(_quantized(_mobile(), "conv"), tmp_path / name)
    for file in ("model.xml", "model.bin"):
        first = (tmp_path / "one" / file).read_bytes()
        assert first == (tmp_path / "another" / file).read_bytes()
        assert str(tmp_path).encode() not in first
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["model.bin", "model.xml"]


@needs_openvino
def test_what_it_cannot_read_is_an_error_that_names_the_node(tmp_path):
    model = parse(HEAD + "g (float[N, 3, 3] x) => (float[N] y) { a = Relu(x)\n [volume] y = Det(a) }")
    with pytest.raises(UnsupportedOpError, match="OpenVINO cannot read the graph") as caught:
        _lower(model, tmp_path)
    assert caught.value.problems[0][0] == "volume (Det)"


@needs_openvino
def test_a_conversion_that_dies_takes_nothing_with_it(tmp_path, monkeypatch):
    crash = "import os; os.kill(os.getpid(), 11)"
    monkeypatch.setattr("optkit.backends.openvino.convert._CHILD", crash)
    with pytest.raises(ModelError, match=r"the process in which OpenVINO converts died .SIGSEGV."):
        _lower(_mobile(), tmp_path)


@needs_openvino
def test_inner_shapes_that_do_not_fit_are_an_error_and_not_the_answer_of_the_call_before(tmp_path):
    # 9 numbers cannot become rows of 24: the plugin reports success, computes nothing and overwrites memory.
    model = parse(
        HEAD
        + """g (float[N, M] x) => (float[A, B, 24] y) <int64[3] s = {1, -1, 24}> {
  a = Relu(x)
  r = Reshape(a, s)
  y = Add(r, r)
}
"""
    )
    backend, options = _lower(model, tmp_path)
    with backend.load(tmp_path, CPU, options, threads=1) as session:
        first = session.run({"x": np.ones((3, 24), np.float32)})["y"]
        with pytest.raises(
            ModelError, match=r"x .1, 9. does not fit inside the model: .*do not evenly divide"
        ):
            session.run({"x": np.ones((1, 9), np.float32)})
        np.testing.assert_array_equal(session.run({"x": np.ones((3, 24), np.float32)})["y"], first)


@needs_openvino
def test_outputs_may_be_empty_equal_to_inputs_or_constant(tmp_path):
    model = parse(
        HEAD
        + """g (float[N] x, bool[N] k) => (int64[1, K] y, float[N] same, float[2] c, bool[N] not_k) <float[2] c = {5, 6}> {
  y = NonZero(x)
  same = Identity(x)
  not_k = Not(k)
}
"""
    )
    backend, options = _lower(model, tmp_path)
    with backend.load(tmp_path, CPU, options, threads=1) as session:
        for x in (np.ones(4, np.float32), np.zeros(3, np.float32), np.ones(4, np.float32)):
            kept = x.copy()
            found = session.run({"x": x, "k": x > 0})
            assert found["y"].shape == (1, int(x.sum()))
            np.testing.assert_array_equal(found["same"], kept)
            np.testing.assert_array_equal(x, kept)
            np.testing.assert_array_equal(found["c"], [5, 6])
            np.testing.assert_array_equal(found["not_k"], x == 0)
            assert found["not_k"].dtype == np.bool_


@needs_openvino
def test_names_stay_where_casts_to_float16_and_back_are_nothing_to_it(tmp_path):
    model = parse(
        HEAD
        + """g (float[N] x) => (float[N] y, float[N] a_twin, float16[N] h) {
  a = Cast<to = 10>(x)
  h = Relu(a)
  y = Cast<to = 1>(h)
  a_twin = Identity(y)
}
"""
    )
    backend, options = _lower(model, tmp_path)
    with backend.load(tmp_path, CPU, options, threads=1) as session:
        found = session.run({"x": np.asarray([1, -1], np.float32)})
    assert {k: (v.tolist(), v.dtype.name) for k, v in found.items()} == {
        "y": ([1, 0], "float32"),
        "a_twin": ([1, 0], "float32"),
        "h": ([1, 0], "float16"),
    }


@needs_openvino
def test_bytes_that_happen_to_be_the_mark_are_no_error(tmp_path):
    model = parse(HEAD + "g (uint8[N] x) => (uint8[N] y) { y = Identity(x) }")
    backend, options = _lower(model, tmp_path)
    with backend.load(tmp_path, CPU, options, threads=1) as session:
        for value in (0xA5, 0x5A, 0xA5):
            x = np.full(3, value, np.uint8)
            np.testing.assert_array_equal(session.run({"x": x})["y"], x)


@needs_openvino
def test_inputs_of_other_types_or_names_are_refused_and_read_only_or_transposed_ones_taken(tmp_path):
    model = parse(HEAD + "g (float[N, M] x) => (float[N, M] y) { y = Relu(x) }")
    backend, options = _lower(model, tmp_path)
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    frozen = x.copy()
    frozen.flags.writeable = False
    with backend.load(tmp_path, CPU, options, threads=1) as session:
        with pytest.raises(DataError, match="input 'x' is float64, the model takes float32"):
            session.run({"x": x.astype(np.float64)})
        with pytest.raises(DataError, match="the inputs are x; given: z"):
            session.run({"z": x})
        for given in (x.T, frozen, x[:0], x[::2]):
            np.testing.assert_array_equal(session.run({"x": given})["y"], given)


@needs_openvino
@pytest.mark.parametrize("size", [8, 1 << 17], ids=["copied", "shared"])
@pytest.mark.parametrize("kind", ["float", "bfloat16", "bool"])
def test_arrays_of_fixed_sizes_stay_the_callers_and_results_what_they_were(tmp_path, kind, size):
    model = parse(HEAD + f"g ({kind}[{size}] x) => ({kind}[{size}] y) {{ y = Identity(x) }}")
    backend, options = _lower(model, tmp_path)
    dtype = {"float": np.float32, "bfloat16": ml_dtypes.bfloat16, "bool": np.bool_}[kind]
    drawn = np.random.default_rng(0).standard_normal((3, size)) > 0
    given = [row.astype(dtype) for row in drawn]
    with backend.load(tmp_path, CPU, options, threads=1) as session:
        found = []
        for x in given:
            fed = x.copy()
            found.append(session.run({"x": fed})["y"])
            fed[...] = 0
        read_only = given[0].copy()
        read_only.flags.writeable = False
        found.append(session.run({"x": read_only})["y"])
        # What is made contiguous for a run must live as long as the run.
        for _ in range(8):
            strided = np.repeat(given[1], 2)[::2]
            found.append(session.run({"x": strided})["y"])
    for y, x in zip(found, [*given, given[0], *[given[1]] * 8], strict=True):
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, x)


@needs_openvino
def test_bfloat16_goes_in_and_comes_out(tmp_path):
    model = parse(HEAD + "g (bfloat16[N] x) => (bfloat16[N] y) { y = Add(x, x) }")
    backend, options = _lower(model, tmp_path)
    x = np.asarray([1, -2.5, 3], ml_dtypes.bfloat16)
    with backend.load(tmp_path, CPU, options, threads=1) as session:
        found = session.run({"x": x})["y"]
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found.astype(np.float32), x.astype(np.float32) * 2)


@needs_openvino
def test_functions_are_written_out(tmp_path):
    model = parse(
        """<ir_version: 10, opset_import: ["" : 21, "optkit" : 1]>
g (float[N] x) => (float[N] y) { y = optkit.twice(x) }
<opset_import: ["" : 21], domain: "optkit">
twice (a) => (b) { b = Add(a, a) }
"""
    )
    backend, options = _lower(model, tmp_path)
    with backend.load(tmp_path, CPU, options, threads=1) as session:
        np.testing.assert_array_equal(session.run({"x": np.ones(2, np.float32)})["y"], [2, 2])
    assert len(model.functions) == 1


@needs_openvino
def test_float32_is_what_it_computes_in_unless_asked_otherwise(tmp_path):
    model = _mobile()
    backend, options = _lower(model, tmp_path)
    executed = backend.executed(tmp_path, CPU, options, random_feeds(model, size=1))
    assert {e.format for e in executed if e.macs} == {"fp32"}
    assert backend.exact(options) == options
    half = backend.options(precision="bf16")
    assert backend.exact(half) == options


@needs_openvino
def test_bfloat16_is_lossy_and_held_to_the_limits(tmp_path):
    from optkit.backends.openvino.quiet import core

    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 instructions")
    _, report = optkit.compile(
        _mobile(),
        recipe="openvino-bf16",
        data=_batches(),
        overrides=["limits.min_cosine=1", "limits.min_speedup=0"],
        out=tmp_path / "out",
    )
    assert [c.name for c in report.candidates] == ["recipe", "float"]
    assert report.manifest.options["precision"] == "f32"
    assert report.missed


@needs_openvino
@pytest.mark.parametrize("name", ["x86-vnni", "arm64-dot"])
def test_bfloat16_is_refused_for_a_target_without_it_whatever_this_processor_has(tmp_path, name):
    backend = BACKENDS["openvino"]()
    with pytest.raises(BackendUnavailableError, match=f"{name} has no bfloat16 instructions"):
        backend.lower(_mobile(), target(name), backend.options(precision="bf16"), tmp_path)


@needs_openvino
def test_what_int8_leaves_in_float_runs_in_bfloat16_where_that_is_asked_for(tmp_path):
    from optkit.backends.openvino.quiet import core

    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 instructions")
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    text = "g (float[32, 64] x, float[64, 32] y) => (float[32, 32] z) { a = MatMul(x, w) z = MatMul(a, y) }"
    model = _quantized(parse(HEAD + text, w=weight), "default")
    for precision, rest in (("f32", "fp32"), ("bf16", "bf16")):
        backend, options = _lower(model, tmp_path / precision, precision=precision)
        executed = backend.executed(tmp_path / precision, CPU, options, random_feeds(model, size=1))
        assert sorted(e.format for e in executed if e.macs) == sorted(["int8", rest])


@needs_openvino
def test_compile_for_it_writes_an_artifact_that_loads_from_the_cache_the_second_time(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "cache"))
    artifact, report = optkit.compile(
        _mobile(),
        backend="openvino",
        precision="int8",
        data=_batches(),
        overrides=["limits.min_speedup=0"],
        out=tmp_path / "out",
    )
    manifest = report.manifest
    assert manifest.backend == "openvino"
    assert "openvino" in manifest.versions
    assert {f.path for f in manifest.files} == {"model.xml", "model.bin", "recipe.yaml"}
    assert not any("onnxruntime" in c.name for c in report.candidates)
    assert not (tmp_path / "cache" / "openvino").exists()
    feeds = _batches()[0]
    expected = artifact.run(feeds)["y"]
    blobs = list((tmp_path / "cache" / "openvino").rglob("*.blob"))
    assert len(blobs) == 1
    with optkit.load(tmp_path / "out").session() as session:
        assert session.compiled.get_property("LOADED_FROM_CACHE")
        np.testing.assert_array_equal(session.run(feeds)["y"], expected)
    # A file that was cut short is compiled again.
    blobs[0].write_bytes(blobs[0].read_bytes()[:1000])
    np.testing.assert_array_equal(optkit.load(tmp_path / "out").run(feeds)["y"], expected)


@needs_openvino
def test_a_session_answers_several_threads(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    model = _mobile()
    backend, options = _lower(model, tmp_path)
    batches = [random_feeds(model, size=1, seed=seed) for seed in range(8)]
    with backend.load(tmp_path, CPU, options, threads=1) as session, ThreadPoolExecutor(4) as pool:
        expected = [session.run(b)["y"] for b in batches]
        for found, wanted in zip(pool.map(session.run, batches), expected, strict=True):
            np.testing.assert_allclose(found["y"], wanted, rtol=1e-5)


QUIET = """
import socket, subprocess, sys, os
def refuse(*a, **k): raise SystemExit("a process or connection was asked for")
subprocess.Popen = os.fork = os.posix_spawn = socket.socket.connect = refuse
import multiprocessing.process
multiprocessing.process.BaseProcess.start = refuse
from optkit.backends import BACKENDS
backend = BACKENDS["openvino"]()
assert backend.available() is None
from optkit.backends.openvino.quiet import ov
import openvino.tools.ovc.telemetry_utils as told
assert told.tm.__name__ == "openvino.tools.ovc.telemetry_stub", told.tm
print("quiet")
"""


@needs_openvino
def test_nothing_is_sent_and_no_process_started_when_openvino_is_imported(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", QUIET],
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PATH": ""},
        check=False,
    )
    assert done.stdout.strip() == "quiet", done.stderr
    assert list(tmp_path.iterdir()) == []


@needs_openvino
def test_usual_shapes_have_a_model_of_their_own_and_others_run_all_the_same(tmp_path):
    model = _mobile()
    backend, options = _lower(model, tmp_path, shapes={"x": (2, 3, 16, 16)})
    reference = ReferenceSession(model)
    with backend.load(tmp_path, CPU, options, threads=1) as session:
        assert session.compiled.inputs[0].partial_shape.is_static
        assert session.inputs[0].shape[0] is None
        for size in (2, 1, 2, 3):
            feeds = {"x": random_feeds(model, size=size, seed=size)["x"]}
            np.testing.assert_allclose(
                session.run(feeds)["y"], reference.run(feeds)["y"], rtol=1e-4, atol=1e-5
            )
        with pytest.raises(DataError, match="'x' is"):
            session.run({"x": np.zeros((2, 3, 16), np.float32)})


@needs_openvino
@pytest.mark.parametrize(("sizes", "usual"), [((2, 2, 2, 1), (2, 3, 16, 16)), ((1, 2, 3, 4), None)])
def test_what_most_batches_look_like_is_the_usual_shape(tmp_path, sizes, usual):
    batches = [random_feeds(_mobile(), size=size, seed=i) for i, size in enumerate(sizes)]
    artifact, _ = optkit.compile(
        _mobile(), recipe="openvino-fp32", data=[*batches, batches[0]], overrides=["limits.min_speedup=0"], out=tmp_path / "o"
    )  # fmt: skip
    found = artifact.manifest.options["shapes"]
    assert found == (None if usual is None else {"x": list(usual)})
    assert Recipe.load(tmp_path / "o" / "recipe.yaml").options["shapes"] == found


@needs_openvino
def test_blocks_of_weights_in_four_bits_may_have_negative_scales(tmp_path):
    random = np.random.default_rng(0)
    model = parse(
        HEAD + "g (float[N, 256] x) => (float[N, 128] y) { y = MatMul(x, w) }",
        w=random.normal(size=(256, 128)).astype(np.float32),
    )
    (found,) = (p for p in Recipe.load("openvino-w4").passes if p.name == "quantize-weights")
    found.run(model, Context(target=CPU))
    q, scale = (model.graph.initializers[n].const_value.numpy() for n in ("w/q", "w/scale"))
    assert (scale < 0).any() and (scale > 0).any()
    x = random.normal(size=(3, 256)).astype(np.float32)
    exact = x.astype(np.float64) @ (q.astype(np.float64) * np.repeat(scale, 32, 0))
    backend, options = _lower(model, tmp_path / "out")
    with backend.load(tmp_path / "out", CPU, options, threads=1) as session:
        y = session.run({"x": x})["y"]
    assert np.abs(y - exact).max() < 1e-5 * np.abs(exact).max()
