from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import yaml

import optkit
from optkit.artifact import Artifact
from optkit.backends.base import Session
from optkit.backends.onnxruntime import OnnxRuntime
from optkit.bench import Speedup, Timing
from optkit.candidate import Built
from optkit.compilation import Compilation
from optkit.compiler import compile
from optkit.data import CalibrationData
from optkit.errors import DataError, ModelError, OptkitError, RecipeError, UnknownNameError, UsageError
from optkit.evaluate import Evaluator
from optkit.frontend import read
from optkit.passes.base import Silent
from optkit.readback import scheme, unmet
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.report import Achieved, Manifest, Report, dump
from optkit.reporting import clocks, resources
from optkit.targets import TARGETS, target
from optkit.testing import parse

# Two convolutions, a residual connection and a linear layer: what a real network is made of, small enough to compile
# in a second. The classes are what its float version says, so that its accuracy is 1.
CNN = """
<ir_version: 10, opset_import: ["" : 21]>
cnn (float[N, 3, 12, 12] image, float[16, 3, 3, 3] w1, float[16] b1, float[16, 16, 3, 3] w2, float[16] b2,
     float[16, 4] w3, float[4] b3) => (float[N, 4] classes)
{
  [first] a = Conv<pads = [1, 1, 1, 1]>(image, w1, b1)
  [relu] r = Relu(a)
  [second] c = Conv<pads = [1, 1, 1, 1]>(r, w2, b2)
  [add] s = Add(c, r)
  [relu2] t = Relu(s)
  [pool] p = GlobalAveragePool(t)
  [flat] f = Flatten(p)
  [nothing] i = Identity(f)
  [head] classes = Gemm(i, w3, b3)
}
"""
INT8 = """
recipe: 1
passes: [remove-noops, {quantize-static: {method: min-max}}]
limits: {min_speedup: 0}
"""
MACS = {"first": 12 * 12 * 16 * 3 * 9, "second": 12 * 12 * 16 * 16 * 9, "head": 16 * 4}


def _cnn() -> ir.Model:
    model, random = parse(CNN), np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        shape = value.shape.numpy()
        array = random.normal(size=shape) / math.sqrt(np.prod(shape[1:]) if len(shape) > 1 else 10)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    return model


def _batches(n: int = 8, size: int = 1, seed: int = 1) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{"image": random.normal(size=(size, 3, 12, 12)).astype(np.float32)} for _ in range(n)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "cnn.onnx"
    onnx.save(ir.to_proto(_cnn()), path)
    return path


@pytest.fixture(scope="module")
def evaluator(model) -> Evaluator:
    session = ReferenceSession(model)
    labelled = [(b, int(session.run(b)["classes"].argmax())) for b in _batches(60, seed=2)]
    return Evaluator(
        samples=lambda: iter(labelled),
        score=lambda outputs, label: float(outputs["classes"].argmax() == label),
        metric="accuracy",
    )


@pytest.fixture(scope="module")
def compiled(model, evaluator, tmp_path_factory) -> tuple[Artifact, Report]:
    out = tmp_path_factory.mktemp("out") / "build"
    return compile(
        model, recipe=yaml.safe_load(INT8), data=_batches(), evaluate=evaluator, max_drop="10%", out=out
    )


# The artifact


def test_the_folder_is_complete_and_holds_nothing_else(compiled):
    artifact, _ = compiled
    assert sorted(p.name for p in artifact.folder.iterdir()) == [
        "manifest.json", "model.onnx", "recipe.yaml", "report.html", "report.json",
    ]  # fmt: skip
    assert sorted(p.name for p in artifact.folder.parent.iterdir()) == ["build"]


def test_the_manifest_says_what_was_built(compiled, model):
    manifest = compiled[0].manifest
    assert manifest == compiled[1].manifest
    assert manifest.model.name == "cnn.onnx"
    assert manifest.model.nodes == 9
    assert manifest.model.parameters == sum(
        np.prod(s) for s in ((16, 3, 3, 3), 16, (16, 16, 3, 3), 16, (16, 4), 4)
    )
    assert manifest.model.bytes == 4 * manifest.model.parameters
    assert (manifest.target, manifest.backend) == ("cpu", "onnxruntime")
    assert [(p.name, p.changes > 0) for p in manifest.passes] == [
        ("remove-noops", True),
        ("quantize-static", True),
    ]
    assert [(p.nodes_before, p.nodes_after > p.nodes_before) for p in manifest.passes[1:]] == [(8, True)]
    # Of every four batches one is held out.
    assert (manifest.data.batches, manifest.data.random) == (6, False)
    assert manifest.size.before == model.stat().st_size
    assert manifest.size.after == (compiled[0].folder / "model.onnx").stat().st_size
    assert set(manifest.versions) == {"numpy", "onnx", "onnx-ir", "onnxruntime", "optkit"}
    assert [f.path for f in manifest.files] == ["model.onnx", "recipe.yaml"]
    assert manifest.fidelity is None
    a = manifest.accuracy
    assert (a.metric, a.reference, a.n, a.method, a.budget) == ("accuracy", 1.0, 60, "Agresti-Min", "10%")
    assert a.drop == a.reference - a.candidate
    assert a.ci95[0] <= a.drop <= a.ci95[1]


def test_shares_of_formats_come_from_the_run_and_not_from_the_graph(compiled):
    achieved = compiled[0].manifest.achieved
    assert achieved.formats == {"int8": 1.0}
    assert achieved.placement == {"cpu": 1.0}
    assert achieved.operators["QLinearConv"] == 2
    assert achieved.operators["QGemm"] == 1
    assert "Conv" not in achieved.operators
    # Weights of the three layers in int8; biases in int32; scales in float.
    assert achieved.weights["int8"] >= 16 * 3 * 9 + 16 * 16 * 9 + 16 * 4
    assert "symmetric" in achieved.scheme
    assert "weights int8 per channel" in achieved.scheme
    assert "activations uint8 per tensor, asymmetric" in achieved.scheme


def test_layers_that_stay_in_float_count_by_their_multiply_accumulates(model, tmp_path):
    artifact, _ = compile(
        model, recipe=yaml.safe_load(INT8), data=_batches(), out=tmp_path / "o",
        overrides=["passes.quantize-static.ignore=[second]"],
    )  # fmt: skip
    share = MACS["second"] / sum(MACS.values())
    assert artifact.manifest.achieved.formats == {
        "fp32": pytest.approx(share, abs=1e-4),
        "int8": pytest.approx(1 - share, abs=1e-4),
    }


def test_the_report_holds_the_measurements(compiled):
    artifact, report = compiled
    again = Report.model_validate_json((artifact.folder / "report.json").read_bytes())
    assert again == report
    assert dump(again) == (artifact.folder / "report.json").read_text()
    assert report.latency.runs >= 5
    assert report.latency.threads == 1
    assert report.latency.ci95[0] <= report.latency.speedup <= report.latency.ci95[1]
    assert report.latency.inputs == "image [1, 3, 12, 12]"
    assert [c.verdict for c in report.candidates] == ["shipped"]
    assert set(report.pass_seconds) == {"remove-noops", "quantize-static"}
    assert (report.missed, report.inconclusive, report.exit_code) == ((), (), 0)
    assert report.resources.peak_rss_bytes > 1e7


def test_nothing_in_the_manifest_tells_when_or_where(compiled):
    artifact, _ = compiled
    text = (artifact.folder / "manifest.json").read_text() + (artifact.folder / "recipe.yaml").read_text()
    assert str(artifact.folder.parent) not in text
    assert "/tmp" not in text
    assert "seconds" not in text
    assert "speedup" not in json.loads((artifact.folder / "manifest.json").read_text())


def test_the_artifact_answers_nearly_as_the_model_does(compiled, model):
    artifact = optkit.load(compiled[0].folder)
    reference = ReferenceSession(model)
    for feeds in _batches(4, seed=9):
        found, expected = artifact.run(feeds)["classes"], reference.run(feeds)["classes"]
        # 8 bits, three layers: some 30 dB.
        assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def test_free_axes_stay_free(compiled):
    session = optkit.load(compiled[0].folder).session(threads=1)
    assert [(s.name, s.shape) for s in session.inputs] == [("image", ("N", 3, 12, 12))]
    assert [(s.name, s.dtype) for s in session.outputs] == [("classes", np.float32)]
    assert session.run(_batches(1, size=5)[0])["classes"].shape == (5, 4)


def test_streams_give_the_outputs_in_the_order_of_the_batches(model, tmp_path):
    plan = {"recipe": 1, "backend": "onnxruntime", "options": {"streams": 3}, "passes": []}
    artifact, _ = compile(model, recipe=plan, out=tmp_path / "out")
    batches = _batches(20)
    assert artifact.streams == 3
    found = [outputs["classes"] for outputs in artifact.run_all(batches)]
    np.testing.assert_array_equal(found, [artifact.run(feeds)["classes"] for feeds in batches])


def test_feeds_of_other_names_are_refused(compiled):
    with pytest.raises(DataError, match=r"unknown input 'picture'.*'image' is missing") as error:
        optkit.load(compiled[0].folder).run({"picture": np.zeros((1, 3, 12, 12), np.float32)})
    assert "the model takes image" in error.value.hint


def test_an_array_without_a_name_is_refused_with_the_names(compiled):
    with pytest.raises(DataError, match="must be a dict of arrays, not ndarray") as error:
        optkit.load(compiled[0].folder).run(np.zeros((1, 3, 12, 12), np.float32))
    assert "'image'" in error.value.hint


@pytest.mark.parametrize(
    "other", [np.float64, list, pytest.param("tensor", marks=pytest.mark.needs("torch"))]
)
def test_feeds_of_other_types_are_converted_as_calibration_data_are(compiled, other):
    artifact, image = optkit.load(compiled[0].folder), _batches(1)[0]["image"]
    if other == "tensor":
        import torch

        given = torch.from_numpy(image)
    else:
        given = image.tolist() if other is list else image.astype(other)
    found = artifact.run({"image": given})["classes"]
    np.testing.assert_array_equal(found, artifact.run({"image": image})["classes"])


def test_integers_for_a_float_input_are_refused_with_what_converts_them(compiled):
    with pytest.raises(DataError, match="is uint8, the model takes float32") as error:
        optkit.load(compiled[0].folder).run({"image": np.zeros((1, 3, 12, 12), np.uint8)})
    assert "scaling" in error.value.hint


def test_a_function_is_no_evaluator(model, tmp_path):
    with pytest.raises(UsageError, match="evaluate is a function") as error:
        compile(model, evaluate=lambda outputs: 0.0, out=tmp_path / "out")
    assert "optkit.Evaluator(samples=" in error.value.hint


# Files that are not what was written


def _copy(compiled, folder: Path) -> Path:
    shutil.copytree(compiled[0].folder, folder)
    return folder


def test_a_file_with_one_other_bit_is_detected(compiled, tmp_path):
    folder = _copy(compiled, tmp_path / "o")
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.onnx is not the file that was written"):
        optkit.load(folder)
    assert optkit.load(folder, verify=False).manifest


def test_a_missing_file_is_detected(compiled, tmp_path):
    folder = _copy(compiled, tmp_path / "o")
    (folder / "model.onnx").unlink()
    with pytest.raises(ModelError, match=r"model\.onnx is missing"):
        optkit.load(folder)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "manifest.json: invalid json"),
        ("{", "manifest.json: invalid json"),
        ("{}", "manifest.json: "),
        ('{"schema": 2}', "manifest.json: schema:"),
    ],
)
def test_a_manifest_that_is_none_is_refused_with_its_name(compiled, tmp_path, text, part):
    folder = _copy(compiled, tmp_path / "o")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UsageError) as caught:
        optkit.load(folder)
    assert part in str(caught.value)
    assert ": :" not in str(caught.value)


def test_options_that_the_backend_does_not_know_are_refused_with_their_place(compiled, tmp_path):
    folder = _copy(compiled, tmp_path / "o")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["options"]["threads"] = "many"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"manifest\.json: options\.threads: ") as caught:
        optkit.load(folder).run({})
    assert "another version" in caught.value.hint


def test_a_folder_that_is_no_artifact_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not an artifact"):
        optkit.load(tmp_path)


# The same again

AGAIN = """
import sys
import numpy as np
from optkit.compiler import compile
random = np.random.default_rng(1)
batches = [{"image": random.normal(size=(1, 3, 12, 12)).astype(np.float32)} for _ in range(8)]
compile(sys.argv[1], recipe=sys.argv[2], data=batches, out=sys.argv[3])
"""


def _bytes(folder: Path) -> dict[str, bytes]:
    return {n: (folder / n).read_bytes() for n in ("model.onnx", "manifest.json", "recipe.yaml")}


@pytest.mark.parametrize("name", ["explicit", "auto"])
def test_the_same_compile_gives_the_same_bytes_in_another_process(model, tmp_path, name):
    recipe = tmp_path / "mine.yaml"
    if name == "explicit":
        recipe.write_text(INT8)
    else:
        # What auto found, written out, gives the same artifact.
        compile(model, data=_batches(), out=tmp_path / "auto", overrides=["limits.min_speedup=0"])
        recipe.write_bytes((tmp_path / "auto" / "recipe.yaml").read_bytes())
    compile(model, recipe=recipe, data=_batches(), out=tmp_path / "here")
    # Hashes of strings differ between processes, and with them the order of sets.
    subprocess.run(
        [sys.executable, "-c", AGAIN, str(model), str(recipe), str(tmp_path / "there")],
        check=True, env={"PYTHONHASHSEED": "12345", "PATH": ""},
    )  # fmt: skip
    assert _bytes(tmp_path / "here") == _bytes(tmp_path / "there")
    if name == "auto":
        assert _bytes(tmp_path / "auto") == _bytes(tmp_path / "here")


def test_a_path_bytes_and_a_graph_give_the_same_model(model, tmp_path):
    graph = ir.load(model)
    for name, source in (("path", model), ("bytes", model.read_bytes()), ("graph", graph)):
        compile(source, recipe=yaml.safe_load(INT8), data=_batches(), out=tmp_path / name)
    first = (tmp_path / "path" / "model.onnx").read_bytes()
    assert (tmp_path / "bytes" / "model.onnx").read_bytes() == first
    assert (tmp_path / "graph" / "model.onnx").read_bytes() == first
    assert [n.op_type for n in graph.graph] == [n.op_type for n in ir.load(model).graph]


# What is asked for


def test_a_missed_limit_is_said_and_the_best_that_is_feasible_ships(model, tmp_path):
    artifact, report = compile(
        model,
        recipe=yaml.safe_load(INT8),
        data=_batches(),
        out=tmp_path / "o",
        overrides=["limits.min_cosine=1"],
    )
    assert report.exit_code == 3
    assert "cosine to the fp32 reference" in report.missed[0]
    assert [(c.name, c.verdict) for c in report.candidates] == [("recipe", "missed"), ("float", "shipped")]
    assert artifact.manifest.achieved.formats == {"fp32": 1.0}
    assert [p.name for p in artifact.manifest.passes] == ["remove-noops"]


@pytest.mark.parametrize(
    ("require", "missed"),
    [
        ('formats.int8=">=0.9"', None),
        ("formats.int8=>=0.9", None),
        ("formats.fp32===0", None),
        ("operators.QLinearConv=>=3", "require operators.QLinearConv >=3: the artifact shows 2"),
        ("formats.int8=<0.5", "require formats.int8 <0.5: the artifact shows 1"),
    ],
)
def test_what_the_artifact_must_show_is_checked_on_what_was_built(model, tmp_path, require, missed):
    require = require.replace('"', "")
    _, report = compile(
        model,
        recipe=yaml.safe_load(INT8),
        data=_batches(),
        out=tmp_path / "o",
        overrides=[f"require.{require}"],
    )
    assert report.missed == (() if missed is None else (missed,))


def test_comparisons_of_requirements():
    facts = Achieved(formats={"int8": 0.5}, placement={}, operators={"Conv": 3}, weights={}, scheme="")
    held = {
        "formats.int8": ">=0.5",
        "operators.Conv": "== 3",
        "weights.int8": "<=0",
        "placement.cpu": "<1e-3",
    }
    assert unmet(held, facts) == []
    assert len(unmet({"formats.int8": ">0.5", "operators.Conv": "<3"}, facts)) == 2


def test_without_data_auto_tries_what_needs_none_and_says_what_data_would_open(model, tmp_path):
    artifact, report = compile(model, out=tmp_path / "o")
    assert artifact.manifest.data is None
    assert artifact.manifest.fidelity.inputs == "inputs drawn from the input specification"
    assert {c.name for c in report.candidates} & {"int8-static", "int8-static-mse"} == set()
    assert any("--calib" in a and "int8-static" in a for a in report.advice)
    assert any("--eval" in a for a in report.advice)


def test_static_quantization_without_data_is_refused_before_the_model_is_read(tmp_path):
    with pytest.raises(DataError, match="quantize-static needs calibration data") as caught:
        compile(tmp_path / "gone.onnx", recipe=yaml.safe_load(INT8), out=tmp_path / "o")
    assert "--calib" in caught.value.hint
    with pytest.raises(DataError, match="calibration data"):
        compile(tmp_path / "gone.onnx", precision="int8", out=tmp_path / "o")


def test_drawn_data_is_marked_and_never_sold_as_held_out(model, tmp_path):
    artifact, _ = compile(model, recipe=yaml.safe_load(INT8), data="random", out=tmp_path / "o")
    assert artifact.manifest.data.random
    assert artifact.manifest.fidelity.inputs == "inputs drawn from the input specification"


@pytest.mark.parametrize(
    ("n", "inputs", "calibrated"), [(8, "held-out calibration data", 6), (3, "calibration data", 3)]
)
def test_fidelity_is_measured_on_batches_that_calibration_has_not_seen(
    model, tmp_path, n, inputs, calibrated
):
    artifact, _ = compile(model, recipe=yaml.safe_load(INT8), data=_batches(n), out=tmp_path / "o")
    assert (artifact.manifest.fidelity.inputs, artifact.manifest.data.batches) == (inputs, calibrated)


def test_integers_inside_of_kernels_are_no_floats():
    graph = parse(
        """<ir_version: 10, opset_import: ["" : 21, "optkit" : 1]>
        g (int8[N, 32] q, float16[N, 32] x) => (float16[N, 16] y, int8[N, 32] k) <float step = {0.1}, int8 zero = {3}> {
          y = optkit.LinearInt8 (q, w, s, m, b) k = optkit.Quantize (x, step, zero) }""",
        w=np.ones((16, 32), np.int8), s=np.ones(16, np.float32), m=np.zeros(16, np.int32), b=np.zeros(16, np.float16),
    )  # fmt: skip
    assert scheme(graph) == "weights int8 in LinearInt8; activations int8 in LinearInt8"


def test_an_exact_recipe_needs_no_data_and_loses_nothing(model, tmp_path):
    artifact, report = compile(
        model, precision="fp32", out=tmp_path / "o", overrides=["limits.min_speedup=0"]
    )
    assert report.missed == ()
    assert artifact.manifest.fidelity.cosine == pytest.approx(1)
    assert artifact.manifest.fidelity.sqnr_db > 90
    assert artifact.manifest.achieved.scheme == "no integers: float throughout"


def test_candidates_get_the_limits_options_and_seed_of_the_recipe_that_lists_them(model, tmp_path):
    artifact, _ = compile(
        model, data=_batches(), out=tmp_path / "o", seed=7,
        recipe={"recipe": 1, "candidates": ["fp32"], "options": {"threads": 3}, "limits": {"min_speedup": 0, "min_cosine": 0.5}},
    )  # fmt: skip
    resolved = Recipe.load(artifact.folder / "recipe.yaml")
    assert (resolved.options["threads"], resolved.seed, resolved.limits.min_cosine) == (3, 7, 0.5)
    assert (resolved.target, resolved.backend, resolved.candidates) == ("cpu", "onnxruntime", ())
    assert artifact.manifest.recipe_digest == resolved.digest
    assert artifact.manifest.options["threads"] == 3


@pytest.mark.parametrize("precision", ["int8", "w4a16"])
def test_a_precision_that_no_recipe_makes_for_a_target_is_refused_and_not_shipped_in_float(
    model, precision, tmp_path
):
    """Every candidate is for another backend: what was left was the floor, with exit code 0."""
    named = tuple(
        name
        for name in Recipe.load(precision).candidates
        if Recipe.load(name).backend not in (None, "onnxruntime")
    )
    assert named
    recipe = {"recipe": 1, "candidates": ["fp32", *named]}
    with pytest.raises(UsageError, match=f"none of {', '.join(named)} is for onnxruntime and cpu"):
        optkit.compile(model, target="cpu", backend="onnxruntime", recipe=recipe, out=tmp_path / "out")


def test_a_list_of_lossy_candidates_has_float_as_its_floor(model, tmp_path):
    recipe = {"recipe": 1, "candidates": ["int8-static"], "limits": {"min_cosine": 1}}
    artifact, report = compile(model, data=_batches(), out=tmp_path / "o", recipe=recipe)
    assert artifact.manifest.achieved.formats == {"fp32": 1.0}
    # Whether it is faster at all is chance with so small a model.
    assert {c.name: c.verdict for c in report.candidates}["int8-static"] in ("missed", "slower", "farther")


@pytest.mark.parametrize(
    ("arguments", "kind", "parts"),
    [
        ({"recipe": "fp32", "precision": "int8"}, UsageError, ["a recipe and a precision"]),
        ({"precision": "int7"}, UnknownNameError, ["unknown precision 'int7'", "int8"]),
        ({"precision": "mxfp4"}, UsageError, ["no backend of this version makes it"]),
        ({"precision": "int8-sym"}, UsageError, ["no backend of this version makes it"]),
        ({"precision": "int8-g128"}, UsageError, ["no backend of this version makes it"]),
        ({"precision": "w4a16-g128"}, UsageError, ["no backend of this version makes it", "w4a16"]),
        ({"target": "cpus"}, UnknownNameError, ["unknown target 'cpus'", "cpu"]),
        ({"backend": "onnxruntim"}, UnknownNameError, ["unknown backend 'onnxruntim'", "onnxruntime"]),
        ({"precision": "fp32", "max_drop": "1%"}, UsageError, ["max-drop needs an evaluator"]),
        ({"precision": "fp32", "max_drop": "lots"}, UsageError, ["max-drop 'lots'"]),
        ({"precision": "fp32", "seed": -1}, UsageError, ["seed -1"]),
        ({"precision": "fp32", "overrides": ["options.thread=2"]}, RecipeError, ["options: unknown option 'thread'", "threads"]),
        ({"precision": "fp32", "overrides": ["options.threads=-2"]}, RecipeError, ["options: threads:"]),
        ({"overrides": ["options.thread=2"]}, RecipeError, ["unknown option 'thread'"]),
        ({"recipe": {"recipe": 1, "candidates": ["int8"]}}, RecipeError, ["int8 has candidates itself"]),
        ({"recipe": {"recipe": 1, "candidates": ["int9"]}}, UnknownNameError, ["unknown recipe 'int9'"]),
        ({"data": []}, DataError, ["no batches"]),
        ({"data": [{"image": np.zeros((1, 3, 12, 13), np.float32)}]}, DataError, ["image", "axis 3"]),
        ({"data": [{"x": np.zeros((1, 3, 12, 12), np.float32)}]}, DataError, ["unknown input 'x'"]),
        ({"data": [{"image": np.full((1, 3, 12, 12), np.nan, np.float32)}]}, DataError, ["NaN"]),
        ({"data": (b for b in _batches())}, DataError, ["read only once"]),
        ({"evaluate": "gone.py"}, UsageError, ["gone.py: no such file"]),
    ],
)  # fmt: skip
def test_what_is_asked_wrongly_is_refused_and_nothing_is_written(model, tmp_path, arguments, kind, parts):
    arguments.setdefault("data", arguments.get("data", None))
    with pytest.raises(kind) as caught:
        compile(model, out=tmp_path / "o", **arguments)
    assert caught.value.exit_code == 2
    for part in parts:
        assert part in f"{caught.value} | {caught.value.hint}"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_in_it_is_not_overwritten(model, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not an artifact"):
        compile(model, precision="fp32", out=tmp_path / "o")
    assert (tmp_path / "o" / "thesis.txt").read_text() == "years of work"


def test_an_old_artifact_is_replaced_whole(compiled, model, tmp_path):
    folder = _copy(compiled, tmp_path / "o")
    (folder / "left.over").write_text("x")
    compile(model, precision="fp32", out=folder)
    assert "left.over" not in [p.name for p in folder.iterdir()]
    assert optkit.load(folder).manifest.achieved.formats == {"fp32": 1.0}


def test_a_compile_that_fails_leaves_the_old_artifact_and_nothing_beside_it(compiled, model, tmp_path):
    folder = _copy(compiled, tmp_path / "o")
    before = _bytes(folder)
    bad = [{"image": np.zeros((1, 3, 12, 12), np.float32)}, {"image": np.zeros((1, 3, 12, 11), np.float32)}]
    with pytest.raises(OptkitError):
        compile(model, recipe=yaml.safe_load(INT8), data=bad, out=folder)
    assert _bytes(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_a_model_with_nothing_to_quantize_says_so(tmp_path):
    plain = parse('<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Exp(x) }')
    with pytest.raises(OptkitError, match="nothing in model was changed"):
        compile(plain, recipe=yaml.safe_load(INT8), data=[{"x": np.ones(2, np.float32)}], out=tmp_path / "o")


@pytest.mark.parametrize("recipe", ["onnxruntime-w4", "int8-dynamic"])
def test_a_shipped_recipe_that_finds_nothing_says_so(tmp_path, recipe):
    """An option that only products with such weights heed is no change of the numbers."""
    plain = parse('<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Exp(x) }')
    with pytest.raises(OptkitError, match="nothing in model was changed"):
        compile(plain, recipe=recipe, out=tmp_path / "o")


def test_a_candidate_whose_outputs_are_no_numbers_is_left_out(model, tmp_path, evaluator, caplog):
    """A score that the candidate's outputs make NaN is the candidate's fault, not the evaluator's."""
    first = ReferenceSession(model).run(_batches(1, seed=2)[0])["classes"]

    def score(outputs, label):
        # NaN for everything but what float gives.
        return float("nan") if label == -1 and not np.allclose(outputs["classes"], first, atol=1e-4) else 1.0

    picky = Evaluator(samples=lambda: iter([(_batches(1, seed=2)[0], -1)] * 3), score=score, metric="picky")
    with caplog.at_level(logging.WARNING):
        artifact, report = compile(
            model, recipe=yaml.safe_load(INT8), data=_batches(), evaluate=picky, out=tmp_path / "o"
        )
    assert artifact.manifest.achieved.formats == {"fp32": 1.0}
    assert "cannot be judged" in report.missed[0]


def test_one_sample_makes_a_manifest_that_reads_back(model, tmp_path):
    single = Evaluator(samples=lambda: iter([(_batches(1)[0], 0)]), score=lambda o, label: 0.5, metric="half")
    artifact, report = compile(
        model, precision="fp32", evaluate=single, out=tmp_path / "o", overrides=["limits.min_speedup=0"]
    )
    assert Manifest.model_validate_json((artifact.folder / "manifest.json").read_bytes()) == report.manifest
    json.loads((artifact.folder / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert report.manifest.accuracy.met == "inconclusive"


# Stopping early


class _Scored(Compilation):
    """The real compilation, which evaluates a candidate on as many of 200 samples as it needs."""

    asked = 0

    def session(self, built, options=None, threads=1):
        outer = self

        class Answers(Session):
            def run(self, feeds):
                outer.asked += 1
                return {"y": feeds["x"] - built.bytes / 1000}

            def close(self):
                pass

        return Answers()


@pytest.mark.parametrize(
    ("drop", "asked", "verdict"),
    [
        (0.5, 40, "missed"),
        (0.04, 40, "missed"),
        (0.0305, 200, "missed"),
        (0.02, 200, "missed"),
        (0.005, 200, "met"),
    ],
)
def test_a_hopeless_candidate_is_evaluated_on_a_fifth_of_the_samples(tmp_path, drop, asked, verdict):
    one = parse(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[1] x) => (float[1] y) { y = Identity(x) }'
    )
    random = np.random.default_rng(0)
    samples = [({"x": random.normal(1, 0.01, 1).astype(np.float32)}, None) for _ in range(200)]
    evaluator = Evaluator(samples=lambda: iter(samples), score=lambda o, label: float(o["y"][0]), metric="m")
    work = _Scored(
        read(one), target("cpu"), OnnxRuntime(), None, evaluator, seed=0, folder=tmp_path, progress=Silent()
    )
    recipe = Recipe.load({"recipe": 1, "limits": {"max_drop": "0.01"}})
    built = Built(
        name="x", recipe=recipe, folder=tmp_path, records=[], seconds={}, bytes=int(drop * 1000) if drop != 0.0305 else 30,
        lossy=True, scheme="", weights={},
    )  # fmt: skip
    work.judge(built, recipe.limits)
    assert work.asked == asked
    assert built.accuracy.n == asked
    assert built.accuracy.verdict == verdict
    assert built.accuracy.drop == pytest.approx(built.bytes / 1000, abs=1e-6)


# Targets, and the number of threads


def test_targets_are_found_in_any_case_and_given_back():
    assert target("CPU") is TARGETS["cpu"]
    assert target(TARGETS["cpu"]) is TARGETS["cpu"]
    with pytest.raises(UnknownNameError, match="unknown target 'gpu'"):
        target("gpu")


def test_exit_codes_follow_from_what_was_missed(compiled):
    report = compiled[1]
    for missed, open_, code in (((), (), 0), (("a",), (), 3), ((), ("b",), 5), (("a",), ("b",), 3)):
        assert report.model_copy(update={"missed": missed, "inconclusive": open_}).exit_code == code


def test_timings_of_the_report_are_in_milliseconds(model, tmp_path, monkeypatch):
    planted = Speedup(
        reference=Timing(median=0.004, p99=0.005, wall=0.006, runs=9, warmup=2),
        candidate=Timing(median=0.002, p99=0.003, wall=0.0025, runs=9, warmup=2),
        ratio=2.0, ci95=(1.9, 2.1), threads=1, loaded=True,
    )  # fmt: skip
    monkeypatch.setattr(Compilation, "measure", lambda *_, **__: planted)
    _, report = compile(model, precision="fp32", out=tmp_path / "o")
    found = report.latency
    assert (found.reference_ms, found.candidate_ms, found.candidate_p99_ms) == (4, 2, 3)
    assert (found.wall_reference_ms, found.wall_candidate_ms) == (6, 2.5)
    assert (found.speedup, found.ci95, found.runs, found.loaded) == (2, (1.9, 2.1), 9, True)


def test_no_more_batches_are_alive_when_there_are_more(model, tmp_path, monkeypatch):
    # What takes little memory is kept on purpose.
    monkeypatch.setattr(CalibrationData, "remembered", lambda self: self)

    def most_alive(n):
        references, most = [], 0

        def batches():
            nonlocal most
            for batch in _batches(n):
                array = batch["image"].copy()
                references.append(weakref.ref(array))
                yield {"image": array}
                del array
                most = max(most, sum(r() is not None for r in references))

        compile(model, recipe=yaml.safe_load(INT8), data=CalibrationData(batches), out=tmp_path / "o")
        return most

    assert most_alive(40) == most_alive(12) < 12


def test_the_cost_counts_what_processes_spent_that_have_ended():
    started = clocks()
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert resources(started).cpu_seconds >= 0.3
