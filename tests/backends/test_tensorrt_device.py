"""The programs of an artifact, and ``optkit finalize``, which runs them.

Held against TensorRT's real interface, and carried out on a driver and a TensorRT that compute on the host.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import optkit
from optkit.artifact import Artifact
from optkit.cli.app import main
from optkit.errors import BackendUnavailableError, ModelError, UsageError
from optkit.finish import finalize
from optkit.testing import parse

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent.parent / "backends" / "tensorrt" / "scripts"
# Names of TensorRT 11.4.0.106, read from its bindings.
API = json.loads((HERE.parent / "golden" / "tensorrt_11_4_api.json").read_text())


def _unknown(text: str) -> list[str]:
    """Names of ``trt`` that TensorRT does not have: of the module, of its classes, and of variables of such a type."""
    tree, types = ast.parse(text), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [n.attr for n in ast.walk(node.annotation) if isinstance(n, ast.Attribute)]
            types[node.target.id] = names[0] if names else ""
    unknown = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        if isinstance(owner, ast.Name) and owner.id == "trt":
            known = node.attr in API["."] or node.attr in API
        elif (
            isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "trt"
        ):
            known = owner.attr in API and node.attr in API[owner.attr]
        elif isinstance(owner, ast.Name) and types.get(owner.id) in API:
            known = node.attr in API[types[owner.id]]
        else:
            continue
        if not known and not node.attr.startswith("__"):
            unknown.append(ast.unparse(node))
    return unknown


@pytest.mark.parametrize("name", ["building.py", "engine.py"])
def test_the_programs_use_names_that_tensorrt_has(name):
    assert _unknown((SCRIPTS / name).read_text()) == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("trt.BuilderFlag.FP16", "trt.BuilderFlag.FP16"),
        ("config: trt.IBuilderConfig = f()\nconfig.int8_calibrator", "config.int8_calibrator"),
        ("trt.init_plugins", "trt.init_plugins"),
        ("registry: trt.IPluginRegistry = f()\nregistry.load", "registry.load"),
    ],
)
def test_names_that_tensorrt_no_longer_has_are_found(line, wrong):
    assert _unknown(line) == [wrong]


@pytest.mark.needs("tensorrt_rtx")
@pytest.mark.parametrize("name", ["engine.py", "building.py"])
def test_tensorrt_rtx_has_the_same_names(name):
    import tensorrt_rtx as trt

    text = (SCRIPTS / name).read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trt":
            assert hasattr(trt, node.attr), node.attr


# On a device


def _model() -> ir.Model:
    random = np.random.default_rng(0)
    text = '<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, 16] x) => (float[N, 4] y) { y = MatMul(x, w) }'
    return parse(text, w=random.normal(size=(16, 4)).astype(np.float32))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "out"
    optkit.compile(_model(), target="h100", recipe="fp32", overrides=["options.proxy=false"], out=out)
    return out


@pytest.fixture
def artifact(compiled, tmp_path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "artifact"))


@pytest.fixture
def gpu(driver, tmp_path, monkeypatch) -> Path:
    """A GPU with TensorRT; the file has a line for every build."""
    monkeypatch.setenv("OPTKIT_LIBCUDA", str(driver))
    monkeypatch.setenv("PYTHONPATH", str(HERE / "device"))
    monkeypatch.syspath_prepend(str(HERE / "device"))
    log = tmp_path / "builds"
    log.touch()
    monkeypatch.setenv("FAKE_TENSORRT_LOG", str(log))
    return log


# With the device at hand


@pytest.mark.parametrize("target", ["h100", "h200"])
def test_where_tensorrt_and_the_card_are_at_hand_compile_goes_on_and_finishes(gpu, tmp_path, target):
    done, report = optkit.compile(_model(), target=target, recipe="fp32", out=tmp_path / "out")
    manifest = done.manifest
    assert manifest.options["mode"] == "device-build" and manifest.mode.startswith("device-build: ")
    e = manifest.evidence
    assert e.compiled and e.ran_on_device and e.timed_on_device and not e.proxy_compiled
    assert manifest == report.manifest and manifest.deferred == () and gpu.read_text().count("a build") == 1
    assert (done.folder / "engine.plan").is_file() and (done.folder / "timing.cache").is_file()
    assert json.loads((done.folder / "device.json").read_text())["batches"] == list(report.finished.batches)
    assert json.loads((done.folder / "report.json").read_text())["finished"]["cosine"] == pytest.approx(1.0)
    finalize(done.folder)
    assert gpu.read_text().count("a build") == 1


def test_the_summary_of_a_build_on_the_device_says_what_ran_there_and_nothing_else(gpu, tmp_path, capsys):
    file = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(_model()), file)
    assert (
        main(["compile", str(file), "-t", "h100", "-r", "fp32", "-o", str(tmp_path / "out"), "--json"]) == 0
    )
    out, said = capsys.readouterr()
    assert "device-build: " in said and "measured on Pretended GPU, CUDA driver 13000" in said
    assert "x [8, 16]: " in said and "200 runs" in said
    assert "there is no h100 here" not in said and "DEFERRED" not in said
    assert "as read back from what was built" in said
    found = json.loads(out)
    assert found["manifest"]["options"]["mode"] == "device-build" and found["latency"] is None
    assert found["finished"]["device"]["device"] == "Pretended GPU"


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("OPTKIT_LIBCUDA", "/nonexistent/libcuda.so.1", "there is no NVIDIA driver here"),
        ("FAKE_CUDA_INIT", "100", "cuInit: CUDA_ERROR_NO_DEVICE"),
        ("FAKE_CUDA_MAJOR", "8", "the device here is Pretended GPU (sm_80), not h100 (sm_90a)"),
        ("FAKE_TENSORRT_BROKEN", "1", "TensorRT does not load: ImportError: libnvinfer.so.11"),
    ],
)
def test_a_build_here_is_refused_before_any_work_where_something_is_missing(
    gpu, tmp_path, monkeypatch, capsys, variable, value, said
):
    monkeypatch.setenv(variable, value)
    file = tmp_path / "model.onnx"
    file.write_bytes(b"never read")
    asked = ["compile", str(file), "-t", "h100", "-r", "fp32", "-o", str(tmp_path / "out")]
    assert main([*asked, "--set", "options.mode=device-build", "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert said in error["message"] and "options.mode=bundle" in error["hint"]
    out, _ = optkit.compile(
        _model(), target="h100", recipe="fp32", out=tmp_path / "out", overrides=["options.proxy=false"]
    )
    assert out.manifest.options["mode"] == "bundle" and not out.manifest.evidence.compiled


def test_a_build_here_is_refused_without_tensorrt(driver, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_LIBCUDA", str(driver))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailableError, match="TensorRT, which is not installed") as error:
        optkit.compile(
            tmp_path / "missing.onnx", target="l4", recipe="fp32", overrides=["options.mode=device-build"]
        )
    assert error.value.hint.startswith("pip install tensorrt-cu13")


def test_an_engine_that_the_device_cannot_build_leaves_what_was_there(gpu, artifact, monkeypatch):
    monkeypatch.setenv("FAKE_TENSORRT_FAILS", "1")
    before = (artifact / "manifest.json").read_bytes()
    with pytest.raises(ModelError, match="TensorRT built nothing"):
        optkit.compile(_model(), target="h100", recipe="fp32", out=artifact)
    assert (artifact / "manifest.json").read_bytes() == before and not (artifact / "engine.plan").exists()


def _program(artifact: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of the artifact's programs, as its reader starts it."""
    command = [sys.executable, str(artifact / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_a_driver_it_says_so_and_exits_with_4(artifact, monkeypatch, capsys):
    monkeypatch.setenv("OPTKIT_LIBCUDA", "/nonexistent/libcuda.so.1")
    assert main(["finalize", str(artifact), "--json"]) == 4
    said = json.loads(capsys.readouterr().out)["error"]
    assert "there is no NVIDIA driver here" in said["message"] and "machine with the GPU" in said["hint"]
    assert not Artifact(artifact).manifest.evidence.ran_on_device


def test_a_driver_without_a_device_is_told_apart(artifact, gpu, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_INIT", "100")
    with pytest.raises(BackendUnavailableError, match="cuInit: CUDA_ERROR_NO_DEVICE"):
        finalize(artifact)


def test_another_card_than_the_artifact_is_for_is_refused(artifact, gpu, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_MAJOR", "8")
    with pytest.raises(UsageError, match=r"is for h100 \(sm_90a\), the device is Pretended GPU \(sm_80\)"):
        finalize(artifact)


def test_without_tensorrt_the_pip_line_is_given(artifact, driver, monkeypatch):
    monkeypatch.setenv("OPTKIT_LIBCUDA", str(driver))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailableError) as error:
        finalize(artifact)
    assert error.value.hint == "pip install tensorrt-cu13"


def test_every_step_is_done_once_and_written_down(artifact, gpu, capsys):
    before = Artifact(artifact).manifest
    assert main(["finalize", str(artifact), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["device"]["device"] == "Pretended GPU" and said["device"]["cuda_driver"] == 13000
    assert said["cosine"] == pytest.approx(1.0) and [b["runs"] for b in said["batches"]] == [200, 200]
    assert all(0 < b["min_ms"] <= b["median_ms"] <= b["p99_ms"] for b in said["batches"])
    after = Artifact(artifact).manifest
    assert after.evidence.ran_on_device and after.evidence.timed_on_device and after.deferred == ()
    assert before.deferred and after.files == before.files
    assert json.loads((artifact / "device.json").read_text())["cosine"] == said["cosine"]
    assert (artifact / "timing.cache").read_bytes() == b"timings"
    times = {f: (artifact / f).stat().st_mtime_ns for f in ("engine.plan", "verified.json", "bench.json")}
    finalize(artifact)
    assert times == {f: (artifact / f).stat().st_mtime_ns for f in times}
    assert gpu.read_text().count("a build") == 1
    finalize(artifact, force=True)
    assert gpu.read_text().count("a build") == 2
    assert all((artifact / f).stat().st_mtime_ns > t for f, t in times.items())


def test_inspect_says_how_the_formats_are_known_before_and_after(artifact, gpu, capsys):
    for _ in range(2):
        assert main(["inspect", str(artifact)]) == 0
        said = capsys.readouterr().out
        assert "fp32 100% of the multiply-accumulates, as read back when it was compiled: typed graph" in said
        assert "measured" not in said
        finalize(artifact)


@pytest.mark.parametrize("more", [[], ["--scenario", "offline"]])
def test_a_processor_does_not_time_it_in_the_stead_of_the_device(artifact, capsys, more):
    assert main(["bench", str(artifact), "--json", *more]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "is for h100" in error["message"] and "optkit finalize" in error["hint"]


def test_records_of_another_device_are_not_taken(artifact, gpu):
    finalize(artifact)
    record = json.loads((artifact / "bench.json").read_text())
    (artifact / "bench.json").write_text(json.dumps(record | {"device": "another"}))
    finalize(artifact)
    assert json.loads((artifact / "bench.json").read_text())["device"] == "Pretended GPU"


def test_an_engine_that_computes_something_else_is_an_error_and_no_evidence(artifact, gpu, monkeypatch):
    monkeypatch.setenv("FAKE_TENSORRT_WRONG", "1")
    with pytest.raises(ModelError, match=r"output 'y' of golden batch .* has cosine -1\.0"):
        finalize(artifact)
    assert not Artifact(artifact).manifest.evidence.ran_on_device
    assert not (artifact / "bench.json").exists()


def test_each_evidence_is_there_when_its_step_is_done_and_no_earlier(artifact, gpu, monkeypatch):
    from optkit.backends.tensorrt import finalize as steps

    real, failing = steps._run, set()

    def run(path, program, *arguments, **more):
        if program in failing:
            raise ModelError(f"{program}: stopped")
        real(path, program, *arguments, **more)

    monkeypatch.setattr(steps, "_run", run)
    seen = []
    for program in ("build_engine.py", "verify.py", "bench.py"):
        failing = {program}
        with pytest.raises(ModelError, match="stopped"):
            finalize(artifact)
        e = Artifact(artifact).manifest.evidence
        seen.append((e.compiled, e.ran_on_device, e.timed_on_device))
    assert seen == [(False, False, False), (True, False, False), (True, True, False)]
    assert Artifact(artifact).manifest.deferred
    failing = set()
    finalize(artifact)
    failing = {"verify.py"}
    with pytest.raises(ModelError, match="stopped"):
        finalize(artifact, force=True)
    assert not Artifact(artifact).manifest.evidence.ran_on_device


def _line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a program ended with."""
    assert done.returncode and not done.stdout, done.stdout
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("program", ["verify.py", "bench.py"])
def test_a_program_says_in_one_line_what_is_missing_and_what_to_do(artifact, gpu, monkeypatch, program):
    assert _line(_program(artifact, program)) == "engine.plan is missing: python build_engine.py builds it"
    for variable, value, said in (
        (
            "OPTKIT_LIBCUDA",
            "/nonexistent/libcuda.so.1",
            "there is no NVIDIA driver here (libcuda.so.1 does not load)",
        ),
        ("FAKE_CUDA_INIT", "100", "cuInit: CUDA_ERROR_NO_DEVICE (100)"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            done = _program(artifact, program)
            assert _line(done) == f"{said}: run this on the machine with the GPU" and done.returncode == 4


@pytest.mark.parametrize("program", ["build_engine.py", "verify.py", "bench.py"])
def test_a_program_without_tensorrt_gives_the_pip_line(artifact, gpu, monkeypatch, program):
    monkeypatch.setenv("FAKE_TENSORRT_BROKEN", "1")
    said = (
        "TensorRT does not load (libnvinfer.so.11: cannot open shared object file): pip install tensorrt-cu13"
    )
    done = _program(artifact, program)
    assert _line(done) == said and done.returncode == 4
    with pytest.raises(BackendUnavailableError, match=r"build_engine\.py: TensorRT does not load") as error:
        finalize(artifact)
    assert error.value.hint == "pip install tensorrt-cu13"


@pytest.mark.parametrize("program", ["build_engine.py", "verify.py", "bench.py"])
def test_a_program_gives_its_help_without_tensorrt_and_a_device(artifact, gpu, monkeypatch, program):
    monkeypatch.setenv("FAKE_TENSORRT_BROKEN", "1")
    monkeypatch.setenv("OPTKIT_LIBCUDA", "/nonexistent/libcuda.so.1")
    done = _program(artifact, program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {program}") and f"    python {program}\n" in done.stdout


def test_inputs_outside_the_profile_are_refused_with_input_shape_and_profile(artifact, gpu):
    facts = json.loads((artifact / "bundle.json").read_text())
    facts["profile"]["x"] = [[1, 16], [2, 16], [4, 16]]
    (artifact / "bundle.json").write_text(json.dumps(facts))
    assert _program(artifact, "build_engine.py").returncode == 0
    for program in ("verify.py", "bench.py"):
        done = _program(artifact, program)
        assert done.returncode and done.stderr == (
            "input 'x' has shape [8, 16], which the engine was not built for: the profile is from [1, 16] to [4, 16]\n"
        )


def test_inputs_of_another_type_are_refused_and_not_read_as_what_they_are_not(artifact, gpu):
    assert _program(artifact, "build_engine.py").returncode == 0
    for file in (artifact / "golden").iterdir():
        with np.load(file) as found:
            batch = {k: v.astype(np.float64) if k == "in:x" else v for k, v in found.items()}
        np.savez(file, **batch)
    done = _program(artifact, "verify.py")
    assert done.returncode and done.stderr.startswith("input 'x' is float64, the engine takes float32")


def test_plug_ins_are_loaded_before_a_graph_that_calls_them_is_read_and_before_its_engine(
    artifact, gpu, tmp_path
):
    library, graph = tmp_path / "liboptkit_plugins.so", tmp_path / "called.onnx"
    library.write_bytes(b"code")
    shutil.copy(artifact / "model.onnx", graph)
    asked = ["--plugin", str(library), "--model", str(graph)]
    for _ in range(2):
        assert _program(artifact, "build_engine.py", *asked).returncode == 0
    steps = ["a plug-in: liboptkit_plugins.so", "a build", "parsed called.onnx"]
    assert gpu.read_text().splitlines() == steps
    library.unlink()
    assert _program(artifact, "verify.py").returncode == 0
    assert gpu.read_text().splitlines() == [*steps, steps[0]]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, "libodd.so is missing"),
        (b"", "libodd.so: TensorRT does not load it, or has its plug-ins already"),
    ],
)
def test_a_plug_in_that_cannot_be_loaded_is_named(artifact, gpu, tmp_path, code, said):
    library = tmp_path / "libodd.so"
    if code is not None:
        library.write_bytes(code)
    done = _program(artifact, "build_engine.py", "--plugin", str(library))
    assert said in _line(done) and "a build" not in gpu.read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FAKE_TENSORRT_FAILS", "build_engine.py: TensorRT built nothing"),
        ("FAKE_TENSORRT_REFUSES", "verify.py: the engine does not load: another device, driver or TensorRT"),
    ],
)
def test_a_step_that_fails_says_what_its_program_said(artifact, gpu, monkeypatch, name, said):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ModelError, match=said):
        finalize(artifact)


def test_damaged_files_are_not_taken_to_the_device(artifact, gpu):
    with (artifact / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError, match=r"model\.onnx is not the file that was written"):
        finalize(artifact)


def test_artifacts_that_are_complete_have_nothing_to_finish(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }'
    optkit.compile(parse(text), recipe="fp32", out=tmp_path / "out")
    with pytest.raises(UsageError, match="onnxruntime are complete as they are"):
        finalize(tmp_path / "out")
