"""The TensorRT backend where no package of NVIDIA's is installed: bundles, refusals, profiles."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import optkit
from optkit.backends import BACKENDS
from optkit.backends.tensorrt import bundle, rtx
from optkit.backends.tensorrt.placement import PLACEMENTS
from optkit.backends.tensorrt.profiles import profile, ranges, seen
from optkit.backends.tensorrt.refusals import refusal
from optkit.cli.app import main
from optkit.data import TensorSpec
from optkit.errors import (
    BackendUnavailableError,
    DataError,
    ModelError,
    PassError,
    RecipeError,
    UnsupportedOpError,
    UsageError,
)
from optkit.evaluate import Evaluator
from optkit.formats import FORMATS as NUMBERS
from optkit.graph import walk
from optkit.ops import OPS
from optkit.passes.base import Context
from optkit.passes.quantization.microscaling import QuantizeMicroscaling
from optkit.reference import ReferenceSession
from optkit.targets import TARGETS, target
from optkit.testing import parse

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
LINEAR = (
    HEAD
    + """g (float[N, 32] x) => (float[N, 8] y) {
  [first] h = MatMul(x, w0)
  [bias] b = Add(h, b0)
  [relu] r = Relu(b)
  [second] y = MatMul(r, w1)
}
"""
)


@pytest.fixture
def model() -> ir.Model:
    random = np.random.default_rng(0)
    return parse(
        LINEAR,
        w0=(random.normal(size=(32, 64)) / 6).astype(np.float32),
        b0=random.normal(size=64).astype(np.float32),
        w1=(random.normal(size=(64, 8)) / 8).astype(np.float32),
    )


@pytest.fixture
def batches() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [{"x": random.normal(size=(n, 32)).astype(np.float32)} for n in (2, 4, 4, 4, 4, 8)]


@pytest.fixture
def without_rtx(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_row_of_every_placement_names_a_known_operator(placement):
    found = PLACEMENTS[placement]
    assert found.name == placement and not found.bias and found.source
    assert found.activation == found.weight and NUMBERS[found.weight].symmetric
    for op, row in found.rows.items():
        assert op == row.op and OPS[op].weight is not None and not row.output


# Refusals


def _node(text: str, name: str = "n", **arrays) -> ir.Node:
    return next(n for n in walk(parse(HEAD + text, **arrays)) if n.name == name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("g (uint8[2, 4] x, uint8[4, 2] w) => (int32[2, 2] y) { [n] y = MatMulInteger(x, w) }", "no int8 operators"),
        ("g (float[2, 2] x) => (float y) { [n] y = Det(x) }", "no importer"),
        ("g (float[4] x, float s, uint8 z) => (uint8[4] y) { [n] y = QuantizeLinear(x, s, z) }", "signed grids"),
        ("g (int32[4] x, float s) => (float[4] y) { [n] y = DequantizeLinear(x, s) }", "biases in float"),
    ],
)  # fmt: skip
def test_what_tensorrt_cannot_run_is_refused_with_the_reason(text, said):
    assert said in refusal(_node(text), target("h100"))


def test_zero_points_must_be_zero():
    text = "g (float[4] x) => (int8[4] y) { [n] y = QuantizeLinear(x, s, z) }"
    scale = np.float32(0.1)
    assert "zero point 0" in refusal(_node(text, s=scale, z=np.int8(3)), target("l4"))
    assert refusal(_node(text, s=scale, z=np.int8(0)), target("l4")) is None


@pytest.mark.parametrize(
    ("stored", "zero"), [(ml_dtypes.uint4, 8), (ml_dtypes.uint4, 0), (ml_dtypes.int4, 1)]
)
def test_zero_points_of_4_bits_are_refused_with_the_way_out_where_there_is_one(stored, zero):
    text = "g (float s) => (float[4] y) { [n] y = DequantizeLinear(w, s, z) }"
    node = _node(text, w=np.zeros(4, stored), z=np.array(zero, stored))
    assert "int4 with zero point 0 alone" in refusal(node, target("t4"))
    assert "triton" not in refusal(node, target("t4")) and "-r triton-fp16" in refusal(node, target("h100"))


@pytest.mark.parametrize(
    ("stored", "fmt", "allowed", "refused"),
    [
        (ml_dtypes.float8_e4m3fn, "fp8", "l4 h100 rtx4090 b200", "t4 a10 a100 rtx3090 jetson-orin"),
        (ml_dtypes.int4, "w4a16", "a10 a100 h100", "t4"),
    ],
)
def test_formats_are_refused_where_the_card_lacks_them(stored, fmt, allowed, refused):
    text = "g (float s) => (float[4] y) { [n] y = DequantizeLinear(w, s) }"
    node = _node(text, w=np.zeros(4, stored))
    for name in allowed.split():
        assert refusal(node, target(name)) is None
    for name in refused.split():
        assert fmt in refusal(node, target(name))


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"precision": "w4a16"}, "quantize-weights: w4a16 starts with sm_80; t4 is sm_75"),
        ({"recipe": "tensorrt-w4"}, "quantize-weights: w4a16 starts with sm_80; t4 is sm_75"),
        ({"precision": "nvfp4"}, "quantize-microscaling: nvfp4 starts with sm_100 and sm_120; t4 is sm_75"),
        ({"precision": "fp8"}, "quantize-static: fp8 starts with sm_89; t4 is sm_75"),
    ],
)
def test_a_card_without_the_format_is_refused_before_the_model_is_read_or_data_asked_for(
    asked, why, tmp_path
):
    with pytest.raises(BackendUnavailableError) as error:
        optkit.compile(tmp_path / "missing.onnx", target="t4", out=tmp_path / "out", **asked)
    assert str(error.value) == why and error.value.hint == "choose another --precision"
    assert error.value.exit_code == 4


def test_plain_operators_are_not_refused(model):
    assert all(
        refusal(node, t) is None for node in walk(model) for t in TARGETS.values() if t.vendor == "nvidia"
    )


def test_bfloat16_needs_ampere():
    node = _node("g (bfloat16[4] x) => (bfloat16[4] y) { [n] y = Relu(x) }")
    assert "sm_80" in refusal(node, target("t4")) and refusal(node, target("a10")) is None


@pytest.mark.parametrize("name", ["h100", "l4"])
def test_float64_is_refused_on_every_card_with_the_same_reason(name, tmp_path):
    double = parse(
        HEAD + "g (double[N, 4] x) => (double[N, 2] y) { [n] y = MatMul(x, w) }", w=np.ones((4, 2))
    )
    with pytest.raises(
        UnsupportedOpError, match=r"n \(MatMul\): TensorRT computes float64 in float32"
    ) as error:
        _compile(double, None, tmp_path / "out", name=name, overrides=["options.mode=bundle"])
    assert error.value.exit_code == 1 and not (tmp_path / "out").exists()


# Shape profiles

IMAGE = TensorSpec(name="image", dtype=np.dtype(np.float32), shape=("batch", 3, "height", 64))
IDS = TensorSpec(name="ids", dtype=np.dtype(np.int64), shape=("batch", None))


def test_free_axes_have_a_range_by_what_they_are_and_a_name():
    found = ranges([IMAGE, IDS], {})
    assert found == {"batch": (1, 8, 32), "height": (32, 224, 512), "ids.1": (1, 128, 512)}
    assert ranges([IMAGE], {"height": (32, 48, 64)})["height"] == (32, 48, 64)
    shapes = profile([IMAGE, IDS], found)
    assert shapes["image"] == [[1, 3, 32, 64], [8, 3, 224, 64], [32, 3, 512, 64]]
    assert shapes["ids"] == [[1, 1], [8, 128], [32, 512]]
    fixed = TensorSpec(name="x", dtype=np.dtype(np.float32), shape=(1, 4))
    assert profile([fixed], ranges([fixed], {})) == {}


def test_an_axis_that_is_a_sum_of_others_has_the_sizes_of_the_sum():
    past = TensorSpec(name="past", dtype=np.dtype(np.float32), shape=(1, 4, "p", 8))
    mask = TensorSpec(name="mask", dtype=np.dtype(np.int64), shape=(1, "p + 1"))
    assert ranges([past, mask], {}) == {"p": (32, 224, 512), "p + 1": (33, 225, 513)}
    assert ranges([mask, past], {"p": (1, 16, 64)})["p + 1"] == (2, 17, 65)
    assert ranges([past, mask], {"p + 1": (2, 3, 4)})["p + 1"] == (2, 3, 4)


def test_data_narrows_the_axes_that_nobody_named():
    sizes = {"image": [(2, 2, 4), (3, 3, 3), (32, 48, 96), (64, 64, 64)], "ids": [(1, 2, 64), (7, 9, 30)]}
    found = seen([IMAGE, IDS], sizes, {"height": (16, 32, 128)})
    assert found == {"batch": (1, 2, 64), "height": (16, 32, 128), "ids.1": (7, 9, 30)}


def test_a_profile_spans_all_of_the_data_and_so_what_is_held_out_too(without_rtx, model, tmp_path):
    # Of every four batches the last is held out: here those of 3 and of 100 rows, in a profile that starts at 1.
    data = [{"x": np.ones((n, 32), np.float32)} for n in (40, 41, 42, 3, 44, 45, 46, 100)]
    artifact, _ = _compile(model, data, tmp_path / "out", recipe="fp32")
    assert json.loads((artifact.folder / bundle.BUNDLE).read_text())["profile"]["x"][2] == [100, 32]
    text = HEAD + "g (float[1, P, 4] x) => (float[1, P, 4] y) { y = MatMul(x, w) }"
    lengths = parse(text, w=np.ones((4, 4), np.float32))
    data = [{"x": np.ones((1, n, 4), np.float32)} for n in (17, 18, 64, 3, 19, 20, 21, 200)]
    artifact, _ = _compile(lengths, data, tmp_path / "out", recipe="fp32")
    low, _, high = json.loads((artifact.folder / bundle.BUNDLE).read_text())["profile"]["x"]
    assert (low, high) == ([1, 3, 4], [1, 200, 4])


def judged(*rows):
    """Samples of so many rows each, every one counted when it is made."""
    made = []

    def samples():
        for n in rows:
            made.append(n)
            yield {"x": np.full((n, 32), 0.1, np.float32)}, None

    return Evaluator(samples=samples, score=lambda outputs, _: float(outputs["y"].size > 0)), made


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_profile_takes_the_samples_of_the_evaluator_too(without_rtx, model, tmp_path, calibrated):
    data = [{"x": np.ones((n, 32), np.float32)} for n in (2, 4, 4, 4)]
    evaluator, made = judged(3, 300, 5)
    artifact, _ = _compile(
        model, data if calibrated else None, tmp_path / "out", recipe="fp32", evaluate=evaluator
    )
    usual = 4 if calibrated else 5
    shapes = json.loads((artifact.folder / bundle.BUNDLE).read_text())["profile"]["x"]
    assert shapes == [[1, 32], [usual, 32], [300, 32]]
    # For the reference, for what is built, and the first as inputs where there are no others.
    assert made.count(300) <= 2 + (not calibrated)


def test_a_sample_that_the_engine_cannot_take_is_refused_with_its_axis(without_rtx, model, tmp_path, capsys):
    evaluator, _ = judged(3, 300)
    with pytest.raises(
        DataError, match=r"x has 300 along axis 0 \(N\), and the engine takes 1 to 8"
    ) as caught:
        _compile(
            model,
            None,
            tmp_path / "out",
            recipe="fp32",
            evaluate=evaluator,
            overrides=["options.sizes.N=[1, 4, 8]"],
        )
    assert caught.value.hint == "--set options.sizes.N=[1, 4, 300]"
    _compile(model, None, tmp_path / "out", recipe="fp32", overrides=["options.sizes.N=[1, 4, 8]"])
    script = tmp_path / "judge.py"
    script.write_text(
        "import numpy as np\n"
        "def samples(): yield {'x': np.zeros((9, 32), np.float32)}, 0\n"
        "def score(outputs, label): return 1.0\n"
    )
    assert main(["eval", str(tmp_path / "out"), "--eval", str(script)]) == 2
    assert "x has 9 along axis 0 (N), and the engine takes 1 to 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"width": (1, 2, 3)}, "width is not a free axis"),
        ({"height": (64, 32, 128)}, "not in order"),
        ({"height": (0, 32, 128)}, "not in order"),
    ],
)
def test_wrong_ranges_are_refused_by_name(given, said):
    with pytest.raises(UsageError, match=said):
        ranges([IMAGE], given)


def test_an_input_without_a_rank_is_refused():
    with pytest.raises(UsageError, match="no known rank"):
        ranges([TensorSpec(name="x", dtype=np.dtype(np.float32), shape=None)], {})


# Modes


def test_each_card_has_the_mode_and_the_proxy_that_tensorrt_rtx_supports():
    native = {t.name for t in TARGETS.values() if rtx.native(t)}
    assert native == set(["a10", "l4", "l40s", "rtx3090", "rtx4090", "rtx5090", "gb10"])
    proxies = {
        name: rtx.proxy(target(name)) for name in ("t4", "a100", "jetson-orin", "h100", "h200", "b200")
    }
    assert proxies == {
        "t4": "SM75", "a100": "SM80", "jetson-orin": "SM86", "h100": "SM89", "h200": "SM89", "b200": "SM120",
    }  # fmt: skip


def test_the_mode_that_was_chosen_is_in_the_manifest_the_summary_and_the_json(
    without_rtx, model, tmp_path, capsys
):
    file = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(model), file)
    assert (
        main(["compile", str(file), "-t", "h100", "-r", "fp32", "-o", str(tmp_path / "out"), "--json"]) == 0
    )
    out, said = capsys.readouterr()
    words = "bundle: TensorRT builds the engine on the device"
    assert f"Mode      {words}" in said
    manifest = json.loads(out)["manifest"]
    assert manifest["options"]["mode"] == "bundle" and manifest["mode"].startswith(words)
    assert optkit.load(tmp_path / "out").manifest.mode == manifest["mode"]
    assert "mode: bundle" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_an_engine_without_the_package_is_refused_before_any_work_with_the_pip_line(
    without_rtx, model, tmp_path, capsys
):
    file = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(model), file)
    assert main(["compile", str(file), "--target", "l4", "-o", str(tmp_path / "out"), "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert "TensorRT-RTX, which is not installed" in error["message"]
    assert "pip install 'optkit[tensorrt]'" in error["hint"]
    assert not (tmp_path / "out").exists()


def test_a_card_that_tensorrt_rtx_has_not_is_refused_where_an_engine_is_asked_for(without_rtx):
    backend = BACKENDS["tensorrt"]()
    with pytest.raises(UsageError, match="compiles nothing for h100"):
        backend.ready(target("h100"), backend.options(mode="rtx-engine"))
    backend.ready(target("h100"), backend.options())
    backend.ready(target("l4"), backend.options(mode="bundle"))


def test_amd_gpus_are_no_target_of_it(model, batches, tmp_path):
    with pytest.raises(UsageError, match="NVIDIA's GPUs; the target is mi300x"):
        optkit.compile(model, target="mi300x", data=batches, recipe="tensorrt-fp16", out=tmp_path / "out")


@pytest.mark.parametrize(
    "asked", [{"recipe": "tensorrt-fp16"}, {"backend": "tensorrt"}, {"precision": "fp8"}]
)
def test_processors_are_no_target_of_it(model, batches, tmp_path, asked):
    with pytest.raises(UsageError, match="NVIDIA's GPUs; the target is cpu"):
        optkit.compile(model, data=batches, out=tmp_path / "out", **asked)


# Bundles

FORMATS = {
    "fp32": "fp32", "tensorrt-fp16": "fp16", "tensorrt-int8": "int8", "tensorrt-int8-mse": "int8", "fp8": "fp8",
}  # fmt: skip


def _compile(model, batches, path, name="h100", **options):
    return optkit.compile(model, target=name, data=batches, out=path, **options)


@pytest.mark.parametrize("recipe", ["fp32", "tensorrt-fp16", "tensorrt-int8", "tensorrt-int8-mse", "fp8"])
def test_a_bundle_claims_what_was_done_and_lists_what_is_left(without_rtx, model, batches, tmp_path, recipe):
    artifact, report = _compile(model, batches, tmp_path / "out", recipe=recipe)
    manifest = artifact.manifest
    done = {k for k, v in manifest.evidence.model_dump().items() if v}
    assert done == {"emitted", "executed_cpu"}
    assert report.latency is None and report.exit_code == 0
    assert [s for s in manifest.deferred if "build_engine.py" in s] and "not tried here" in manifest.deferred[
        0
    ]
    assert manifest.achieved.formats == {FORMATS[recipe]: 1.0}
    assert set(manifest.achieved.placement) == {"typed graph"}
    names = {f.path for f in manifest.files}
    assert {"model.onnx", "bundle.json", "build_engine.py", "verify.py", "bench.py", "device.py"} <= names
    assert "engine.plan" not in names
    facts = json.loads((artifact.folder / bundle.BUNDLE).read_text())
    assert facts["runtime"] == "tensorrt" and facts["arch"] == "sm_90a"
    assert facts["profile"] == {"x": [[1, 32], [4, 32], [32, 32]]}
    onnx.checker.check_model(onnx.load(artifact.folder / "model.onnx"), full_check=True)


def test_golden_outputs_are_those_of_the_typed_graph(without_rtx, model, batches, tmp_path):
    artifact, _ = _compile(model, batches, tmp_path / "out", recipe="tensorrt-int8")
    session = ReferenceSession(artifact.folder / "model.onnx")
    files = sorted((artifact.folder / "golden").iterdir())
    rows = []
    for file in files:
        with np.load(file, allow_pickle=False) as batch:
            found = session.run({"x": batch["in:x"]})
            np.testing.assert_array_equal(found["y"], batch["out:y"])
            rows.append(len(batch["in:x"]))
    assert rows == [4, 1]


def test_programs_for_tensorrt_rtx_import_its_package():
    assert "import tensorrt_rtx as trt" in bundle.program("runtime.py", rtx=True)
    assert "pip install tensorrt-rtx-cu13" in bundle.program("runtime.py", rtx=True)
    assert "import tensorrt as trt" in bundle.program("runtime.py", rtx=False)


def test_float16_stays_out_of_where_values_do_not_fit(without_rtx, batches, tmp_path):
    text = (
        HEAD
        + """g (float[N, 32] x) => (float[N, 8] y, float[N, 8] z) {
      [big] h = Mul(x, k)
      [r] r = Relu(h)
      [far] y = MatMul(r, w)
      [near] z = MatMul(x, v)
    }"""
    )
    w, v = np.full((32, 8), 1e-6, np.float32), np.ones((32, 8), np.float32)
    artifact, _ = _compile(
        parse(text, k=np.float32(1e6), w=w, v=v), batches, tmp_path / "out", recipe="tensorrt-fp16"
    )
    assert artifact.manifest.achieved.formats == {"fp32": 0.5, "fp16": 0.5}
    assert all(np.isfinite(artifact.run(b)["y"]).all() for b in batches)


def test_pairs_around_no_product_are_an_error(without_rtx, tmp_path):
    text = (
        HEAD
        + """g (float[N, 4] x) => (float[N, 4] y) {
      q = QuantizeLinear(x, s, z)
      d = DequantizeLinear(q, s, z)
      r = Relu(d)
      y = MatMul(r, w)
    }"""
    )
    unquantized = parse(text, s=np.float32(0.1), z=np.int8(0), w=np.ones((4, 4), np.float32))
    backend = BACKENDS["tensorrt"]()
    with pytest.raises(ModelError, match="not one product with weights is quantized"):
        backend.lower(unquantized, target("h100"), backend.options(), tmp_path)


def test_the_precision_int8_tries_the_rows_of_tensorrt_and_no_other(without_rtx, model, batches, tmp_path):
    _, report = _compile(model, batches, tmp_path / "out", precision="int8")
    assert {c.name for c in report.candidates} == {
        "fp32", "tensorrt-int8", "tensorrt-int8-mse", "tensorrt-int8-smooth",
    }  # fmt: skip


def test_a_candidate_in_a_format_that_the_card_lacks_is_left_out_with_the_reason(
    without_rtx, model, batches, tmp_path
):
    _, report = _compile(model, batches, tmp_path / "out", name="a100")
    left = {c.name: (c.verdict, c.reason) for c in report.candidates if c.verdict == "unavailable"}
    assert set(left) == {"fp8"} and "fp8 starts with sm_89; a100 is sm_80" in left["fp8"][1]


def test_the_estimate_is_for_the_data_or_for_what_the_engine_is_tuned_for(
    without_rtx, model, batches, tmp_path
):
    for data, shape in ((batches, "x [2, 32]"), (None, "x [8, 32]")):
        _, report = _compile(model, data, tmp_path / "out", recipe="tensorrt-fp16")
        assert report.estimate.inputs == shape
        assert f"computed from the data sheet for {shape}" in optkit.sentences.untimed(report)[1]
        assert 0 < report.estimate.floor_ms <= report.estimate.low_ms <= report.estimate.high_ms


def test_what_an_artifact_says_about_a_gpu_is_never_measured(without_rtx, model, batches, tmp_path, capsys):
    file, data = tmp_path / "model.onnx", tmp_path / "calib"
    onnx.save(ir.to_proto(model), file)
    data.mkdir()
    for i, batch in enumerate(batches):
        np.savez(data / f"{i}.npz", **batch)
    assert main(["compile", str(file), "-t", "h100", "--calib", str(data), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "not measured: there is no h100 here" in said and "computed from the data sheet" in said
    assert "measured" not in said.replace("not measured", "").replace(
        "accuracy would be measured", ""
    ).replace("accuracy was not measured", "")
    assert "DEFERRED: 3 steps that need h100" in said and "optkit finalize" in said
    assert "done: emitted, executed cpu" in said and "not done: compiled" in said


def test_the_same_request_gives_the_same_bytes(without_rtx, model, batches, tmp_path):
    found = [_compile(model, batches, tmp_path / name, recipe="tensorrt-int8")[0] for name in ("a", "b")]
    first, second = ((a.folder / "manifest.json").read_bytes() for a in found)
    assert first == second


def test_sizes_that_the_graph_cannot_have_fail_with_the_option_that_sets_them(without_rtx, tmp_path):
    pairs = parse(HEAD + "g (float[N] x) => (float[2, M] y) <int64[2] two = {2, -1}> { y = Reshape(x, two) }")
    backend = BACKENDS["tensorrt"]()
    with pytest.raises(ModelError, match=r"does not run with x \[3\]") as error:
        backend.lower(pairs, target("h100"), backend.options(sizes={"N": (2, 3, 6)}), tmp_path)
    assert "options.sizes" in error.value.hint


# The process that builds


def test_a_compiler_that_aborts_is_reported_with_its_signal(monkeypatch, tmp_path):
    monkeypatch.setattr(
        rtx, "_CHILD", "import os, sys; print('assertion failed', file=sys.stderr); os.abort()"
    )
    with pytest.raises(ModelError, match=r"died \(SIGABRT\): assertion failed"):
        rtx.build(tmp_path / "model.onnx", tmp_path / "engine.plan", ["SM89"], {})


def test_a_compiler_that_never_ends_is_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(rtx, "_CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(rtx, "_SECONDS", 0.5)
    with pytest.raises(ModelError, match="did not finish within"):
        rtx.build(tmp_path / "model.onnx", tmp_path / "engine.plan", ["SM89"], {})


def test_the_options_name_what_they_do_not_know(model, tmp_path):
    with pytest.raises(RecipeError, match="unknown option 'size'"):
        optkit.compile(
            model, target="h100", recipe="fp32", overrides=["options.size=1"], out=tmp_path / "out"
        )


def test_a_target_that_the_backend_does_not_know_has_no_engine():
    assert rtx.capability(replace(target("h100"), capability=None)) is None


def test_recurrent_products_count_among_the_formats(tmp_path):
    random = np.random.default_rng(0)
    shapes = {"w": (1, 32, 6), "r": (1, 32, 8), "v": (8, 4)}
    model = parse(
        HEAD
        + """g (float[5, 2, 6] x) => (float[10, 4] z) <int64[2] flat = {10, 8}> {
          [lstm] y = LSTM<hidden_size = 8>(x, w, r)
          [flat] f = Reshape(y, flat)
          [head] z = MatMul(f, v)
        }""",
        **{name: (random.normal(size=s) * 0.3).astype(np.float32) for name, s in shapes.items()},
    )
    data = [{"x": random.normal(size=(5, 2, 6)).astype(np.float32)} for _ in range(2)]
    artifact, _ = optkit.compile(
        model, target="h100", data=data, recipe="tensorrt-int8", out=tmp_path / "out",
        overrides=["options.proxy=false", "limits.min_cosine=0.5"],
    )  # fmt: skip
    # 10 steps of 32 x (6 + 8), and 10 rows of 8 x 4.
    assert artifact.manifest.achieved.formats["int8"] == pytest.approx(320 / (4480 + 320), abs=1e-4)


def test_sums_of_einsum_count_among_the_formats_though_nothing_quantizes_them(tmp_path):
    random = np.random.default_rng(0)
    model = parse(
        HEAD
        + """g (float[5, 16] x) => (float[5, 3, 8] z) {
          [router] r = MatMul(x, v)
          [experts] z = Einsum<equation = "td,edf->tef">(r, w)
        }""",
        v=random.normal(size=(16, 16)).astype(np.float32), w=random.normal(size=(3, 16, 8)).astype(np.float32),
    )  # fmt: skip
    data = [{"x": random.normal(size=(5, 16)).astype(np.float32)} for _ in range(2)]
    artifact, _ = optkit.compile(
        model, target="h100", data=data, recipe="tensorrt-int8", out=tmp_path / "out", overrides=["options.proxy=false"]
    )  # fmt: skip
    assert artifact.manifest.achieved.formats == {"fp16": 0.6, "int8": 0.4}


PACKED = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[N, 64] x) => (float[N, 32] y) { y = com.microsoft.MatMulNBits <K = 64, N = 32, bits = 4, block_size = 32> (x, q, s) }
"""


def test_weights_that_onnx_runtime_packed_in_4_bits_are_written_as_tensorrt_reads_them(tmp_path):
    random = np.random.default_rng(0)
    weights = {
        "q": random.integers(0, 256, (32, 2, 16)).astype(np.uint8),
        "s": random.uniform(0.01, 0.03, (32, 2)).astype(np.float32),
    }
    packed = parse(PACKED, **weights)
    done, _ = optkit.compile(
        packed, target="h100", recipe="tensorrt-fp16", out=tmp_path / "out", overrides=["options.proxy=false"]
    )
    assert done.manifest.achieved.scheme == "weights int4 per block of 32, symmetric"
    assert [n.op_type for n in walk(ir.load(done.folder / "model.onnx")) if n.domain] == []
    x = random.standard_normal((3, 64)).astype(np.float32)
    with done.session() as session:
        found = session.run({"x": x})["y"]
    # 64 terms of about 0.1, inputs and weights rounded to float16.
    assert np.abs(found - ReferenceSession(packed).run({"x": x})["y"]).max() < 64**0.5 * 0.1 * 2**-9


# Formats with block scales

BLOCKS = (
    HEAD
    + """g (float[N, 32] x) => (float[N, 64] y) {
  [first] h = MatMul(x, w0)
  [bias] b = Add(h, b0)
  [relu] r = Relu(b)
  [second] y = Gemm<transB = 1>(r, w1)
}
"""
)
# Numbers of 4 bits are a tenth away on average, and random weights forgive nothing.
ROUGH = ("limits.min_cosine=0.95",)
# What stands for a product of each format: of activations first, then of weights.
WORDS = {
    "nvfp4": {"TRT_FP4DynamicQuantize": 2, "DequantizeLinear": 8},
    "mxfp8": {"TRT_MXFP8DynamicQuantize": 2, "TRT_MXFP8DequantizeLinear": 4},
}


@pytest.fixture
def wide() -> ir.Model:
    random = np.random.default_rng(0)
    shapes = {"w0": (32, 64), "b0": (64,), "w1": (64, 64)}
    return parse(BLOCKS, **{k: (random.normal(size=s) / 8).astype(np.float32) for k, s in shapes.items()})


@pytest.mark.parametrize("precision", WORDS)
def test_a_bundle_has_the_graph_in_words_of_tensorrt_beside_the_one_that_runs_here(
    without_rtx, wide, batches, tmp_path, precision
):
    artifact, report = _compile(
        wide, batches, tmp_path / "out", name="b200", precision=precision, overrides=ROUGH
    )
    assert report.exit_code == 0 and artifact.manifest.achieved.formats == {precision: 1.0}
    assert f"weights {precision} per block of" in artifact.manifest.achieved.scheme
    numbers, width = ("float4e2m1", 0.5) if precision == "nvfp4" else ("float8e4m3fn", 1)
    assert artifact.manifest.achieved.weights[numbers] == (32 * 64 + 64 * 64) * width
    assert json.loads((artifact.folder / bundle.BUNDLE).read_text())["source"] == "tensorrt.onnx"
    own, here = (ir.load(artifact.folder / name) for name in ("tensorrt.onnx", "model.onnx"))
    found = Counter(n.op_type for n in own.graph)
    assert {op: found[op] for op in WORDS[precision]} == WORDS[precision] and not own.functions
    assert {n.domain for n in own.graph} == {"", "trt"} == set(own.opset_imports)
    # Numbers and scales are the same in both files; those of 4 bits lie packed, two to a byte.
    for name, value in here.graph.initializers.items():
        same = own.graph.initializers[name].const_value.numpy()
        np.testing.assert_array_equal(same.astype(np.float32), value.const_value.numpy().astype(np.float32))
    weights = own.graph.initializers["w0/q"].const_value
    assert weights.nbytes == 32 * 64 * width
    onnx.checker.check_model(onnx.load(artifact.folder / "model.onnx"), full_check=True)


def test_products_in_mxfp8_read_half_precision_without_a_cast_between(without_rtx, wide, batches, tmp_path):
    artifact, _ = _compile(wide, batches, tmp_path / "out", name="b200", precision="mxfp8")
    own = ir.load(artifact.folder / "tensorrt.onnx")
    for product in (n for n in own.graph if n.name in ("first", "second")):
        made = [v.producer() for v in product.inputs[:2]]
        assert [n.op_type for n in made] == ["TRT_MXFP8DequantizeLinear"] * 2
        assert {n.attributes.get_int("output_dtype") for n in made} == {int(ir.DataType.FLOAT16)}


@pytest.mark.parametrize("precision", WORDS)
def test_a_graph_in_blocks_is_refused_by_cards_without_the_format(wide, precision):
    QuantizeMicroscaling(format=precision).run(wide, Context(target=target("b200")))
    said = {refusal(n, target("l4")) for n in wide.graph if n.op_type.endswith("Dequantize")}
    assert said == {f"{precision} starts with sm_100 and sm_120; l4 is sm_89"}
    assert all(refusal(n, target("gb10")) is None for n in walk(wide))


@pytest.mark.parametrize("precision", WORDS)
def test_a_precision_is_refused_by_cards_without_it(without_rtx, wide, batches, tmp_path, precision):
    with pytest.raises(BackendUnavailableError, match=f"{precision} starts with sm_100 and sm_120; h100 is"):
        _compile(wide, batches, tmp_path / "out", precision=precision)
    with pytest.raises(UsageError, match="NVIDIA's GPUs; the target is cpu"):
        _compile(wide, batches, tmp_path / "out", name="cpu", precision=precision)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", WORDS)
def test_half_precision_around_no_quantized_product_is_not_what_was_asked_for(
    without_rtx, batches, tmp_path, precision
):
    # Blocks of no size divide 17.
    text = HEAD + "g (float[N, 32] x, float[N, 17] z) => (float[N, 160] y) { s = Exp(x) y = MatMul(z, w) }"
    narrow = parse(text, w=np.ones((17, 160), np.float32))
    data = [batch | {"z": np.ones((len(batch["x"]), 17), np.float32)} for batch in batches]
    with pytest.raises(PassError, match="quantize-microscaling: nothing in model was changed"):
        _compile(narrow, data, tmp_path / "out", name="b200", precision=precision)
