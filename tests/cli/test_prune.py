"""``optkit prune``: what it writes, what it refuses, and with which exit code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from optkit.frontend import load
from optkit.reference import ReferenceSession


@pytest.fixture
def wide(tmp_path, monkeypatch):
    """A model whose layers take long enough to be worth narrowing."""
    monkeypatch.chdir(tmp_path)
    source = """
    <ir_version: 10, opset_import: ["" : 21]>
    wide (float[N, 32] x) => (float[N, 10] y) {
      a = Gemm(x, w1)
      b = Relu(a)
      c = Gemm(b, w2)
      d = Relu(c)
      y = Gemm(d, w3)
    }
    """
    model = onnx.parser.parse_model(source)
    random = np.random.default_rng(0)
    for name, shape in {"w1": (32, 1024), "w2": (1024, 1024), "w3": (1024, 10)}.items():
        values = (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, "wide.onnx")
    return Path("wide.onnx")


def _shapes(path):
    return {t.name: tuple(t.dims) for t in onnx.load(path).graph.initializer}


def test_a_share_goes_and_the_gain_is_measured(optkit, wide):
    ran = optkit("prune", wide, "--ratio", "50%", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["model"] == "wide-pruned.onnx"
    assert _shapes("wide-pruned.onnx") == {"w1": (32, 512), "w2": (512, 512), "w3": (512, 10)}
    assert ran.json["parameters"] == {"before": 1091584, "after": 283648}
    assert ran.json["measured"]["ratio"] > 1.2
    feeds = {"x": np.ones((2, 32), np.float32)}
    before, after = (onnx.load(p) for p in (wide, "wide-pruned.onnx"))
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in after.graph.initializer}
    for tensor in before.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).copy()
        array[~np.isin(array, kept[tensor.name])] = 0
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    runs = [ReferenceSession(load(m.SerializeToString())).run(feeds)["y"] for m in (before, after)]
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-4, atol=1e-4)


def test_a_speed_up_is_reached_or_missed_with_exit_code_3(optkit, wide):
    ran = optkit("prune", wide, "--speedup", "1.3x", "-o", "fast.onnx")
    assert (ran.code, ran.out) == (0, "fast.onnx\n"), ran.err
    assert "x faster" in ran.err
    assert _shapes("fast.onnx")["w2"] != (1024, 1024)
    ran = optkit("prune", wide, "--speedup", "5000", "-o", "folder", "--json")
    assert ran.code == 3
    assert "missed: 5000x was asked for, and the narrowest widths reach" in ran.err
    assert ran.json["missed"].startswith("5000x was asked for")
    # A tenth of 1024 at least, and a multiple of 16; which of the narrowest is the fastest is chance.
    keep = ran.json["pass"]["prune-channels"]["keep"]
    assert all(112 <= n <= 256 and n % 16 == 0 for n in (keep["w1"], keep["w2"]))
    assert _shapes("folder/model.onnx")["w2"] == (keep["w1"], keep["w2"])


@pytest.mark.parametrize("sparsity", ["2:4", "90%"])
def test_zeros_that_make_nothing_faster_are_refused(optkit, wide, sparsity):
    ran = optkit("prune", wide, "--sparsity", sparsity, "--backend", "onnxruntime")
    said = {"2:4": "2:4", "90%": "90% zeros"}[sparsity]
    assert ran.code == 3
    assert f"{said} on cpu: " in ran.err
    assert "measured: no kernel of onnxruntime is faster for it" in ran.err
    assert not Path("wide-pruned.onnx").exists()
    ran = optkit("prune", wide, "--sparsity", sparsity, "--backend", "onnxruntime", "--force")
    assert ran.code == 3
    assert "no kernel of onnxruntime" in ran.err
    w2 = next(
        onnx.numpy_helper.to_array(t)
        for t in onnx.load("wide-pruned.onnx").graph.initializer
        if t.name == "w2"
    )
    assert np.mean(w2 == 0) == pytest.approx({"2:4": 0.5, "90%": 0.9}[sparsity], abs=1e-3)


def test_a_target_elsewhere_is_written_only_by_force(optkit, wide, elsewhere):
    ran = optkit("prune", wide, "--sparsity", "2:4", "-t", elsewhere, "--backend", "onnxruntime")
    assert ran.code == 4
    assert f"what 2:4 is worth on {elsewhere} cannot be measured on this machine" in ran.err
    assert "--force" in ran.err
    assert optkit("prune", wide, "--speedup", "2", "-t", elsewhere, "--backend", "onnxruntime").code == 4
    ran = optkit(
        "prune", wide, "--sparsity", "2:4", "-t", elsewhere, "--backend", "onnxruntime", "--force", "--json"
    )
    assert ran.code == 0
    assert ran.json["measured"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say how much to prune"),
        (["--ratio", "0.5", "--speedup", "2"], "say how much to prune"),
        (["--ratio", "half"], "--ratio 'half': not a share"),
        (["--ratio", "120%"], "not a share"),
        (["--speedup", "fast"], "--speedup 'fast': not a factor"),
        (["--speedup", "0.5x"], "is not more than 1"),
        (["--sparsity", "4:2"], "write any, or N:M"),
        (["--ratio", "0.5", "-o", "wide.onnx"], "is the model itself"),
    ],
)
def test_misuse_is_refused(optkit, wide, arguments, message):
    ran = optkit("prune", wide, *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert [p.name for p in Path().iterdir()] == ["wide.onnx"]


def test_a_model_with_nothing_to_prune_is_an_error(optkit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = (
        '<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, 32] x) => (float[N, 32] y) { y = Relu(x) }'
    )
    onnx.save(onnx.parser.parse_model(source), "relu.onnx")
    for arguments in (["--ratio", "0.5"], ["--speedup", "2"], ["--sparsity", "2:4"]):
        ran = optkit("prune", "relu.onnx", *arguments)
        assert ran.code == 1
        assert "pruned 0" in ran.err
