"""Compiling for processors that saturate in 16 bits: weights in 7 bits where it happens, accuracy predicted, and said so."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

import optkit
from optkit import sentences
from optkit.backends.onnxruntime import OnnxRuntime
from optkit.backends.onnxruntime.lower import OnnxRuntimeOptions
from optkit.backends.onnxruntime.placement import PLACEMENTS
from optkit.cli.app import main
from optkit.data import CalibrationData
from optkit.graph import constant
from optkit.page import page
from optkit.passes.base import Context
from optkit.passes.quantization.dynamic import QuantizeDynamic
from optkit.passes.quantization.static import QuantizeStatic
from optkit.reference import ReferenceSession
from optkit.saturation import emulate, narrowed, saturated
from optkit.store import save
from optkit.targets import TARGETS, target
from optkit.testing import parse

LAYERS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 64] x) => (float[N, 8] y)
{ h = MatMul(x, loud)
  r = Relu(h)
  y = MatMul(r, even) }
"""
EVALUATOR = """
import numpy as np
METRIC = "small"
def samples():
    r = np.random.default_rng(5)
    for _ in range(40):
        yield {"x": r.uniform(0.5, 1, size=(1, 64)).astype("float32")}, 0.0
def score(outputs, label):
    return float(np.abs(outputs["y"]).mean())
"""
AVX2 = TARGETS["x86-avx2"]
pytestmark = pytest.mark.skipif(
    target("cpu").saturates or target("x86-avx2").runs_here, reason="this processor saturates by itself"
)


@pytest.fixture
def model() -> ir.Model:
    """The first layer adds up large weights of one sign in some of its channels; the second has alternating ones."""
    random = np.random.default_rng(0)
    loud = random.normal(size=(64, 32)) / 8
    loud[:, :16] = np.abs(loud[:, :16]) + 0.3
    even = np.where(np.arange(32)[:, None] % 2, 1.0, -1.0) * random.uniform(0.5, 1, size=(32, 8)) / 8
    built = parse(LAYERS, loud=loud.astype(np.float32), even=even.astype(np.float32))
    for node in built.graph:
        node.name = node.outputs[0].name
    return built


@pytest.fixture
def batches() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [{"x": random.uniform(0.5, 1, size=(4, 64)).astype(np.float32)} for _ in range(8)]


def _context(batches, where=AVX2) -> Context:
    return Context(target=where, data=CalibrationData(batches), placements=PLACEMENTS)


def _noise(model: ir.Model, wanted: list[np.ndarray], batches) -> float:
    session = ReferenceSession(model)
    found = [session.run(b)["y"] for b in batches]
    session.close()
    return float(np.mean([np.abs(f - w).max() for f, w in zip(found, wanted, strict=True)]))


def test_static_quantization_narrows_the_layers_that_saturate_and_no_others(model, batches):
    reference = ReferenceSession(model)
    wanted = [reference.run(b)["y"] for b in batches]
    wide, narrow = model.clone(), model.clone()
    QuantizeStatic().run(wide, _context(batches, replace(AVX2, saturates=False)))
    changes = QuantizeStatic().run(narrow, _context(batches))
    assert list(saturated(wide, batches)) == ["h"] and saturated(narrow, batches) == {}
    channels = int(saturated(wide, batches)["h"].sum())
    assert 16 <= channels < 32
    assert [c.detail for c in changes] == [
        f"MatMul to s8 x u8, {channels} of 32 channels in 7 bits", "MatMul to s8 x u8",
    ]  # fmt: skip
    stored = {n: constant(v) for n, v in narrow.graph.initializers.items() if n in ("loud/q", "even/q")}
    top = np.abs(stored["loud/q"].astype(int)).max(0)
    assert (np.sort(top)[:channels] <= 63).all() and (np.sort(top)[channels:] == 127).all()
    assert (np.abs(stored["even/q"].astype(int)).max(0) == 127).all()
    exact = _noise(wide, wanted, batches)
    emulate(wide)
    emulate(narrow)
    assert _noise(wide, wanted, batches) > 5 * exact
    # One bit less in a layer doubles its rounding errors.
    assert _noise(narrow, wanted, batches) < 2.5 * exact


def test_data_that_do_not_saturate_keep_eight_bits(model, batches):
    quiet = [{"x": b["x"] * (np.arange(64) % 2)} for b in batches]
    quantized = model.clone()
    changes = QuantizeStatic().run(quantized, _context([{"x": b["x"].astype(np.float32)} for b in quiet]))
    assert [c.detail for c in changes] == ["MatMul to s8 x u8"] * 2


def test_dynamic_quantization_narrows_what_could_saturate(model, batches):
    wide, narrow = model.clone(), model.clone()
    QuantizeDynamic(smallest=1).run(wide, _context(batches, replace(AVX2, saturates=False)))
    QuantizeDynamic(smallest=1).run(narrow, _context(batches))
    assert emulate(wide) == ["h/MatMulInteger"] and emulate(narrow) == []
    told = {str(n.name): narrowed(n) for n in narrow.graph if n.op_type == "MatMulInteger"}
    assert told["y/MatMulInteger"] is None and told["h/MatMulInteger"].endswith("of 32")


def test_a_session_predicts_and_load_does_not(model, batches, tmp_path):
    quantized = model.clone()
    QuantizeStatic().run(quantized, _context(batches, replace(AVX2, saturates=False)))
    engine, options = OnnxRuntime(), OnnxRuntimeOptions()
    engine.lower(quantized, AVX2, options, tmp_path)
    emulated = quantized.clone()
    emulate(emulated)
    session = ReferenceSession(emulated)
    with engine.load(tmp_path, AVX2, options) as plain, engine.predict(tmp_path, AVX2, options) as predicted:
        for batch in batches:
            wanted = session.run(batch)["y"]
            np.testing.assert_allclose(predicted.run(batch)["y"], wanted, rtol=1e-5, atol=1e-5)
            assert np.abs(plain.run(batch)["y"] - wanted).max() > 0.1
    assert "emulated" in str(engine.prediction(AVX2)) and engine.prediction(target("cpu")) is None


def test_a_processor_that_saturates_predicts_those_that_do_not(model, batches, tmp_path, monkeypatch):
    quantized = model.clone()
    QuantizeStatic().run(quantized, _context(batches, replace(AVX2, saturates=False)))
    engine, options, vnni = OnnxRuntime(), OnnxRuntimeOptions(), replace(TARGETS["x86-vnni"], runs_here=False)
    engine.lower(quantized, vnni, options, tmp_path)
    with engine.load(tmp_path, vnni, options) as plain:
        wanted = plain.run(batches[0])["y"]
    monkeypatch.setitem(TARGETS, "cpu", replace(TARGETS["cpu"], saturates=True))
    assert "without the saturation" in str(engine.prediction(vnni))
    with engine.predict(tmp_path, vnni, options) as session:
        np.testing.assert_allclose(session.run(batches[0])["y"], wanted, rtol=1e-5, atol=1e-5)


def test_the_report_names_what_was_narrowed_and_that_the_numbers_are_predicted(model, batches, tmp_path):
    artifact, report = optkit.compile(
        model, target="x86-avx2", recipe="int8-static", data=batches, out=tmp_path / "out"
    )
    record = artifact.manifest.saturation
    assert record is not None and record.layers == 2 and list(record.narrowed) == ["h/Gemm"]
    assert record.at_risk == () and artifact.manifest.fidelity.met
    assert report.latency is None and not artifact.manifest.evidence.timed_on_device
    assert artifact.manifest.evidence.proxy_compiled and len(artifact.manifest.deferred) == 2
    first, second = sentences.saturation(report)
    assert first.startswith("1 of 2 int8 layers saturated on the calibration data: 7-bit weights in h/Gemm (")
    assert second == "none can saturate any more, by their weights alone"
    assert sentences.predicted(report)[0].startswith("predicted by emulation for x86-avx2: ")
    assert "as predicted" in sentences.headline(report)
    shown = page(report)
    assert "predicted by emulation for x86-avx2" in shown and "1 of 2 int8 layers saturated" in shown
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    optkit.compile(model, target="x86-avx2", recipe="int8-static", data=batches, out=tmp_path / "again")
    assert (tmp_path / "again" / "manifest.json").read_bytes() == manifest


def test_a_float_artifact_has_nothing_that_saturates(model, batches, tmp_path):
    _, report = optkit.compile(model, target="x86-avx512", recipe="fp32", data=batches, out=tmp_path / "out")
    assert sentences.saturation(report) == ("no product runs in int8, so nothing saturates on x86-avx512",)


def test_what_was_quantized_elsewhere_is_judged_by_what_the_target_makes_of_it(
    model, batches, tmp_path, capsys
):
    QuantizeStatic().run(model, _context(batches, replace(AVX2, saturates=False)))
    save(model, tmp_path / "quantized.onnx")
    (tmp_path / "eval.py").write_text(EVALUATOR)
    command = [
        "compile",
        str(tmp_path / "quantized.onnx"),
        "--recipe",
        "fp32",
        "--set",
        "limits.min_speedup=0",
        "--eval",
        str(tmp_path / "eval.py"),
    ]
    folders = {}
    for where in ("cpu", "x86-avx2"):
        folders[where] = str(tmp_path / where)
        code = main([*command, "--target", where, "--max-drop", "1%", "--out", folders[where], "--json"])
        said = json.loads(capsys.readouterr().out)
        assert (code, said["manifest"]["accuracy"]["met"]) == (
            (0, "met") if where == "cpu" else (3, "missed")
        )
    asked = ["--eval", str(tmp_path / "eval.py"), "--against", str(tmp_path / "quantized.onnx"), "--json"]
    assert main(["eval", folders["x86-avx2"], *asked]) == 0
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said["drop"] > 0.05 * abs(said["reference"])
    assert said["predicted"][folders["x86-avx2"]].startswith("predicted for x86-avx2: saturation")
    assert "predicted for x86-avx2" in captured.err
    assert main(["eval", folders["cpu"], *asked]) == 0
    assert "predicted" not in json.loads(capsys.readouterr().out)


def test_openvino_is_not_offered_where_its_saturation_cannot_be_told():
    for name in ("x86-avx2", "x86-avx512"):
        assert "openvino" not in TARGETS[name].backends
