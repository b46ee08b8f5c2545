"""The Triton backend: artifacts for GPUs that are not here, and what they say of themselves."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

import optkit
from optkit.backends.triton import bundle
from optkit.backends.triton.lower import Triton, TritonOptions
from optkit.backends.triton.placement import PLACEMENTS
from optkit.cli.app import main
from optkit.data import CalibrationData
from optkit.errors import BackendUnavailableError, ModelError, UnsupportedOpError, UsageError
from optkit.passes.base import Context
from optkit.passes.lowering.kernels import CallKernels
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.store import save
from optkit.targets import target
from optkit.testing import parse

BLOCK = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 64] x) => (float[N, 64] y) {
  h = MatMul (x, w)
  t = Add (x, h)
  n = LayerNormalization <axis = -1> (t, s, b)
  u = MatMul (n, v)
  y = Add (t, u)
}
"""
ONLY = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 64] x, float[N, 64] r) => (float[N, 64] y) {
  t = Add (x, r)
  y = LayerNormalization <axis = -1> (t, s, b)
}
"""
_RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "w": (_RANDOM.standard_normal((64, 64)) / 8).astype(np.float32),
    "v": (_RANDOM.standard_normal((64, 64)) / 8).astype(np.float32),
    "s": np.linspace(0.5, 1.5, 64, dtype=np.float32),
    "b": np.linspace(-1, 1, 64, dtype=np.float32),
}
H100 = target("h100")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def model(text, *, calls=True):
    found = parse(text, **{k: v for k, v in WEIGHTS.items() if f"{k})" in text or f"{k}," in text})
    if calls:
        CallKernels().run(found, Context(target=H100))
    return found


@pytest.mark.needs("triton")
def test_the_artifact_holds_the_graph_the_code_and_the_launches(tmp_path):
    backend, options = Triton(), TritonOptions()
    backend.lower(model(BLOCK), H100, options, tmp_path)
    found = bundle.read(tmp_path)
    (row,) = found["launches"]
    assert row["op"] == "AddLayerNorm"
    assert row["inputs"] == ["x", "h", "s", "b"]
    assert found["without_kernel"] == ["h", "u", "y"]
    assert [o["shape"] for o in row["outputs"]] == [["axis(0, 0)", "axis(0, 1)"]] * 2
    assert found["steps"] == [
        {"inputs": ["x"], "outputs": ["h"], "host": []},
        {"launch": 0},
        {"inputs": [o["name"] for o in row["outputs"]], "outputs": ["y"], "host": []},
    ]
    (name,) = row["kernels"]
    record = json.loads((tmp_path / "kernels" / f"{name}.json").read_bytes())
    code = (tmp_path / "kernels" / f"{name}.cubin").read_bytes()
    assert code[:4] == b"\x7fELF"
    assert hashlib.sha256(code).hexdigest() == record["sha256"]
    assert record["arch"] == "sm_90a"
    assert all(g["passed"] for g in record["gates"])
    assert backend.evidence(tmp_path, H100, options) == frozenset()
    x = {"x": np.linspace(-2, 2, 192, dtype=np.float32).reshape(3, 64)}
    right = ReferenceSession(model(BLOCK, calls=False)).run(x)["y"]
    with backend.load(tmp_path, H100, options) as session:
        np.testing.assert_allclose(session.run(x)["y"], right, atol=1e-5)
    steps = " ".join(backend.deferred(tmp_path, H100, options))
    assert "load the 1 programs of 1 calls" in steps
    assert "the other 3 nodes that compute run in ONNX Runtime with CUDA" in steps
    assert len(list((tmp_path / "golden").glob("*.npz"))) == 1
    executed = backend.executed(tmp_path, H100, options, x)
    assert [(e.op, e.format, e.macs) for e in executed] == [("MatMul", "fp32", 3 * 64 * 64)] * 2


def on_integers(columns):
    """A norm, which has a kernel, and two products on integers: with so many columns and with 7; kernels take multiples of 16."""
    found = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 64] x) => (float[N, 7] y) {
          n = LayerNormalization <axis = -1> (x, s, b)
          h = MatMul (n, w)
          y = MatMul (h, v)
        }
        """,
        w=(_RANDOM.standard_normal((64, columns)) / 8).astype(np.float32),
        v=(_RANDOM.standard_normal((columns, 7)) / 8).astype(np.float32), s=WEIGHTS["s"], b=WEIGHTS["b"],
    )  # fmt: skip
    feeds = [{"x": _RANDOM.standard_normal((4, 64)).astype(np.float32)} for _ in range(4)]
    data = CalibrationData(feeds, name="random").check(found)
    run_passes(
        found, Recipe.load("triton-int8").passes, Context(target=H100, data=data, placements=PLACEMENTS)
    )
    return found, feeds[0]


@pytest.mark.needs("triton")
def test_integers_count_where_a_kernel_multiplies_them(tmp_path):
    """ONNX Runtime multiplies what was dequantized, in floats."""
    found, feeds = on_integers(48)
    Triton().lower(found, H100, TritonOptions(), tmp_path)
    executed = Triton().executed(tmp_path, H100, TritonOptions(), feeds)
    assert [(e.format, e.macs) for e in executed] == [("int8", 4 * 64 * 48), ("fp16", 4 * 48 * 7)]


def test_sums_of_einsum_count_among_the_formats(tmp_path):
    found = parse(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float16[4, 16] x) => (float16[4, 3, 8] y) { y = Einsum <equation = "td,edf->tef"> (x, w) }""",
        w=np.ones((3, 16, 8), np.float16),
    )
    save(found, tmp_path / "model.onnx")
    executed = Triton().executed(tmp_path, H100, TritonOptions(), {"x": np.ones((4, 16), np.float16)})
    assert [(e.format, e.macs) for e in executed] == [("fp16", 4 * 3 * 8 * 16)]


@pytest.mark.needs("triton")
def test_a_graph_on_integers_of_which_no_kernel_multiplies_any_is_refused(tmp_path):
    found, _ = on_integers(7)
    with pytest.raises(ModelError, match=r"MatMul.*MatMul.*no kernel") as error:
        Triton().lower(found, H100, TritonOptions(), tmp_path)
    assert "linear-int8: 7 x 7 are no multiples of 16" in str(error.value.hint)


@pytest.mark.needs("triton")
def test_two_builds_write_the_same_files(tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Triton().lower(model(ONLY), H100, TritonOptions(), tmp_path / name)
        folder = tmp_path / name
        files.append({str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()})
    assert files[0] == files[1]


@pytest.mark.needs("triton")
def test_only_graphs_of_kernels_alone_are_called_compiled(tmp_path):
    Triton().lower(model(ONLY), H100, TritonOptions(), tmp_path)
    assert Triton().evidence(tmp_path, H100, TritonOptions()) == {"compiled", "inspected"}


@pytest.mark.needs("triton")
def test_compile_says_what_was_not_done(tmp_path, capsys):
    save(model(BLOCK, calls=False), tmp_path / "m.onnx")
    out = tmp_path / "out"
    arguments = [
        "compile",
        str(tmp_path / "m.onnx"),
        "--target",
        "h100",
        "--recipe",
        "triton-fp32",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "DEFERRED: 3 steps that need h100" in said
    assert "not measured: there is no h100 here" in said
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert not manifest["evidence"]["ran_on_device"]
    assert not manifest["evidence"]["compiled"]


def test_a_graph_that_calls_nothing_is_refused(tmp_path):
    with pytest.raises(ModelError, match="calls no kernel") as error:
        Triton().lower(model(BLOCK, calls=False), H100, TritonOptions(), tmp_path)
    assert "matmul: not known to be float16 or bfloat16" in str(error.value.hint)


def test_calls_without_a_program_are_all_listed(tmp_path):
    text = """
<ir_version: 10, opset_import: ["" : 21, "optkit" : 1]>
g (float[N, 24] x) => (float[N, 24] y) {
  [narrow] a = optkit.LayerNorm (x, s, s)
  [odd] y = optkit.Nothing (a)
}
"""
    found = parse(text, s=np.ones(24, np.float32))
    with pytest.raises(UnsupportedOpError) as caught:
        bundle.write(found, H100, tmp_path)
    assert "narrow" in str(caught.value)
    assert "no kernel has this name" in str(caught.value)


@pytest.mark.parametrize("name", ["cpu", "t4"])
def test_targets_without_kernels_are_refused_before_any_work(name):
    with pytest.raises(UsageError, match="sm_80"):
        Triton().ready(target(name), TritonOptions())


def test_without_triton_the_line_that_installs_it_is_told(monkeypatch):
    monkeypatch.setattr("optkit.kernels.build.installed", lambda: False)
    with pytest.raises(BackendUnavailableError) as caught:
        Triton().ready(H100, TritonOptions())
    assert caught.value.hint == "pip install 'optkit[triton]'"


def test_an_artifact_without_its_files_says_which(tmp_path):
    with pytest.raises(ModelError, match=r"launches.json is missing"):
        Triton().deferred(tmp_path, H100, TritonOptions())
    with pytest.raises(ModelError, match=r"model.onnx is missing"):
        Triton().load(tmp_path, H100, TritonOptions())


ENCODER = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 64] x) => (float[N, 64] y) {
  n = LayerNormalization <axis = -1> (x, s, b)
  q = MatMul (n, w)
  k = MatMul (n, v)
  m = Mul (q, k)
  t = Add (x, m)
  h = LayerNormalization <axis = -1> (t, s, b)
  u = MatMul (h, w)
  g = Gelu (u)
  d = MatMul (g, v)
  y = Add (t, d)
}
"""


def quantized(tmp_path, name, recipe):
    save(model(ENCODER, calls=False), tmp_path / "m.onnx")
    rows = np.random.default_rng(3).standard_normal((4, 16, 64)).astype(np.float32)
    for index, x in enumerate(rows):
        (tmp_path / "calib").mkdir(exist_ok=True)
        np.savez(tmp_path / "calib" / f"{index}.npz", x=x)
    out = tmp_path / "out"
    arguments = ["compile", str(tmp_path / "m.onnx"), "--target", name, "--recipe", recipe, "--out", str(out)]
    return main([*arguments, "--calib", str(tmp_path / "calib")]), out


@pytest.mark.needs("triton")
@pytest.mark.parametrize(
    ("recipe", "linear", "stored"),
    [("triton-int8", "LinearInt8", "int8"), ("triton-fp8", "LinearFp8", "fp8")],
)
def test_products_in_eight_bits_read_what_norms_and_activations_put_onto_their_grid(
    tmp_path, capsys, recipe, linear, stored
):
    code, out = quantized(tmp_path, "l4", recipe)
    assert code == 0
    # Two products share what the first norm gives, and the norms' sums are read too.
    ops = [row["op"] for row in bundle.read(out)["launches"]]
    assert sorted(ops) == sorted(
        ["LayerNormQuantize", linear, linear, "AddLayerNormQuantize", linear, "GeluQuantize", linear]
    )
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert manifest["achieved"]["formats"] == {stored: 1.0}
    assert not manifest["evidence"]["timed_on_device"]
    said = capsys.readouterr().err
    assert "not measured: there is no l4 here" in said
    x = np.random.default_rng(4).standard_normal((5, 64)).astype(np.float32)
    right = ReferenceSession(model(ENCODER, calls=False)).run({"x": x})["y"]
    with Triton().load(out, target("l4"), TritonOptions()) as session:
        found = session.run({"x": x})["y"]
    # Four products of 64 terms on grids of 2**-7 of their range (int8), or of 2**-4 of each number (e4m3).
    assert np.sqrt(np.mean((found - right) ** 2) / np.mean(right**2)) < (0.02 if stored == "int8" else 0.08)


@pytest.mark.needs("triton")
def test_floats_of_eight_bits_are_refused_where_the_card_has_none(tmp_path, capsys):
    code, out = quantized(tmp_path, "a100", "triton-fp8")
    assert code == 4
    assert "fp8" in capsys.readouterr().err
    assert not out.exists()


PACKED = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[%s, 64] x) => (float[%s, 32] y) { y = com.microsoft.MatMulNBits <K = 64, N = 32, bits = 4, block_size = 32> (x, q, s%s) }
"""


@pytest.mark.needs("triton")
@pytest.mark.parametrize(
    ("rows", "zeros", "kernel"),
    [
        ("N", "", "LinearInt4"),
        (1, "", "LinearInt4Decode"),
        ("N", ", z", "LinearUint4"),
        (1, ", z", "LinearUint4Decode"),
    ],
)
def test_weights_that_onnx_runtime_packed_in_4_bits_are_multiplied_by_the_kernel(
    tmp_path, rows, zeros, kernel
):
    random = np.random.default_rng(0)
    weights = {
        "q": random.integers(0, 256, (32, 2, 16)).astype(np.uint8),
        "s": random.uniform(0.01, 0.03, (32, 2)).astype(np.float32),
    }
    if zeros:
        weights["z"] = random.integers(0, 256, (32, 1)).astype(np.uint8)
    packed = parse(PACKED % (rows, rows, zeros), **weights)
    done, _ = optkit.compile(packed, target="h100", recipe="triton-fp16", out=tmp_path / "out")
    assert [row["op"] for row in bundle.read(done.folder)["launches"]] == [kernel]
    x = random.standard_normal((1, 64)).astype(np.float32)
    right = ReferenceSession(packed).run({"x": x})["y"]
    with Triton().load(done.folder, H100, TritonOptions()) as session:
        found = session.run({"x": x})["y"]
    # 64 terms of about 0.2, inputs and weights rounded to float16.
    assert np.abs(found - right).max() < 64**0.5 * 0.2 * 2**-9
