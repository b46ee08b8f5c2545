"""``optkit eval`` and ``optkit bench``: gates, ratios, and what they were taken on."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from optkit.testing import parse


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


def test_diff_says_of_each_output_how_far_it_is_from_the_others(optkit, given, tmp_path):
    model = onnx.load(given / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "w3":
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array * 1.1), "w3"))
    onnx.save(model, tmp_path / "scaled.onnx")
    batch = {"x": np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)}
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "batch.npz", **batch)
    a, b = (
        onnxruntime.InferenceSession(str(f)).run(["y"], batch)[0]
        for f in (given / "model.onnx", tmp_path / "scaled.onnx")
    )
    command = ("diff", "scaled.onnx", "--against", given / "model.onnx", "--calib", "data")
    document = optkit(*command, "--json").json
    found = document["outputs"]["y"]
    assert found["sqnr_db"] == pytest.approx(
        10 * np.log10(np.square(a).sum() / np.square(a - b).sum()), abs=0.1
    )
    assert found["largest"] == pytest.approx(np.abs(a - b).max() / np.ptp(a), rel=1e-3)
    assert found["agreement"] == (a.argmax(-1) == b.argmax(-1)).mean()
    assert "missed" not in document and document["exit_code"] == 0
    ran = optkit(*command)
    assert ran.code == 0 and f"{found['sqnr_db']:.1f} dB" in ran.out and "missed" not in ran.out


@pytest.mark.parametrize(("limits", "missed"), [
    (("--min-sqnr", "10"), False), (("--min-sqnr", "60"), True), (("--min-cosine", "0.99"), False),
    (("--min-cosine", "1"), True),
])  # fmt: skip
def test_diff_is_a_gate_where_limits_are_given(optkit, given, tmp_path, limits, missed):
    model = onnx.load(given / "model.onnx")
    (head,) = [t for t in model.graph.initializer if t.name == "w3"]
    array = onnx.numpy_helper.to_array(head)
    head.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array * 1.01), "w3"))
    onnx.save(model, tmp_path / "scaled.onnx")
    ran = optkit("diff", "scaled.onnx", "--against", given / "model.onnx", *limits)
    assert ran.code == (3 if missed else 0)
    assert ("missed" in ran.out) == missed
    document = optkit("diff", "scaled.onnx", "--against", given / "model.onnx", *limits, "--json").json
    assert document["missed"] == (["y"] if missed else []) and document["exit_code"] == ran.code


def test_diff_misses_any_limit_where_shapes_or_integers_differ(optkit, tmp_path):
    head = '<ir_version: 10, opset_import: ["" : 21]>\n'
    body = "g (float[2, 3] x) => (int64[2] i, float[%s] f) { i = %s<axis = 1, keepdims = 0>(x) f = ReduceSum<keepdims = %d>(x, a) }"
    for name, (size, kind, keep) in {"a": ("2", "ArgMax", 0), "b": ("2, 1", "ArgMin", 1)}.items():
        onnx.save(
            ir.to_proto(parse(head + body % (size, kind, keep), a=np.array([1]))), tmp_path / f"{name}.onnx"
        )
    ran = optkit("diff", tmp_path / "b.onnx", "--against", tmp_path / "a.onnx", "--min-cosine", "0")
    assert ran.code == 3 and "shapes differ" in ran.out
    document = optkit(
        "diff", tmp_path / "b.onnx", "--against", tmp_path / "a.onnx", "--min-cosine", "0", "--json"
    ).json
    assert document["missed"] == ["i", "f"] and not document["outputs"]["f"]["shapes_equal"]
    assert document["outputs"]["i"]["cosine"] is None


def test_diff_of_models_with_other_outputs_says_which(optkit, given, tmp_path):
    model = onnx.load(given / "model.onnx")
    model.graph.output[0].name = next(n for n in model.graph.node if "y" in n.output).input[0]
    onnx.save(model, tmp_path / "other.onnx")
    ran = optkit("diff", "other.onnx", "--against", given / "model.onnx")
    assert ran.code == 2 and "has no output y" in ran.err and "by name" in ran.err


def test_diff_of_models_with_other_inputs_says_which(optkit, given, tmp_path):
    model = onnx.load(given / "model.onnx")
    for node in model.graph.node:
        node.input[:] = ["z" if name == "x" else name for name in node.input]
    model.graph.input[0].name = "z"
    onnx.save(model, tmp_path / "other.onnx")
    ran = optkit("diff", "other.onnx", "--against", given / "model.onnx")
    assert ran.code == 2 and "other.onnx takes z" in ran.err and "x" in ran.err, ran.err


def test_diff_refuses_a_cosine_beyond_one(optkit, given):
    ran = optkit("diff", given / "model.onnx", "--against", given / "model.onnx", "--min-cosine", "2")
    assert ran.code == 2 and "min-cosine" in ran.err
