"""Kernels for AMD's GPUs: what their machine code is like, and the runtime on a HIP that pretends."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

import optkit
from optkit.artifact import Artifact
from optkit.backends.triton import bundle
from optkit.backends.triton import finalize as steps
from optkit.cli.app import main
from optkit.closeness import batch
from optkit.errors import BackendUnavailableError, UsageError
from optkit.finish import finalize
from optkit.kernels import KERNELS
from optkit.kernels.build import build
from optkit.kernels.gates import gates
from optkit.kernels.occupancy import occupancy, of_record
from optkit.targets.gpu import ARCHITECTURES, GFX942
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
_RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "w": (_RANDOM.standard_normal((64, 64)) / 8).astype(np.float16),
    "c": np.linspace(-1, 1, 64).astype(np.float16),
    "s": np.linspace(0.5, 1.5, 64).astype(np.float16),
}

pytestmark = pytest.mark.needs("triton")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "out"
    overrides = ["options.sizes.N=5"]
    optkit.compile(
        parse(TEXT, **WEIGHTS), target="mi300x", recipe="triton-fp32", overrides=overrides, out=out
    )
    return out


@pytest.fixture
def gpu(hip, compiled, monkeypatch):
    """A GPU that computes what it should; the oracle behind it."""
    monkeypatch.setenv("OPTKIT_LIBHIP", str(hip))
    oracle, known = launches.Oracle(compiled), launches.records(compiled)
    monkeypatch.setattr(
        "optkit.backends.triton.runtime.HipDevice", lambda: launches.HipRecording(known, oracle)
    )
    monkeypatch.setattr(steps, "_RUNS", 20)
    return oracle


def test_machine_code_is_for_the_architecture_and_has_its_matrix_instructions(compiled):
    files = sorted((compiled / bundle.FOLDER).glob("*.hsaco"))
    assert files and not list((compiled / bundle.FOLDER).glob("*.cubin"))
    for file in files:
        record = json.loads(file.with_suffix(".json").read_bytes())
        # e_ident, e_machine and e_flags of an ELF file for AMD's GPUs: LLVM's AMDGPUUsage, "ELF code object".
        head = file.read_bytes()[:52]
        assert head[:4] == b"\x7fELF" and head[7] == 64 and head[18:20] == b"\xe0\x00" and head[48] == 0x4C
        assert (record["arch"], record["lanes"], record["stack"]) == ("gfx942", 64, 0)
        assert all(g["passed"] for g in record["gates"])
        if record["program"]["products"]:
            assert sum(n for name, n in record["instructions"].items() if name.startswith("v_mfma_f32")) > 0
    # Programs ask for warps of 32 threads.
    linear = next(row for row in bundle.read(compiled)["launches"] if row["op"] == "Linear")["kernels"][0]
    record = json.loads((compiled / bundle.FOLDER / f"{linear}.json").read_bytes())
    assert 64 * record["warps"] == 32 * record["program"]["warps"]


@pytest.mark.parametrize("name", ["linear", "add-layer-norm", "swiglu"])
def test_waves_by_registers_are_those_that_llvm_says(name, monkeypatch, tmp_path):
    from optkit.kernels.triton import worker

    texts, real = [], worker._of_assembly
    monkeypatch.setattr(worker, "_of_assembly", lambda text: texts.append(text) or real(text))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    kernel = KERNELS[name]()
    program = kernel.program(kernel.examples[0], GFX942)
    record = worker.build({"key": "k", "program": program.record(), "capability": list(GFX942)}, tmp_path)
    said = re.search(r"^; Occupancy: (\d+)", texts[0], re.MULTILINE)
    found = of_record({**record, "shared": 0, "warps": 4})
    assert found.blocks == min(int(said[1]), ARCHITECTURES[GFX942].blocks)


def test_shared_memory_and_waves_limit_blocks():
    def limit(**use):
        return occupancy(ARCHITECTURES[GFX942], GFX942, **use)

    assert limit(registers=32, shared=33 << 10, warps=4).limit == "shared memory"
    assert limit(registers=32, shared=33 << 10, warps=4).blocks == 1
    assert limit(registers=32, shared=0, warps=8).blocks == 4
    assert limit(registers=32, shared=0, warps=1).blocks == 32
    assert limit(registers=32, shared=0, warps=32).blocks == 0
    # 97 registers of a wave leave seven of eight.
    assert limit(registers=32, shared=0, warps=4, scalars=96).blocks == 8
    assert limit(registers=32, shared=0, warps=4, scalars=97).blocks == 7
    assert limit(registers=0, shared=65 << 10, warps=4).blocks == 0


def test_code_without_matrix_instructions_or_wide_loads_does_not_pass():
    kernel = KERNELS["linear"]()
    (one,) = build([(kernel.program(kernel.small[0], GFX942), GFX942)])
    record = {
        **one.record,
        "instructions": {"v_fma_f32": 9, "global_load_dword": 3, "v_mfma_i32_16x16x32_i8": 4},
    }
    failed = {g.name for g in gates(record) if not g.passed}
    assert failed == {"matrix instructions", "128-bit loads"}


def test_every_step_runs_on_hip_and_is_written_down(compiled, gpu, capsys):
    assert main(["finalize", str(compiled), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    device = {k: said["device"][k] for k in ("device", "hip_driver", "arch", "units")}
    assert device == {"device": "Pretended Instinct", "hip_driver": 60443482, "arch": "gfx942", "units": 304}
    assert said["cosine"] == pytest.approx(1.0, abs=1e-5) and said["batches"][0]["runs"] == 20
    evidence = Artifact(compiled).manifest.evidence
    assert evidence.ran_on_device and evidence.timed_on_device
    gpu.count = 0
    finalize(compiled)
    assert gpu.count == 0


def test_launches_have_as_many_threads_as_waves_of_64(compiled, gpu):
    feeds, expected = batch(compiled / "golden" / "000.npz")
    with Artifact(compiled).on_device() as session:
        found = session.run(feeds)
        seen = session.device.seen
    np.testing.assert_allclose(found["y"].astype(float), expected["y"].astype(float), atol=0.01)
    assert seen and all(one["block"] == [64 * one["record"]["warps"], 1, 1] for one in seen)


def test_another_gpu_of_the_vendor_is_refused(compiled, gpu, monkeypatch):
    monkeypatch.setenv("FAKE_HIP_ARCH", "gfx90a:sramecc+:xnack-")
    with pytest.raises(
        UsageError, match=r"is for mi300x \(gfx942\), the device is Pretended Instinct \(gfx90a\)"
    ):
        finalize(compiled)


def test_calls_that_fail_are_named_as_hip_calls_them(compiled, gpu, monkeypatch):
    monkeypatch.setenv("FAKE_HIP_INIT", "100")
    with pytest.raises(BackendUnavailableError, match=r"hipInit: hipErrorNoDevice \(100\)"):
        finalize(compiled)


def test_a_driver_that_is_too_old_says_so(compiled, gpu, monkeypatch):
    monkeypatch.setattr("optkit.kernels.hip._PROPERTIES", "hipGetDevicePropertiesR9999")
    with pytest.raises(BackendUnavailableError, match="ROCm 6 or newer is needed"):
        finalize(compiled)


def test_without_a_driver_it_says_so_and_exits_with_4(compiled, monkeypatch, capsys):
    monkeypatch.setenv("OPTKIT_LIBHIP", "/nonexistent/libamdhip64.so")
    assert main(["finalize", str(compiled), "--json"]) == 4
    said = json.loads(capsys.readouterr().out)["error"]
    assert "no AMD driver" in said["message"] and "machine with the GPU" in said["hint"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("options.plugins=true", "options.plugins: TensorRT is NVIDIA's, and mi300x is AMD's"),
        ("options.rest=cuda", "options.rest=cuda: CUDA is NVIDIA's, and mi300x is AMD's"),
    ],
)
def test_what_is_of_another_vendor_is_refused_before_work(tmp_path, override, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        optkit.compile(
            parse(TEXT, **WEIGHTS), target="mi300x", recipe="triton-fp32", overrides=[override], out=tmp_path / "out"
        )  # fmt: skip


def test_floats_of_8_bits_are_refused_before_work(tmp_path):
    data = [{"x": np.ones((2, 64), np.float16)}]
    with pytest.raises(
        BackendUnavailableError, match="fp8 is not on mi300x: its floats of 8 bits are e4m3fnuz"
    ):
        optkit.compile(
            parse(TEXT, **WEIGHTS), target="mi300x", recipe="triton-fp8", data=data, out=tmp_path / "out"
        )


def test_without_a_recipe_the_kernels_are_what_is_tried(tmp_path):
    data = [{"x": np.random.default_rng(0).standard_normal((4, 64)).astype(np.float16)}]
    artifact, report = optkit.compile(
        parse(TEXT, **WEIGHTS), target="mi300x", data=data, out=tmp_path / "out"
    )
    tried = {c.name: c.verdict for c in report.candidates}
    assert artifact.manifest.backend == "triton" and set(tried) == {
        "triton-fp32",
        "triton-fp16",
        "triton-int8",
    }
    assert "failed" not in tried.values()
