"""``optkit compile``: what it writes and prints, and what it says to mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

import optkit as library
from optkit.registry import Registry


def test_it_prints_the_folder_and_says_what_it_did(optkit, given):
    ran = optkit(
        "compile",
        given / "model.onnx",
        "-r",
        given / "recipe.yaml",
        "--calib",
        given / "calib",
        "--eval",
        given / "eval.py",
        "--max-drop",
        "1.0",
        "-o",
        "build",
    )
    assert (ran.code, ran.out) == (0, "build\n"), ran.err
    for wanted in (
        "model.onnx for cpu", "Latency", "measured on this machine, 1 thread, CPU time", "95%", "accuracy", "n = 40", "met", "allowed drop of 1", "int8", "of the multiply-accumulates",
        "nodes", "kB", "The request was met: recipe was shipped", "build/report.html",
    ):  # fmt: skip
        assert wanted in ran.err, wanted
    names = ["manifest.json", "model.onnx", "recipe.yaml", "report.html", "report.json"]
    assert sorted(f.name for f in Path("build").iterdir()) == names
    outputs = library.load("build").run({"x": np.zeros((2, 32), np.float32)})
    assert outputs["y"].shape == (2, 10)


def test_json_is_the_report(optkit, given):
    ran = optkit(
        "compile",
        given / "model.onnx",
        "-r",
        given / "recipe.yaml",
        "--calib",
        given / "calib",
        "-o",
        "out",
        "--json",
        "-q",
    )
    assert ran.code == 0
    document = ran.json
    assert document["artifact"] == "out"
    assert document["exit_code"] == 0
    assert document["latency"]["speedup"] > 0
    assert document["manifest"]["fidelity"]["inputs"] == "held-out calibration data"
    assert document["manifest"]["accuracy"] is None
    assert ran.err == ""
    written = json.loads(Path("out/report.json").read_text())
    assert {k: v for k, v in document.items() if k not in ("artifact", "exit_code")} == written


def test_fidelity_is_not_sold_as_accuracy(optkit, given):
    ran = optkit("compile", given / "model.onnx", "-r", given / "recipe.yaml", "--calib", given / "calib")
    assert "this is not an accuracy" in ran.err
    assert "Accuracy " not in ran.err


def test_a_missed_limit_ships_the_best_feasible_and_exits_with_3(optkit, given):
    ran = optkit(
        "compile",
        given / "model.onnx",
        "-r",
        given / "recipe.yaml",
        "--calib",
        given / "calib",
        "--set",
        "limits.min_cosine=1.0",
        "-o",
        "out",
    )
    assert (ran.code, ran.out) == (3, "out\n")
    assert "The request was not met; float was shipped" in ran.err
    assert "at least 1 is asked for" in ran.err
    assert library.load("out").manifest.achieved.formats == {"fp32": 1.0}


def test_what_the_samples_cannot_decide_ships_unless_strict(optkit, given):
    arguments = (
        "compile",
        given / "model.onnx",
        "-r",
        given / "recipe.yaml",
        "--calib",
        given / "calib",
        "--eval",
        given / "eval.py",
        "--max-drop",
        "0.05%",
        "-o",
        "out",
    )
    ran = optkit(*arguments)
    found = library.load("out").manifest.accuracy
    if found.drop > 0.0005 * found.reference:
        pytest.skip("the toy's drop is real here: nothing is undecided")
    assert ran.code == 0
    assert "inconclusive" in ran.err
    assert "samples would" in ran.err
    assert optkit(*arguments, "--strict").code == 5


def test_a_ruined_metric_does_not_ship_without_a_limit_of_the_callers(optkit, given, tmp_path):
    # The label is what the float model says; quantizing to outliers of 1e4 ruins it.
    (tmp_path / "judge.py").write_text(
        f"""
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession({str(given / "model.onnx")!r})
def samples():
    random = np.random.default_rng(3)
    for _ in range(200):
        x = random.standard_normal((1, 32)).astype(np.float32)
        yield {{"x": x}}, int(session.run(None, {{"x": x}})[0].argmax())
def score(outputs, label):
    return float(outputs["y"].argmax() == label)
"""
    )
    (tmp_path / "wild").mkdir()
    np.savez(tmp_path / "wild" / "0.npz", x=np.full((4, 32), 1e4, np.float32))
    ran = optkit(
        "compile",
        given / "model.onnx",
        "-r",
        given / "recipe.yaml",
        "--calib",
        "wild",
        "--eval",
        "judge.py",
        "-o",
        "out",
        "--json",
    )
    assert ran.code == 3
    assert ran.json["manifest"]["accuracy"]["budget"] == "1%"
    assert ran.json["manifest"]["accuracy"]["drop"] == 0
    assert ran.json["manifest"]["achieved"]["formats"] == {"fp32": 1.0}


def test_the_same_compile_gives_the_same_bytes_in_another_process(process, artifact, bench_, tmp_path):
    ran = process(
        "compile",
        bench_ / "model.onnx",
        "-r",
        artifact / "recipe.yaml",
        "--calib",
        bench_ / "calib",
        "-o",
        "again",
    )
    assert ran.code == 0, ran.err
    for name in ("model.onnx", "recipe.yaml", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (artifact / name).read_bytes(), name


def test_one_sample_makes_an_artifact_that_loads_again(optkit, given, tmp_path):
    one = (
        (given / "eval.py")
        .read_text()
        .replace("range(40)", "range(1)")
        .replace("float(outputs", "0.25 + 0.5 * (outputs")
    )
    (tmp_path / "one.py").write_text(one)
    ran = optkit(
        "compile",
        given / "model.onnx",
        "-r",
        given / "recipe.yaml",
        "--calib",
        given / "calib",
        "--eval",
        "one.py",
        "-o",
        "out",
        "--json",
    )
    assert ran.code in (0, 3)
    assert ran.json["manifest"]["accuracy"]["n"] == 1
    assert library.load("out").manifest.accuracy.n == 1


def test_random_data_is_marked(optkit, given):
    ran = optkit(
        "compile", given / "model.onnx", "-r", given / "recipe.yaml", "--calib", "random", "-o", "out"
    )
    assert ran.code == 0
    assert "drawn at random" in ran.err
    assert library.load("out").manifest.data.random


def test_verbose_says_what_passes_did_and_quiet_says_nothing(optkit, given):
    arguments = (
        "compile",
        given / "model.onnx",
        "-r",
        given / "recipe.yaml",
        "--calib",
        given / "calib",
        "-o",
        "out",
    )
    assert re.search(r"remove-noops: 1 changes, \d+ -> \d+ nodes", optkit(*arguments, "-v").err)
    assert "remove-noops" not in optkit(*arguments).err
    quiet = optkit(*arguments, "-q")
    assert (quiet.out, quiet.err) == ("out\n", "")


def test_dry_run_prints_the_resolved_recipe_and_builds_nothing(optkit, given, tmp_path):
    ran = optkit(
        "compile",
        given / "model.onnx",
        "-r",
        given / "recipe.yaml",
        "--calib",
        given / "calib",
        "--dry-run",
        "--set",
        "passes.quantize-static.method=mse",
    )
    assert ran.code == 0, ran.err
    recipe = yaml.safe_load(ran.out)
    assert recipe["passes"][1]["quantize-static"]["method"] == "mse"
    assert recipe["passes"][1]["quantize-static"]["ignore"] == []
    assert "nothing was built" in ran.err
    assert "quantize-static" in ran.err
    assert not list(tmp_path.iterdir())
    document = optkit(
        "compile",
        given / "model.onnx",
        "-r",
        given / "recipe.yaml",
        "--calib",
        given / "calib",
        "--dry-run",
        "--json",
    ).json
    assert document["built"] is False
    assert document["data"] == {"name": "calib", "batches": 8}
    assert document["recipe"]["recipe"] == 1


def test_names_are_found_in_any_case(optkit, given):
    ran = optkit(
        "compile",
        given / "model.onnx",
        "-t",
        "CPU",
        "--backend",
        "OnnxRuntime",
        "-r",
        given / "recipe.yaml",
        "--calib",
        given / "calib",
        "--dry-run",
    )
    assert ran.code == 0, ran.err


def test_memory_is_refused_before_work_or_stopped_in_it(optkit, given):
    arguments = (
        "compile",
        given / "model.onnx",
        "-r",
        given / "recipe.yaml",
        "--calib",
        given / "calib",
        "-o",
        "out",
    )
    ran = optkit(*arguments, "--memory", "10MB")
    assert ran.code == 2
    assert "--memory allows 10 MiB" in ran.err
    assert optkit(*arguments, "--memory", "8GiB").code == 0
    assert optkit(*arguments, "--memory", "8").code == 2


def test_a_backend_that_is_not_installed_is_exit_code_4(optkit, given, monkeypatch):
    rows = {
        "onnxruntime": "optkit.backends.onnxruntime:OnnxRuntime",
        "other": "a_package_that_is_not_there:Backend",
    }
    registry = Registry("backend", rows, group="optkit.no-such-group", extras={"other": "other"})
    monkeypatch.setattr("optkit.compilation.BACKENDS", registry)
    ran = optkit(
        "compile",
        given / "model.onnx",
        "-r",
        given / "recipe.yaml",
        "--calib",
        given / "calib",
        "--backend",
        "other",
    )
    assert ran.code == 4
    assert "hint: pip install 'optkit[other]'" in ran.err


_CALIB = ("--calib", "{given}/calib")
_RECIPE = ("-r", "{given}/recipe.yaml")
_MISTAKES = {
    "missing model": (["{given}/modle.onnx"], "modle.onnx: no such file", "did you mean '{given}/model.onnx'?"),
    "folder": (["{given}"], "a folder, not a model", None),
    "garbage": (["garbage.onnx", *_RECIPE, *_CALIB], "garbage.onnx", None),
    "torch": (["model.pt2", *_RECIPE, *_CALIB], "model.pt2: no such file", None),
    "dynamic": (["{given}/model.onnx", "--dynamic", "batch", *_RECIPE, *_CALIB], "--dynamic: for PyTorch modules", "start from the module"),
    "no such target": (["{given}/model.onnx", "-t", "abacus"], "unknown target 'abacus'", "optkit targets lists"),
    "no such recipe": (["{given}/model.onnx", "-r", "zzz"], "unknown recipe 'zzz'", "optkit recipe list lists"),
    "target": (["{given}/model.onnx", "-t", "cpuu"], "unknown target 'cpuu'", "did you mean 'cpu'?"),
    "backend": (["{given}/model.onnx", *_RECIPE, "--backend", "onnxruntme"], "unknown backend 'onnxruntme'", "did you mean 'onnxruntime'?"),
    "recipe": (["{given}/model.onnx", "-r", "int8-statik"], "unknown recipe 'int8-statik'", "did you mean 'int8-static'?"),
    "recipe file": (["{given}/model.onnx", "-r", "./mine.yaml"], "mine.yaml: no such recipe file", "shipped recipes"),
    "precision": (["{given}/model.onnx", "-p", "int9"], "unknown precision 'int9'", "did you mean 'int8'?"),
    "precision not made": (["{given}/model.onnx", "-p", "mxfp4"], "precision 'mxfp4': no backend", "available"),
    "both": (["{given}/model.onnx", *_RECIPE, "-p", "int8"], "a recipe and a precision were given", "leave one out"),
    "key": (["{given}/model.onnx", "-r", "key.yaml"], "key.yaml: unknown key 'pases'", "did you mean 'passes'?"),
    "option": (["{given}/model.onnx", *_RECIPE, "--set", "passes.quantize-static.metod=mse"], "passes.1: quantize-static: unknown option 'metod'", "did you mean 'method'?"),
    "value": (["{given}/model.onnx", *_RECIPE, "--set", "passes.quantize-static.method=best"], "quantize-static: method:", None),
    "pass": (["{given}/model.onnx", *_RECIPE, "--set", "passes.quantize-statc.method=mse"], "unknown pass of this recipe", "did you mean 'quantize-static'?"),
    "set": (["{given}/model.onnx", *_RECIPE, "--set", "method"], "--set 'method': key=value is wanted", "for example"),
    "yaml": (["{given}/model.onnx", "-r", "broken.yaml"], "broken.yaml:3: not valid YAML", None),
    "no data": (["{given}/model.onnx", *_RECIPE], "quantize-static needs calibration data", "--calib FOLDER"),
    "no such data": (["{given}/model.onnx", *_RECIPE, "--calib", "nothing"], "nothing: no such file or folder", "give a folder"),
    "empty data": (["{given}/model.onnx", *_RECIPE, "--calib", "empty"], "empty: no .npz files", "np.savez"),
    "data name": (["{given}/model.onnx", *_RECIPE, "--calib", "name"], "name/0.npz: unknown input 'X'", "the model takes x: float32[N, 32]"),
    "data shape": (["{given}/model.onnx", *_RECIPE, "--calib", "shape"], "shape/0.npz: input 'x' has size 31 at axis 1, not 32", None),
    "data dtype": (["{given}/model.onnx", *_RECIPE, "--calib", "dtype"], "dtype/0.npz: input 'x' is int64, the model takes float32", "astype"),
    "NaN": (["{given}/model.onnx", *_RECIPE, "--calib", "nan"], "nan/0.npz: input 'x' has 1 NaN", None),
    "no evaluator": (["{given}/model.onnx", *_RECIPE, *_CALIB, "--eval", "none.py"], "evaluator none.py: no such file", None),
    "not an evaluator": (["{given}/model.onnx", *_RECIPE, *_CALIB, "--eval", "half.py"], "half.py: the evaluator does not define score()", "define samples()"),
    "failing evaluator": (["{given}/model.onnx", *_RECIPE, *_CALIB, "--eval", "fails.py"], "evaluator accuracy: score() of sample 0, line 13: KeyError: 'z'", None),
    "failing samples": (["{given}/model.onnx", *_RECIPE, *_CALIB, "--eval", "stops.py"], "evaluator accuracy: samples() at sample 0, line 9: ZeroDivisionError", None),
    "evaluator with another input": (["{given}/model.onnx", *_RECIPE, *_CALIB, "--eval", "input.py"], "evaluator accuracy: sample 0: unknown input 'X'", None),
    "max-drop alone": (["{given}/model.onnx", *_RECIPE, *_CALIB, "--max-drop", "1%"], "max-drop needs an evaluator", "--eval FILE"),
    "max-drop": (["{given}/model.onnx", *_RECIPE, *_CALIB, "--eval", "{given}/eval.py", "--max-drop", "little"], "max-drop 'little'", "write 1%"),
    "out": (["{given}/model.onnx", *_RECIPE, *_CALIB, "-o", "busy"], "busy: exists and is not an artifact", "--out"),
    "out file": (["{given}/model.onnx", *_RECIPE, *_CALIB, "-o", "half.py"], "half.py: exists and is not an artifact", "--out"),
    "memory": (["{given}/model.onnx", *_RECIPE, *_CALIB, "--memory", "lots"], "--memory 'lots' is not a size", "8GiB"),
}  # fmt: skip


@pytest.mark.parametrize("name", _MISTAKES)
def test_a_mistake_is_named_with_what_to_do(optkit, given, tmp_path, name):
    arguments, message, hint = _MISTAKES[name]
    good = np.zeros((1, 32), np.float32)
    nan = good.copy()
    nan[0, 3] = np.nan
    for folder, arrays in {
        "name": {"X": good},
        "shape": {"x": good[:, 1:]},
        "dtype": {"x": good.astype(np.int64)},
        "nan": {"x": nan},
        "empty": None,
    }.items():
        (tmp_path / folder).mkdir()
        if arrays is not None:
            np.savez(tmp_path / folder / "0.npz", **arrays)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.txt").write_text("years of work")
    (tmp_path / "garbage.onnx").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "key.yaml").write_text("recipe: 1\npases: []\n")
    (tmp_path / "broken.yaml").write_text("recipe: 1\npasses: [\n")
    (tmp_path / "half.py").write_text("def samples():\n    return []\n")
    evaluator = (given / "eval.py").read_text()
    (tmp_path / "fails.py").write_text(evaluator.replace('outputs["y"]', 'outputs["z"]'))
    (tmp_path / "stops.py").write_text(evaluator.replace("x = random", "1 / 0; x = random"))
    (tmp_path / "input.py").write_text(evaluator.replace('{"x": x}', '{"X": x}'))
    before = sorted(p.name for p in tmp_path.iterdir())
    ran = optkit("compile", *(a.format(given=given) for a in arguments))
    assert ran.code == (1 if name == "garbage" else 2), ran.err
    assert ran.out == ""
    assert ran.err.startswith("error: "), ran.err
    assert message.format(given=given) in ran.err
    assert (hint or "").format(given=given) in ran.err
    assert "Traceback" not in ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_without_a_recipe_candidates_compete_and_are_all_shown(optkit, given):
    ran = optkit(
        "compile",
        given / "model.onnx",
        "--calib",
        given / "calib",
        "--set",
        "limits.min_speedup=0",
        "-o",
        "out",
        "--json",
    )
    assert ran.code == 0, ran.err
    tried = {c["name"]: c for c in ran.json["candidates"]}
    assert {"fp32", "int8-static", "int8-dynamic"} <= set(tried)
    assert sum(c["verdict"] == "shipped" for c in tried.values()) == 1
    assert all(c["reason"] for c in tried.values() if c["verdict"] != "shipped")
    assert all(name in ran.err for name in tried)


def test_without_data_only_what_needs_none_is_tried_and_the_rest_is_named(optkit, given):
    ran = optkit("compile", given / "model.onnx", "--set", "limits.min_speedup=0", "-o", "out", "--json")
    assert ran.code == 0, ran.err
    assert not any("static" in c["name"] for c in ran.json["candidates"])
    assert any("--calib" in a and "int8-static" in a for a in ran.json["advice"])
    assert ran.json["manifest"]["fidelity"]["inputs"] == "inputs drawn from the input specification"


def test_the_recipe_that_auto_wrote_gives_the_same_bytes_in_another_process(optkit, process, given, tmp_path):
    data = ("--calib", given / "calib", "--eval", given / "eval.py", "--max-drop", "1.0")
    assert (
        optkit("compile", given / "model.onnx", *data, "--set", "limits.min_speedup=0", "-o", "auto").code
        == 0
    )
    ran = process("compile", given / "model.onnx", "-r", "auto/recipe.yaml", *data, "-o", "again")
    assert ran.code == 0, ran.err
    for name in ("model.onnx", "recipe.yaml", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "auto" / name).read_bytes(), name
