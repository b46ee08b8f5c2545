"""``optkit finalize`` for Triton artifacts, on a driver that pretends: what is done once, chosen, refused and written down."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import optkit
from optkit.artifact import Artifact
from optkit.backends.triton import bundle
from optkit.backends.triton import finalize as steps
from optkit.cli.app import main
from optkit.closeness import batch
from optkit.errors import BackendUnavailableError, ModelError, UsageError
from optkit.finish import finalize
from optkit.kernels.triton.matmul import Linear
from optkit.testing import parse

HERE = Path(__file__).resolve().parent
_SPEC = importlib.util.spec_from_file_location("launches", HERE / "device" / "launches.py")
launches = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(launches)

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[N, 64] x) => (float16[N, 64] y) {
  m = MatMul (x, w)
  h = Add (m, c)
  t = Abs (h)
  y = LayerNormalization <axis = -1> (t, s, s)
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    random = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = parse(
            TEXT, w=(random.standard_normal((64, 64)) / 8).astype(np.float16),
            c=np.linspace(-1, 1, 64).astype(np.float16), s=np.linspace(0.5, 1.5, 64).astype(np.float16),
        )  # fmt: skip
        out = tmp_path_factory.mktemp("compiled") / "out"
        overrides = ["options.rest=cpu", "options.sizes.N=5"]
        optkit.compile(model, target="h100", recipe="triton-fp32", overrides=overrides, out=out)
    return out


@pytest.fixture
def artifact(compiled, tmp_path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "artifact"))


@pytest.fixture
def gpu(driver, artifact, monkeypatch):
    """A GPU that computes what it should; the oracle behind it."""
    monkeypatch.setenv("OPTKIT_LIBCUDA", str(driver))
    oracle = launches.Oracle(artifact)
    known = launches.records(artifact)
    monkeypatch.setattr("optkit.backends.triton.runtime.Device", lambda: launches.Recording(known, oracle))
    monkeypatch.setattr(steps, "_RUNS", 20)
    return oracle


def linear(artifact):
    return next(row for row in bundle.read(artifact)["launches"] if row["op"] == "Linear")


def norms(artifact):
    return {
        n for row in bundle.read(artifact)["launches"] if row["op"] == "LayerNorm" for n in row["kernels"]
    }


def tuned(artifact):
    groups = json.loads((artifact / steps.TUNED).read_text())["found"]["groups"]
    (found,) = [g for g in groups.values() if g["programs"]]
    return found


pytestmark = pytest.mark.needs("triton")


def test_every_step_is_done_once_and_written_down(artifact, gpu, capsys):
    before = Artifact(artifact).manifest
    assert not before.evidence.ran_on_device and len(before.deferred) == 3
    assert main(["finalize", str(artifact), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["device"]["device"] == "Pretended GPU" and said["cosine"] == pytest.approx(1.0, abs=1e-5)
    (measured,) = said["batches"]
    assert measured["inputs"] == {"x": [5, 64]} and measured["runs"] == 20
    assert 0 < measured["min_ms"] <= measured["median_ms"] <= measured["p99_ms"]
    after = Artifact(artifact).manifest
    assert after.evidence.ran_on_device and after.evidence.timed_on_device and after.deferred == ()
    # Its other nodes were compiled by nobody.
    assert not after.evidence.compiled and after.files == before.files
    files = (steps.TUNED, steps.VERIFIED, steps.TIMED)
    times = {f: (artifact / f).stat().st_mtime_ns for f in files}
    gpu.count = 0
    finalize(artifact)
    assert gpu.count == 0 and times == {f: (artifact / f).stat().st_mtime_ns for f in files}
    finalize(artifact, force=True)
    assert gpu.count > 0 and all((artifact / f).stat().st_mtime_ns > t for f, t in times.items())


def test_the_device_picks_the_fastest_of_the_finalists(artifact, gpu):
    names = linear(artifact)["kernels"]
    assert len(names) > 1
    gpu.slow = set(names[:-1])
    finalize(artifact)
    found = tuned(artifact)
    assert found["fastest"] == names[-1] and found["sizes"] == {"rows": 5}
    times = {row["program"]: row["median_ms"] for row in found["programs"]}
    assert set(times) == set(names) and min(times[n] for n in names[:-1]) > 3 > times[names[-1]]
    gpu.slow = {names[-1]}
    finalize(artifact, force=True)
    assert tuned(artifact)["fastest"] in names[:-1]


def test_what_was_chosen_is_what_runs_afterwards(artifact, gpu):
    names = linear(artifact)["kernels"]
    gpu.slow = set(names[:-1])
    finalize(artifact)
    feeds, expected = batch(artifact / "golden" / "000.npz")
    for chosen in (names[-1], names[0]):
        session = Artifact(artifact).on_device()
        found = session.run(feeds)
        np.testing.assert_allclose(found["y"].astype(float), expected["y"].astype(float), atol=0.01)
        launched = [gpu.names[one["record"]["sha256"]] for one in session.device.seen]
        session.close()
        assert chosen in launched
        # The choice of another code is none.
        record = json.loads((artifact / steps.TUNED).read_text())
        record["made_with"]["code"] = "another"
        (artifact / steps.TUNED).write_text(json.dumps(record))


def test_the_size_counts_one_of_the_finalists_and_no_golden_batch(artifact):
    rows = bundle.read(artifact)["launches"]
    files = [
        artifact / "model.onnx",
        *(artifact / "kernels" / f"{n}.cubin" for n in {r["kernels"][0] for r in rows}),
    ]
    assert Artifact(artifact).manifest.size.after == sum(f.stat().st_size for f in files)


def test_a_finalist_that_computes_something_else_is_left_out(artifact, gpu):
    names = linear(artifact)["kernels"]
    gpu.wrong, gpu.slow = {names[1]}, {*names} - {names[1]}
    finalize(artifact)
    rows = {row["program"]: row for row in tuned(artifact)["programs"]}
    assert rows[names[1]] == {"program": names[1], "cosine": pytest.approx(-1)}
    assert tuned(artifact)["fastest"] != names[1]


def test_wrong_outputs_are_an_error_and_no_evidence(artifact, gpu, capsys):
    gpu.wrong = norms(artifact)
    with pytest.raises(ModelError, match=r"output 'y' of golden batch 000 has cosine -"):
        finalize(artifact)
    manifest = Artifact(artifact).manifest
    assert not manifest.evidence.ran_on_device and len(manifest.deferred) == 3
    assert not (artifact / steps.TIMED).exists() and not (artifact / "device.json").exists()


def test_evidence_is_taken_back_when_a_step_is_repeated_and_fails(artifact, gpu):
    finalize(artifact)
    gpu.wrong = norms(artifact)
    with pytest.raises(ModelError):
        finalize(artifact, force=True)
    assert not Artifact(artifact).manifest.evidence.ran_on_device


def test_what_was_done_before_an_interruption_stays(artifact, gpu, monkeypatch):
    real = steps._bench

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "_bench", stop)
    with pytest.raises(KeyboardInterrupt):
        finalize(artifact)
    evidence = Artifact(artifact).manifest.evidence
    assert evidence.ran_on_device and not evidence.timed_on_device
    monkeypatch.setattr(steps, "_bench", real)
    times = {f: (artifact / f).stat().st_mtime_ns for f in (steps.TUNED, steps.VERIFIED)}
    finalize(artifact)
    assert times == {f: (artifact / f).stat().st_mtime_ns for f in times}
    assert Artifact(artifact).manifest.evidence.timed_on_device


def test_records_of_another_driver_are_not_taken(artifact, gpu):
    finalize(artifact)
    for name in (steps.TUNED, steps.VERIFIED, steps.TIMED):
        record = json.loads((artifact / name).read_text())
        record["made_with"]["cuda_driver"] = 12000
        (artifact / name).write_text(json.dumps(record))
    gpu.count = 0
    finalize(artifact)
    assert gpu.count > 0
    assert json.loads((artifact / steps.TIMED).read_text())["made_with"]["cuda_driver"] == 13000


def test_without_a_driver_it_says_so_and_exits_with_4(artifact, monkeypatch, capsys):
    monkeypatch.setenv("OPTKIT_LIBCUDA", "/nonexistent/libcuda.so.1")
    assert main(["finalize", str(artifact), "--json"]) == 4
    said = json.loads(capsys.readouterr().out)["error"]
    assert "no NVIDIA driver" in said["message"] and "machine with the GPU" in said["hint"]


def test_another_card_is_refused(artifact, gpu, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_MAJOR", "8")
    with pytest.raises(UsageError, match=r"is for h100 \(sm_90a\), the device is Pretended GPU \(sm_80\)"):
        finalize(artifact)


def test_an_artifact_for_cuda_is_not_finished_with_an_onnx_runtime_without_it(artifact, gpu):
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["options"]["rest"] = "cuda"
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BackendUnavailableError, match="ONNX Runtime with CUDA"):
        finalize(artifact)


def test_golden_batches_that_are_gone_are_missed(artifact, gpu):
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"] = [f for f in manifest["files"] if not f["path"].startswith("golden/")]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(artifact / "golden")
    with pytest.raises(ModelError, match="golden has no batches"):
        finalize(artifact)


def test_sizes_that_no_axis_has_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"options\.sizes: M is not a free axis") as caught:
        optkit.compile(parse(TEXT.replace("MatMul (x, w)", "Neg (x)").replace("Add (m, c)", "Neg (m)"), s=np.ones(64, np.float16)), target="h100", recipe="triton-fp32", overrides=["options.sizes.M=3"], out=tmp_path / "out")  # fmt: skip
    assert caught.value.hint == "free axes: N"


def crowded(self, problem, capability):
    """One of the table, and one that needs more shared memory than there is."""
    first = self.program(problem, capability)
    return (first, dataclasses.replace(first, stages=9))


def test_a_finalist_that_does_not_pass_its_gates_is_not_shipped_and_is_named(
    compiled, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Linear, "finalists", crowded)
    out = tmp_path / "out"
    arguments = [
        "compile",
        str(compiled / "model.onnx"),
        "-t",
        "h100",
        "-r",
        "triton-fp32",
        "-o",
        str(out),
        "--json",
    ]
    assert main(arguments) == 0
    assert len(linear(out)["kernels"]) == 1
    said = capsys.readouterr()
    told, more = json.loads(said.out)["manifest"]["left_out"]
    assert told["kernel"] == "linear"
    assert "9 stages" in told["config"]
    assert "M=128 N=256 K=64" in told["config"]
    assert (told["gate"], told["found"]) == ("shared memory", "509000 of 232448 bytes")
    assert more == {**told, "gate": "occupancy", "found": "0 blocks, 0% of the warps"}
    assert json.loads((out / "manifest.json").read_bytes())["left_out"] == [told, more]
    assert (
        f"linear ({told['config']}): shared memory: 509000 of 232448 bytes"
        in (out / "report.html").read_text()
    )
    summary = " ".join(said.err.split())
    assert "Left out linear (" in summary
    assert "509000 of 232448 bytes" in summary


def test_where_no_finalist_passes_its_gates_nothing_is_written(compiled, tmp_path, monkeypatch):
    from optkit.backends.triton.lower import Triton, TritonOptions
    from optkit.targets import target

    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Linear, "finalists", lambda *a: crowded(*a)[1:])
    with pytest.raises(
        ModelError, match=r"linear \(.*9 stages\): shared memory: 509000 of 232448 bytes"
    ) as caught:
        Triton().lower(ir.load(compiled / "model.onnx"), target("h100"), TritonOptions(), tmp_path)
    assert "call-kernels: {kernels: [...]}" in str(caught.value.hint)
    assert not (tmp_path / "launches.json").exists()
