"""``optkit quantize`` writes what ``optkit compile`` builds, and nothing where it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

_DYNAMIC = "recipe: 1\npasses: [remove-noops, {quantize-dynamic: {smallest: 1}}]\nlimits: {min_speedup: 0}\n"
_FLOAT = "recipe: 1\npasses: [remove-noops]\nlimits: {min_speedup: 0}\n"


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_it_writes_the_bytes_that_compile_ships(optkit, given, tmp_path, kind):
    recipe = given / "recipe.yaml"
    if kind == "dynamic":
        recipe = tmp_path / "dynamic.yaml"
        recipe.write_text(_DYNAMIC)
    shared = (given / "model.onnx", "-r", recipe, "--calib", given / "calib")
    ran = optkit("quantize", *shared, "-o", "quantized.onnx")
    assert (ran.code, ran.out) == (0, "quantized.onnx\n"), ran.err
    assert optkit("compile", *shared, "-o", "build").code == 0
    assert Path("quantized.onnx").read_bytes() == Path("build/model.onnx").read_bytes()


def test_quantize_then_compile_is_compile(optkit, given, artifact, tmp_path):
    (tmp_path / "float.yaml").write_text(_FLOAT)
    assert (
        optkit(
            "quantize",
            given / "model.onnx",
            "-r",
            given / "recipe.yaml",
            "--calib",
            given / "calib",
            "-o",
            "q.onnx",
        ).code
        == 0
    )
    assert optkit("compile", "q.onnx", "-r", "float.yaml", "-o", "build").code == 0
    assert Path("build/model.onnx").read_bytes() == (artifact / "model.onnx").read_bytes()


def test_it_runs_and_says_what_was_not_done(optkit, given):
    ran = optkit(
        "quantize",
        given / "model.onnx",
        "-r",
        given / "recipe.yaml",
        "--calib",
        given / "calib",
        "-o",
        "folder",
    )
    assert ran.out == "folder/model.onnx\n"
    assert "weights int8 per channel, symmetric; activations uint8 per tensor, asymmetric" in ran.err
    assert "nothing was timed, and no accuracy was measured" in ran.err
    session = onnxruntime.InferenceSession("folder/model.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.zeros((3, 32), np.float32)})[0].shape == (3, 10)


def test_json_lists_passes_and_files(optkit, given):
    document = optkit(
        "quantize",
        given / "model.onnx",
        "-r",
        given / "recipe.yaml",
        "--calib",
        given / "calib",
        "-o",
        "q.onnx",
        "--json",
    ).json
    assert document["files"] == ["q.onnx"]
    assert document["bytes"] == Path("q.onnx").stat().st_size
    assert [p["name"] for p in document["passes"]] == ["remove-noops", "quantize-static"]
    assert document["nodes"]["after"] > document["nodes"]["before"]


def test_weights_in_a_file_of_their_own_stay_mapped_and_come_along(optkit, given, tmp_path):
    model = onnx.load(given / "model.onnx")
    onnx.save(model, tmp_path / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    (tmp_path / "dynamic.yaml").write_text(_DYNAMIC)
    ran = optkit("quantize", "big.onnx", "-r", "dynamic.yaml", "-o", "q.onnx", "--memory", "2GiB")
    assert ran.code == 0, ran.err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["big.data", "big.onnx", "dynamic.yaml", "q.onnx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-r", "auto"], "recipe auto chooses among"),
        (["-r", "{given}/recipe.yaml"], "needs calibration data"),
        (["-r", "{given}/recipe.yaml", "-p", "int8"], "a recipe and a precision were given"),
        (
            ["-r", "{given}/recipe.yaml", "--calib", "{given}/calib", "-o", "{given}/model.onnx"],
            "is the model itself",
        ),
        (
            ["-r", "{given}/recipe.yaml", "--calib", "{given}/calib", "--memory", "1MB"],
            "--memory allows 1 MiB",
        ),
    ],
)
def test_mistakes(optkit, given, tmp_path, arguments, message):
    ran = optkit("quantize", given / "model.onnx", *(a.format(given=given) for a in arguments))
    assert ran.code == 2
    assert message in ran.err
    assert not list(tmp_path.iterdir())


def test_a_model_with_nothing_to_quantize_is_an_error(optkit, given, tmp_path):
    source = (
        '<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, 32] x) => (float[N, 32] y) { y = Relu(x) }'
    )
    onnx.save(onnx.parser.parse_model(source), tmp_path / "relu.onnx")
    ran = optkit(
        "quantize", "relu.onnx", "-r", given / "recipe.yaml", "--calib", given / "calib", "-o", "q.onnx"
    )
    assert ran.code == 1
    assert "quantize-static: nothing in relu.onnx was changed" in ran.err
    assert "optkit inspect relu.onnx --why" in ran.err
    assert not Path("q.onnx").exists()


def test_what_a_file_needs_to_be_loaded_is_said(optkit, tmp_path):
    import onnx_ir as ir

    from optkit.testing import parse

    graph = '<ir_version: 10, opset_import: ["" : 21]>\ng (float[b, t, 16] x) => (y) { p = Transpose<perm = [1, 0, 2]>(x) y = MatMul(p, w) }'
    ir.save(
        parse(graph, w=np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)),
        tmp_path / "turned.onnx",
    )
    ran = optkit("quantize", tmp_path / "turned.onnx", "-p", "fp16", "-o", "half.onnx", "--json")
    assert any("disabled_optimizers=['MatmulTransposeFusion']" in note for note in ran.json["notes"])
    off = ["MatmulTransposeFusion"]
    session = onnxruntime.InferenceSession(
        "half.onnx", providers=["CPUExecutionProvider"], disabled_optimizers=off
    )
    assert session.run(None, {"x": np.zeros((2, 3, 16), np.float32)})[0].shape == (3, 2, 4)
