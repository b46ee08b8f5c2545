"""``optkit eval`` and ``optkit bench``: gates, ratios, and what they were taken on."""

from __future__ import annotations

import shutil

import onnx
import pytest


def test_eval_of_one_model(optkit, given):
    ran = optkit("eval", given / "model.onnx", "--eval", given / "eval.py")
    assert ran.code == 0, ran.err
    assert "accuracy" in ran.out
    document = optkit("eval", given / "model.onnx", "--eval", given / "eval.py", "--json").json
    assert (document["metric"], document["n"]) == ("accuracy", 40)
    assert f"{document['value']:.4f}" in ran.out


@pytest.mark.parametrize(("drop", "code", "verdict"), [("1.0", 0, "met"), ("0.0", None, None)])
def test_eval_against_another_model_is_a_gate(optkit, given, artifact, drop, code, verdict):
    ran = optkit(
        "eval",
        artifact,
        "--eval",
        given / "eval.py",
        "--against",
        given / "model.onnx",
        "--max-drop",
        drop,
        "--json",
    )
    document = ran.json
    assert (
        ran.code == document["exit_code"] == {"met": 0, "missed": 3, "inconclusive": 5}[document["verdict"]]
    )
    assert code is None or (ran.code, document["verdict"]) == (code, verdict)
    assert document["ci95"][0] <= document["drop"] <= document["ci95"][1]
    assert document["drop"] == pytest.approx(document["reference"] - document["candidate"])


def test_eval_misses_where_the_model_is_ruined(optkit, given, tmp_path):
    model = onnx.load(given / "model.onnx")
    (head,) = [t for t in model.graph.initializer if t.name == "w3"]
    head.raw_data = bytes(len(head.raw_data))
    onnx.save(model, tmp_path / "ruined.onnx")
    agreement = f"""
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession({str(given / "model.onnx")!r})
def samples():
    random = np.random.default_rng(3)
    for _ in range(50):
        x = random.standard_normal((1, 32)).astype(np.float32)
        yield {{"x": x}}, int(session.run(None, {{"x": x}})[0].argmax())
def score(outputs, label):
    return float(outputs["y"].argmax() == label)
"""
    (tmp_path / "agreement.py").write_text(agreement)
    ran = optkit(
        "eval", "ruined.onnx", "--eval", "agreement.py", "--against", given / "model.onnx", "--max-drop", "1%"
    )
    assert ran.code == 3
    assert "missed: the drop is beyond the allowed 1%" in ran.out
    assert "agreement" in ran.out


def test_eval_mistakes(optkit, given, tmp_path):
    assert "Missing option".lower() in optkit("eval", given / "model.onnx").err.lower()
    ran = optkit("eval", given / "model.onnx", "--eval", given / "eval.py", "--max-drop", "1%")
    assert (ran.code, "needs --against" in ran.err) == (2, True)
    (tmp_path / "empty").mkdir()
    assert "not an artifact" in optkit("eval", "empty", "--eval", given / "eval.py").err
    wrong = (given / "eval.py").read_text().replace('{"x": x}', '{"x": x[:, 1:]}')
    (tmp_path / "wrong.py").write_text(wrong)
    ran = optkit("eval", given / "model.onnx", "--eval", "wrong.py")
    assert (ran.code, "sample 0: input 'x' has size 31 at axis 1, not 32" in ran.err) == (2, True)


def test_a_damaged_artifact_is_not_run(optkit, given, artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "copy")
    (tmp_path / "copy" / "model.onnx").write_bytes((given / "model.onnx").read_bytes())
    ran = optkit("eval", "copy", "--eval", given / "eval.py")
    assert ran.code == 1
    assert "model.onnx is not the file that was written" in ran.err


def test_bench_of_one_model(optkit, given):
    ran = optkit("bench", given / "model.onnx", "--runs", 5)
    assert ran.code == 0, ran.err
    assert "Median" in ran.out
    assert "1 thread, CPU time" in ran.err
    assert "free axes set to N = 1" in ran.err


def test_bench_in_turn_gives_a_ratio_with_an_interval(optkit, given, artifact):
    ran = optkit(
        "bench", artifact, "--against", given / "model.onnx", "--calib", given / "calib", "--runs", 9
    )
    assert "the speed of" in ran.out
    assert "(95% " in ran.out
    assert "batches of calib" in ran.err
    document = optkit(
        "bench", artifact, "--against", given / "model.onnx", "--runs", 9, "--batch", 3, "--json"
    ).json
    assert document["clock"] == "CPU time"
    assert document["inputs"] == "x [3, 32]"
    assert document["ci95"][0] <= document["speedup"] <= document["ci95"][1]
    assert document["model"]["runs"] == document["against"]["runs"] == 9


def test_bench_on_several_threads_goes_by_the_wall_clock(optkit, given):
    document = optkit("bench", given / "model.onnx", "--runs", 5, "--threads", 2, "--json").json
    assert document["clock"] == "wall-clock time"
    assert document["model"]["median_ms"] == document["model"]["wall_ms"]


def test_bench_takes_shapes(optkit, given):
    assert (
        optkit("bench", given / "model.onnx", "--runs", 5, "--shape", "x=7x32", "--json").json["inputs"]
        == "x [7, 32]"
    )
    for shape, message in (
        ("y=7x32", "unknown input 'y'"),
        ("x=7x33", "the model takes x"),
        ("x", "INPUT=SIZES is wanted"),
    ):
        ran = optkit("bench", given / "model.onnx", "--shape", shape)
        assert (ran.code, message in ran.err) == (2, True), ran.err
