"""Weights in Core ML's own small forms: the numbers that ONNX Runtime makes of the same graph, and the bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import optkit
from optkit.backends import BACKENDS
from optkit.data import CalibrationData
from optkit.errors import UnsupportedOpError
from optkit.graph import walk
from optkit.legalize import legalize
from optkit.passes.base import Context
from optkit.passes.quantization.palette import PalettizeWeights
from optkit.passes.quantization.weights import QuantizeWeights
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse, random_feeds

pytestmark = pytest.mark.needs("coremltools")

PHONE = target("iphone15")
# A table, a linear layer in each spelling, a convolution of 1x1 and a wide one.
GRAPH = """<ir_version: 10, opset_import: ["" : 21]>
g (int64[N, 9] i) => (float[N, 64] y) <int64[1] last = {-1}, int64[1] two = {2}> {
  e = Gather(table, i)
  a = MatMul(e, w)
  t = Transpose<perm = [0, 2, 1]>(a)
  c = Conv<kernel_shape = [1]>(t, k)
  d = Conv<kernel_shape = [3]>(c, u)
  r = ReduceMean<keepdims = 0>(d, two)
  y = Gemm<transB = 1>(r, g)
}"""
SHAPES = {"table": (96, 64), "w": (64, 64), "k": (64, 64, 1), "u": (64, 64, 3), "g": (64, 64)}
FLOATS = 4 * sum(int(np.prod(s)) for s in SHAPES.values())


def _model(share: float = 0.0) -> ir.Model:
    random = np.random.default_rng(0)
    weights = {}
    for name, shape in SHAPES.items():
        array = random.normal(size=shape).astype(np.float32) / 8
        weights[name] = np.where(random.random(shape) < share, np.float32(0), array)
    return parse(GRAPH, **weights)


def _check(model: ir.Model, folder: Path, rtol: float = 1e-4, **options) -> tuple[int, set[str]]:
    """The package gives ONNX Runtime's numbers; bytes of its weights and the kinds of its operations."""
    from optkit.backends.coreml.reference.program import Package

    backend = BACKENDS.get("coreml")()
    chosen = backend.options.model_validate(options)
    backend.lower(model, PHONE, chosen, folder)
    feeds = random_feeds(model)
    expected = ReferenceSession(model, optimize=False).run(feeds)["y"]
    with backend.load(folder, PHONE, chosen) as session:
        np.testing.assert_allclose(session.run(feeds)["y"], expected, rtol=rtol, atol=rtol / 10)
    package = folder / "model.mlpackage"
    kinds = {o.kind for o in Package(package).functions["main"].block.operations}
    return (package / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size, kinds


@pytest.mark.parametrize(
    ("pass_", "share", "kind"),
    [
        (QuantizeWeights(bits=8), 0.28, "constexpr_blockwise_shift_scale"),
        (QuantizeWeights(bits=4, block=32), 0.25, "constexpr_blockwise_shift_scale"),
        (PalettizeWeights(bits=4), 0.14, "constexpr_lut_to_dense"),
        (PalettizeWeights(bits=4, group=16), 0.15, "constexpr_lut_to_dense"),
        (PalettizeWeights(bits=3, group=16), 0.12, "constexpr_lut_to_dense"),
        (PalettizeWeights(bits=2), 0.08, "constexpr_lut_to_dense"),
        (PalettizeWeights(bits=4, group=16, scaled=True), 0.17, "constexpr_blockwise_shift_scale"),
        (QuantizeWeights(bits=4, block=48, least=24), 0.25, "constexpr_blockwise_shift_scale"),
    ],
)
def test_compressed_weights_are_small_in_the_file_and_exact(pass_, share, kind, tmp_path):
    model = _model()
    assert len(pass_.run(model, Context(target=PHONE))) == 5
    size, kinds = _check(model, tmp_path)
    assert kind in kinds
    assert size < share * FLOATS
    assert "gather" in kinds


@pytest.mark.parametrize(
    "pass_",
    [
        QuantizeWeights(bits=8),
        QuantizeWeights(bits=4, block=32),
        PalettizeWeights(bits=6),
        PalettizeWeights(bits=4, group=16),
        PalettizeWeights(bits=4, group=16, scaled=True),
    ],
)
def test_weights_of_transposed_convolutions_are_compressed_too(pass_, tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[1, 64, 5, 5] x) => (float[1, 64, 10, 10] y) { y = ConvTranspose<strides = [2, 2]>(x, w) }"""
    weight = np.random.default_rng(0).normal(size=(64, 64, 2, 2)).astype(np.float32) / 8
    model = parse(text, w=weight)
    assert len(pass_.run(model, Context(target=PHONE))) == 1
    legalize(model, BACKENDS.get("coreml")(), PHONE, name="model")
    size, kinds = _check(model, tmp_path)
    assert size < 0.3 * weight.nbytes and "conv_transpose" in kinds


@pytest.mark.parametrize(
    ("pass_", "kind"),
    [
        (None, "constexpr_sparse_to_dense"),
        (QuantizeWeights(bits=8), "constexpr_sparse_blockwise_shift_scale"),
        (PalettizeWeights(bits=4), "constexpr_lut_to_sparse"),
    ],
)
def test_zeros_are_not_stored(pass_, kind, tmp_path):
    model, full = _model(share=0.7), _model()
    (tmp_path / "full").mkdir()
    for graph in (model, full):
        if pass_ is not None:
            pass_.run(graph, Context(target=PHONE))
    (tmp_path / "sparse").mkdir()
    size, kinds = _check(model, tmp_path / "sparse")
    dense, _ = _check(full, tmp_path / "full")
    assert kind in kinds
    assert size < dense * 0.7


def test_scaled_palettes_are_as_large_in_float16_and_as_right(tmp_path):
    model = _model()
    PalettizeWeights(bits=4, group=16, scaled=True).run(model, Context(target=PHONE))
    size, kinds = _check(model, tmp_path, 2e-2, precision="fp16")
    assert size < 0.17 * FLOATS
    assert {"constexpr_lut_to_dense", "constexpr_blockwise_shift_scale"} <= kinds


def test_scales_of_palettes_are_multiplied_in_where_the_system_has_no_form_for_them(tmp_path):
    model = _model()
    PalettizeWeights(bits=4, scaled=True).run(model, Context(target=PHONE))
    size, _ = _check(model, tmp_path, deployment="iOS17")
    assert size >= FLOATS


@pytest.mark.parametrize("pass_", [QuantizeWeights(bits=8), PalettizeWeights(bits=4), None])
def test_ios_16_has_forms_of_its_own(pass_, tmp_path):
    model = _model(share=0.6 if pass_ is None else 0.0)
    if pass_ is not None:
        pass_.run(model, Context(target=PHONE))
    size, kinds = _check(model, tmp_path, deployment="iOS16")
    assert kinds & {"constexpr_affine_dequantize", "constexpr_lut_to_dense", "constexpr_sparse_to_dense"}
    assert size < 0.5 * FLOATS


def test_blocks_need_ios_18(tmp_path):
    model = _model()
    QuantizeWeights(bits=4).run(model, Context(target=PHONE))
    backend = BACKENDS.get("coreml")()
    with pytest.raises(UnsupportedOpError, match=r"4 unsupported(.|\n)*4 bits need iOS 18"):
        backend.lower(model, PHONE, backend.options.model_validate({"deployment": "iOS17"}), tmp_path)


@pytest.mark.parametrize("recipe", ["int8-static", "int8-static-linear", "int8-static-all"])
def test_recipes_of_int8_for_processors_do_the_same_for_core_ml(recipe, tmp_path):
    """The graph with Q/DQ pairs gives in a package what it gives in ONNX Runtime, which convolutions stay out of or not."""
    from optkit.backends.coreml.lower import CoreMl

    model = _model()
    feeds = [random_feeds(model, seed=seed) for seed in range(4)]
    data = CalibrationData(feeds, name="random").check(model)
    context = Context(target=PHONE, data=data, placements=CoreMl.placements)
    run_passes(model, Recipe.load(recipe).passes, context)
    quantized = {
        node.op_type
        for node in walk(model)
        if (before := node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None)
        is not None
        and before.op_type == "DequantizeLinear"
    }
    assert ("Conv" in quantized) == (recipe != "int8-static-linear")
    assert quantized & {"MatMul", "Gemm"}
    _check(model, tmp_path, rtol=1e-3)


def test_the_report_says_what_the_package_stores(tmp_path):
    """Places in palettes are int32 in the graph and have 4 bits in the file of weights."""
    recipe = {
        "recipe": 1,
        "backend": "coreml",
        "options": {"precision": "fp16"},
        "limits": {"min_cosine": -1},
    }
    passes = [{"palettize-weights": {"bits": 4}}]
    artifact, report = optkit.compile(
        _model(), target="iphone15", recipe={**recipe, "passes": passes}, out=tmp_path / "out"
    )
    stored = report.manifest.achieved.weights
    assert stored["uint4"] == FLOATS // 4 // 2
    assert set(stored) == {"uint4", "float16"}
    file = artifact.folder / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    # Each blob has a record and starts at a multiple of 64 bytes.
    assert sum(stored.values()) <= file.stat().st_size <= sum(stored.values()) + 16 * 128
