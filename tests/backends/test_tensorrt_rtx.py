"""Engines that TensorRT-RTX really builds here, and what their plans show."""

from __future__ import annotations

import hashlib
import json

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import optkit
from optkit.backends import BACKENDS
from optkit.backends.tensorrt import plan, rtx
from optkit.backends.tensorrt.verdict import Record
from optkit.errors import ModelError, UnsupportedOpError
from optkit.page import page
from optkit.reference import ReferenceSession
from optkit.store import save
from optkit.targets import target
from optkit.testing import parse

pytestmark = pytest.mark.needs("tensorrt_rtx")

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
NET = (
    HEAD
    + """g (float[N, 3, 16, 16] x) => (float[N, 8] y) <int64[2] flat = {0, -1}> {
  [conv] a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w0, b0)
  [relu] b = Relu(a)
  [point] c = Conv<kernel_shape = [1, 1]>(b, w1)
  [sum] d = Add(b, c)
  [pool] p = GlobalAveragePool(d)
  [flat] r = Reshape(p, flat)
  [head] y = MatMul(r, w2)
}
"""
)


@pytest.fixture(scope="module")
def model() -> ir.Model:
    random = np.random.default_rng(0)
    shapes = {"w0": (16, 3, 3, 3), "b0": (16,), "w1": (16, 16, 1, 1), "w2": (16, 8)}
    return parse(NET, **{k: (random.normal(size=s) * 0.3).astype(np.float32) for k, s in shapes.items()})


@pytest.fixture(scope="module")
def batches() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [{"x": random.normal(size=(4, 3, 16, 16)).astype(np.float32)} for _ in range(6)]


def test_an_engine_that_cannot_be_written_is_no_fault_of_the_compiler(model, tmp_path):
    save(model, tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError, match=r"nowhere/engine\.plan"):
        rtx.build(
            tmp_path / "model.onnx",
            tmp_path / "nowhere" / "engine.plan",
            ["SM89"],
            {"x": [[1, 3, 16, 16]] * 3},
        )


@pytest.mark.parametrize(
    ("name", "recipe", "fmt"),
    [
        ("l4", "fp32", "fp32"),
        ("l4", "tensorrt-fp16", "fp16"),
        ("l4", "tensorrt-int8", "int8"),
        ("rtx4090", "tensorrt-int8-mse", "int8"),
        ("a10", "tensorrt-int8", "int8"),
        ("rtx5090", "tensorrt-int8", "int8"),
        ("l4", "fp8", "fp8"),
        ("rtx5090", "fp8", "fp8"),
    ],
)
def test_an_engine_is_built_and_its_plan_shows_every_product(model, batches, tmp_path, name, recipe, fmt):
    artifact, report = optkit.compile(model, target=name, data=batches, recipe=recipe, out=tmp_path / "out")
    manifest, engine = artifact.manifest, (artifact.folder / "engine.plan").read_bytes()
    assert manifest.achieved.formats == {fmt: 1.0}
    capability = "SM" + "".join(map(str, target(name).capability))
    assert manifest.achieved.placement == {f"TensorRT-RTX plan for {capability}": 1.0}
    done = {k for k, v in manifest.evidence.model_dump().items() if v}
    assert done == {"emitted", "compiled", "inspected", "executed_cpu"}
    record = Record.load(artifact.folder)
    assert record.sha256 == hashlib.sha256(engine).hexdigest() and not record.proxy
    assert set(record.products) == {"conv", "point", "head"} and sum(record.operations.values()) >= 3
    assert manifest.size.after == len(engine)
    assert report.latency is None and "load the engine" in manifest.deferred[0]
    assert json.loads((artifact.folder / "bundle.json").read_text())["runtime"] == "tensorrt_rtx"
    assert manifest.options["mode"] == "rtx-engine" and manifest.mode.startswith("rtx-engine: TensorRT-RTX")
    assert not (artifact.folder / "build_engine.py").exists()


def test_the_same_request_gives_the_same_engine(model, batches, tmp_path):
    files = []
    for name in ("one", "two"):
        artifact, _ = optkit.compile(
            model, target="l4", data=batches, recipe="tensorrt-int8", out=tmp_path / name
        )
        files.append((artifact.folder / "manifest.json").read_bytes())
    assert files[0] == files[1] and b"engine.plan" in files[0]


def test_a_bundle_is_tried_on_another_card_which_is_named(model, batches, tmp_path):
    artifact, report = optkit.compile(
        model, target="h100", data=batches, recipe="tensorrt-int8", out=tmp_path / "out"
    )
    done = {k for k, v in artifact.manifest.evidence.model_dump().items() if v}
    assert done == {"emitted", "executed_cpu", "proxy_compiled"}
    assert set(artifact.manifest.achieved.placement) == {"TensorRT-RTX plan for SM89 (proxy)"}
    assert "as a proxy, TensorRT-RTX" in artifact.manifest.deferred[0]
    assert "SM89 built it" in artifact.manifest.deferred[0]
    assert optkit.sentences.read_back(report) == "as a vendor's compiler built it for another, similar target"
    shown = page(report)
    assert "profile of one run" not in shown and "are shown by: TensorRT-RTX plan for SM89 (proxy)" in shown
    assert not (artifact.folder / "engine.plan").exists() and not list(artifact.folder.glob(".proxy*"))


def test_a_proxy_that_is_not_wanted_is_not_asked(model, batches, tmp_path):
    artifact, _ = optkit.compile(
        model,
        target="h100",
        data=batches,
        recipe="fp32",
        overrides=["options.proxy=false"],
        out=tmp_path / "out",
    )
    assert Record.load(artifact.folder) is None and not artifact.manifest.evidence.proxy_compiled


def test_a_proxy_that_builds_nothing_is_no_evidence_and_its_reason_is_kept(model, batches, tmp_path, caplog):
    # TensorRT-RTX has no float32 products for Turing.
    artifact, _ = optkit.compile(model, target="t4", data=batches, recipe="fp32", out=tmp_path / "out")
    record = Record.load(artifact.folder)
    assert not record.built and "FP32 GEMM is not supported" in record.message
    assert not artifact.manifest.evidence.proxy_compiled and not artifact.manifest.evidence.inspected
    assert set(artifact.manifest.achieved.placement) == {"typed graph"}
    assert "for SM75 built nothing: " in artifact.manifest.deferred[0]
    assert "built nothing for SM75" in caplog.text


def test_nodes_that_the_parser_refuses_are_all_listed(tmp_path):
    text = (
        '<ir_version: 10, opset_import: ["" : 21, "other" : 1]>\n'
        "g (float[4] x) => (float[4] y, float[4] z) { [a] y = other.Thing(x)\n [b] z = other.Thing(y) }"
    )
    graph = parse(text)
    from optkit.backends.tensorrt import rtx
    from optkit.store import save

    save(graph, tmp_path / "model.onnx")
    said = rtx.build(tmp_path / "model.onnx", tmp_path / "engine.plan", ["SM89"], {})
    assert not said.parsed and not said.built
    assert said.refused and said.refused[0][1] == "Thing" and said.refused[0][2]


def test_a_refused_node_is_reported_with_its_place(tmp_path, monkeypatch):

    text = HEAD + "g (float[2, 2] x) => (float y) { [lonely] y = Det(x) }"
    monkeypatch.setattr("optkit.golden.write", lambda *_, **__: 1.0)
    backend = BACKENDS["tensorrt"]()
    with pytest.raises(UnsupportedOpError) as error:
        backend.lower(parse(text), target("l4"), backend.options(), tmp_path)
    assert "lonely" in error.value.problems[0][0]


def test_a_card_that_it_does_not_compile_for_is_said_to_be(model, tmp_path):
    from optkit.backends.tensorrt import rtx
    from optkit.store import save

    save(model, tmp_path / "model.onnx")
    shapes = {"x": [[1, 3, 16, 16]] * 3}
    said = rtx.build(tmp_path / "model.onnx", tmp_path / "engine.plan", ["SM90"], shapes)
    assert not said.built and "does not build for SM90" in said.message


FP8 = (
    HEAD
    + """g (float[16, 32] x) => (float[16, 16] y) {
  [q] q = QuantizeLinear(x, s, z)
  [d] d = DequantizeLinear(q, s, z)
  [e] e = DequantizeLinear(w, s, z)
  [m] y = MatMul(d, e)
}
"""
)


@pytest.mark.parametrize(("capability", "built"), [("SM89", True), ("SM120", True), ("SM86", False)])
def test_the_compiler_agrees_where_fp8_starts(tmp_path, capability, built):
    from optkit.backends.tensorrt import rtx
    from optkit.store import save

    grid = ml_dtypes.float8_e4m3fn
    graph = parse(FP8, s=np.float32(0.5), z=np.zeros((), grid), w=np.ones((32, 16), grid))
    save(graph, tmp_path / "model.onnx")
    said = rtx.build(tmp_path / "model.onnx", tmp_path / "engine.plan", [capability], {})
    assert said.built == built
    if built:
        shown = plan.product_formats(plan.read((tmp_path / "engine.plan").read_bytes()), ["m"])
        assert shown == {"m": "fp8"}
    else:
        assert "fp8" in said.message


def test_a_file_that_is_no_engine_shows_nothing():
    assert plan.read(b"") == [] and plan.read(b"header {\nmain {\n") == []


def _unpacking(folder) -> list[tuple[str, ...]]:
    """Layers of the device operations that read weights in 4 bits."""
    return [
        o.layers
        for o in plan.read((folder / "engine.plan").read_bytes())
        if "int4" in o.formats and not o.nested
    ]


def test_weights_of_4_bits_stay_packed_in_the_engine_and_products_run_in_float16(tmp_path):
    random = np.random.default_rng(0)
    wide = parse(
        HEAD
        + """g (float[N, 1024] x) => (float[N, 1024] y) {
          [first] a = MatMul(x, w0)
          [relu] b = Relu(a)
          [second] y = MatMul(b, w1)
        }""",
        **{name: (random.normal(size=(1024, 1024)) * 0.05).astype(np.float32) for name in ("w0", "w1")},
    )
    data = [{"x": random.normal(size=(4, 1024)).astype(np.float32)} for _ in range(2)]
    artifacts = {
        recipe: optkit.compile(
            wide,
            target="l4",
            data=data,
            recipe=recipe,
            out=tmp_path / recipe,
            overrides=["limits.min_cosine=0.9"],
        )[0].manifest
        for recipe in ("tensorrt-fp16", "tensorrt-w4")
    }
    w4, fp16 = artifacts["tensorrt-w4"], artifacts["tensorrt-fp16"]
    # Unpacked inside the product, not to memory.
    assert _unpacking(tmp_path / "tensorrt-w4") == [
        (f"{w}/DequantizeLinear", product) for w, product in (("w0", "first"), ("w1", "second"))
    ]
    assert w4.achieved.formats == {"fp16": 1.0}
    assert w4.achieved.scheme == "weights int4 per block of 64, symmetric"
    # Half a byte and 1/64 of a float16 scale a weight, where float16 has two bytes.
    weights = 2 * 1024 * 1024
    assert fp16.size.after - w4.size.after > weights


PACKED = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[N, 512] x) => (float[N, 512] y) {
  [first] a = com.microsoft.MatMulNBits<K = 512, N = 256, bits = 4, block_size = 32>(x, q0, s0, z0)
  [relu] b = Relu(a)
  [second] y = com.microsoft.MatMulNBits<K = 256, N = 512, bits = 4, block_size = 32>(b, q1, s1, z1)
}
"""


@pytest.mark.parametrize(
    ("name", "recipe", "fmt"), [("l4", "tensorrt-fp16", "fp16"), ("l4", "fp32", "fp32"), ("h100", "tensorrt-fp16", "fp16")]
)  # fmt: skip
def test_weights_of_4_bits_with_zero_points_stay_packed_and_are_multiplied_as_if_they_had_none(
    tmp_path, name, recipe, fmt
):
    random, weights = np.random.default_rng(0), {}
    for i, (depth, columns) in enumerate(((512, 256), (256, 512))):
        weights |= {
            f"q{i}": random.integers(0, 256, (columns, depth // 32, 16), np.uint8),
            f"s{i}": random.uniform(0.01, 0.05, (columns, depth // 32)).astype(np.float32),
            f"z{i}": random.integers(0, 256, (columns, depth // 64), np.uint8),
        }
    data = [{"x": random.normal(size=(4, 512)).astype(np.float32)} for _ in range(2)]
    model = parse(PACKED, **weights)
    artifact, _ = optkit.compile(model, target=name, data=data, recipe=recipe, out=tmp_path / "out")
    assert artifact.manifest.achieved.formats == {fmt: 1.0}
    assert artifact.manifest.achieved.scheme == "weights int4 per block of 32, symmetric"
    expected, found = (
        ReferenceSession(model).run(data[0])["y"],
        optkit.load(artifact.folder).run(data[0])["y"],
    )
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    products = set(Record.load(artifact.folder).products)
    assert {"first/MatMul/MatMul", "first/MatMul/zero"} <= products and len(products) == 4
    if name == "l4":
        assert [layers[-1] for layers in _unpacking(artifact.folder)] == [
            "first/MatMul/MatMul",
            "second/MatMul/MatMul",
        ]


BLOCKS = (
    HEAD
    + """g (float[N, 5, 128] x) => (float[N, 5, 64] y) {
  [first] h = MatMul(x, w0)
  [bias] b = Add(h, b0)
  [relu] r = Relu(b)
  [second] y = MatMul(r, w1)
}
"""
)


@pytest.fixture(scope="module")
def linear() -> ir.Model:
    random = np.random.default_rng(0)
    shapes = {"w0": (128, 256), "b0": (256,), "w1": (256, 64)}
    return parse(BLOCKS, **{k: (random.normal(size=s) / 12).astype(np.float32) for k, s in shapes.items()})


@pytest.fixture(scope="module")
def tokens() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [{"x": random.normal(size=(4, 5, 128)).astype(np.float32)} for _ in range(4)]


# Numbers of 4 bits are a tenth away on average, and random weights forgive nothing.
ROUGH = ("limits.min_cosine=0.95",)


@pytest.mark.parametrize("name", ["rtx5090", "gb10"])
def test_products_in_nvfp4_are_multiplied_in_four_bits_by_the_engine(linear, tokens, tmp_path, name):
    artifact, _ = optkit.compile(
        linear, target=name, data=tokens, precision="nvfp4", overrides=ROUGH, out=tmp_path / "out"
    )
    manifest = artifact.manifest
    assert manifest.achieved.formats == {"nvfp4": 1.0}
    assert Record.load(artifact.folder).products == {"first": "nvfp4", "second": "nvfp4"}
    found = plan.read((artifact.folder / "engine.plan").read_bytes())
    # The scales of both operands are read with the numbers.
    products = [o.formats for o in found if o.kind == "fully_connected"]
    assert products == [("nvfp4", "nvfp4", "fp32", "fp32", "fp8", "fp8")] * 2
    done = {k for k, v in manifest.evidence.model_dump().items() if v}
    assert done == {"emitted", "compiled", "inspected", "executed_cpu"}


def test_an_engine_that_would_multiply_mxfp8_in_half_precision_is_not_made(linear, tokens, tmp_path):
    with pytest.raises(ModelError, match="multiplies nothing in mxfp8 for SM120") as error:
        optkit.compile(linear, target="rtx5090", data=tokens, precision="mxfp8", out=tmp_path / "out")
    assert "computes in fp16" in str(error.value) and "options.mode=bundle" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_a_bundle_in_mxfp8_says_what_the_proxy_made_of_it(linear, tokens, tmp_path, caplog):
    artifact, _ = optkit.compile(linear, target="b200", data=tokens, precision="mxfp8", out=tmp_path / "out")
    assert Record.load(artifact.folder).unused == "mxfp8"
    assert (
        "as a proxy, TensorRT-RTX" in caplog.text and "multiplies nothing in mxfp8 for SM120" in caplog.text
    )
    assert "for SM120 built it, with no product in mxfp8" in artifact.manifest.deferred[0]
    assert artifact.manifest.achieved.formats == {"fp16": 1.0}


def test_a_card_of_another_architecture_refuses_numbers_of_four_bits(linear, tokens, tmp_path):
    from optkit.backends.tensorrt import rtx

    artifact, _ = optkit.compile(
        linear, target="b200", data=tokens, precision="nvfp4", overrides=ROUGH, out=tmp_path / "out"
    )
    assert Record.load(artifact.folder).products == {"first": "nvfp4", "second": "nvfp4"}
    shapes = json.loads((artifact.folder / "bundle.json").read_text())["profile"]
    said = rtx.build(artifact.folder / "tensorrt.onnx", tmp_path / "engine.plan", ["SM89"], shapes)
    assert not said.built and "HW-specific datatypes: fp4_e2m1" in said.message
