"""The harness for GPUs without one: what it refuses, and on a driver that pretends, what its records hold."""

from __future__ import annotations

import ctypes
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from optkit.backends.base import Finished
from optkit.benchmarks import gpu
from optkit.errors import BackendUnavailableError, ModelError, UsageError
from optkit.kernels import KERNELS
from optkit.kernels.numerics import launch
from optkit.kernels.placed import place
from optkit.targets import TARGETS, target

torch = pytest.importorskip("torch")

HERE = Path(__file__).resolve().parent.parent / "backends" / "device"
_SPEC = importlib.util.spec_from_file_location("launches", HERE / "launches.py")
launches = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(launches)
H100 = target("h100")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Reference:
    """Writes the reference of a kernel, from the operands that the launch points at.

    Attributes:
        behind: Bytes more that are written.
    """

    def __init__(self, kernel, problem, rows):
        self.kernel, self.problem = kernel, problem
        self.like, self.behind = kernel.draw(problem, rows, 0), 0
        self.found = {}

    def __call__(self, launch):
        program, given = launch["record"]["program"], list(self.like)
        for argument in program["arguments"]:
            kind, _, index = argument["binds"].partition(":")
            if kind == "input":
                given[int(index)] = launches.memory(launch["arguments"][argument["name"]], given[int(index)])
        # The same numbers at the same places, many times.
        places = tuple(sorted(launch["arguments"].items()))
        if places not in self.found:
            self.found[places] = self.kernel.reference(self.problem, given)
        found = self.found[places]
        for argument in program["arguments"]:
            kind, _, index = argument["binds"].partition(":")
            if kind == "output":
                value = found[int(index)].astype(self.like[0].dtype)
                launches.memory(launch["arguments"][argument["name"]], value)[...] = value
                if self.behind:
                    ctypes.memset(launch["arguments"][argument["name"]] + value.nbytes, 0, self.behind)


class Any(dict):
    """Records of whatever code is loaded, by the code itself."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def __missing__(self, digest):
        for file in self.folder.glob("*.json"):
            if (record := json.loads(file.read_bytes()))["sha256"] == digest:
                return record
        raise KeyError(digest)


@pytest.fixture
def gpu_for(driver, monkeypatch):
    monkeypatch.setenv("OPTKIT_LIBCUDA", str(driver))
    from optkit.kernels.build import root

    return lambda compute: launches.Recording(Any(root()), compute)


def test_without_a_gpu_it_says_so_in_a_line_exits_with_4_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPTKIT_LIBCUDA", "/nonexistent/libcuda.so.1")
    assert gpu.main(["--out", str(tmp_path)]) == 4
    said = capsys.readouterr()
    assert said.out == "" and "nothing is measured without a GPU: there is no NVIDIA driver here" in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_nobody_knows_is_refused_first(tmp_path, capsys):
    assert gpu.main(["--kernel", "layer-nrom", "--out", str(tmp_path)]) == 2
    assert "layer-norm" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has CUDA here")
def test_a_torch_without_cuda_is_no_rival(driver, monkeypatch):
    monkeypatch.setenv("OPTKIT_LIBCUDA", str(driver))
    with pytest.raises(BackendUnavailableError, match="does not have CUDA"):
        gpu.need_gpu()


@pytest.mark.parametrize(
    ("called", "asked", "found"),
    [
        ("NVIDIA H200", None, "h200"),
        ("NVIDIA H100 80GB HBM3", None, "h100"),
        ("NVIDIA GH200", "h100", "h100"),
    ],
)
def test_the_target_is_what_the_device_calls_itself(called, asked, found):
    facts = {"device": called, "major": 9, "minor": 0}
    assert gpu.named(SimpleNamespace(facts=lambda: facts), asked).name == found


@pytest.mark.parametrize(("called", "asked"), [("Pretended GPU", None), ("NVIDIA H100", "l4")])
def test_a_device_that_is_no_target_is_refused(called, asked):
    facts = {"device": called, "major": 9, "minor": 0}
    with pytest.raises(UsageError) as caught:
        gpu.named(SimpleNamespace(facts=lambda: facts), asked)
    assert "--target h100" in caught.value.hint


@pytest.mark.needs("triton")
@pytest.mark.parametrize("name", ["layer-norm", "add-rms-norm", "linear", "softmax"])
def test_a_record_has_the_finalists_the_rivals_and_the_roofline(gpu_for, name):
    kernel = KERNELS[name]()
    problem = kernel.examples[0]
    with gpu_for(Reference(kernel, problem, 4)) as device:
        record = gpu.kernel_record(
            device, H100, kernel, problem, 1e9, torch_device="cpu", rows=4, compiled=False
        )  # fmt: skip
    programs = kernel.finalists(problem, H100.capability)
    # Those that pass their gates, the first of the table before all.
    stages = [f["stages"] for f in record["finalists"]]
    assert stages[0] == programs[0].stages and set(stages) <= {p.stages for p in programs}
    assert record["ms"] == min(f["ms"] for f in record["finalists"]) > 0
    assert all(f["cosine"] == pytest.approx(1) for f in record["finalists"])
    (rival,) = record["rivals"]
    assert rival["cosine"] > 0.999 and rival["share"] == pytest.approx(rival["ms"] / record["ms"])
    operations, moved = kernel.work(problem, kernel.shapes(problem, 4))
    assert record["bytes_per_second"] == pytest.approx(moved / record["ms"] * 1e3)
    assert record["operations_per_second"] == pytest.approx(operations / record["ms"] * 1e3)
    floor = max(moved / H100.bandwidth, operations / H100.peak["fp32"] if name != "linear" else 0)
    assert record["floor_ms"] >= floor * 1e3 * 0.99 and record["share_of_copy"] == pytest.approx(
        moved / record["ms"] * 1e3 / 1e9
    )
    assert record["goal"]["met"] in (True, False) and kernel.name in gpu.line(record)


@pytest.mark.needs("triton")
def test_a_rival_that_fails_is_written_down_as_one(gpu_for, monkeypatch):
    from optkit.benchmarks import rivals

    def fail(x):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(rivals, "rivals", lambda *a, **k: [rivals.Rival(name="cuBLAS", compute=fail)])
    kernel = KERNELS["softmax"]()
    problem = kernel.examples[0]
    with gpu_for(Reference(kernel, problem, 4)) as device:
        record = gpu.kernel_record(
            device, H100, kernel, problem, 1e9, torch_device="cpu", rows=4, compiled=False
        )
    assert record["rivals"] == [{"name": "cuBLAS", "failed": "RuntimeError: no kernel image is available"}]
    assert "cuBLAS failed" in gpu.line(record)
    assert gpu.goal({**record, "kernel": "matmul"})["met"] is None


@pytest.mark.needs("triton")
def test_errors_against_float64_are_part_of_the_record(gpu_for):
    kernel = KERNELS["softmax"]()
    current = {}

    def compute(launch):
        current["now"](launch)

    with gpu_for(compute) as device:
        real = gpu.launch

        def drawn(kernel, problem, capability, rows):
            current["now"] = Reference(kernel, problem, rows)
            return real(kernel, problem, capability, rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu, "launch", drawn)
            record = gpu.numerics_record(device, kernel, (9, 0))
    # The reference, rounded once.
    assert record["met"] and 0 < record["steps"] <= 0.5 and record["launches"] > 4


@pytest.mark.needs("triton")
def test_a_kernel_that_writes_behind_its_output_is_found(gpu_for):
    kernel = KERNELS["softmax"]()
    problem = kernel.small[0]
    compute = Reference(kernel, problem, 3)
    with gpu_for(compute) as device:
        (placed,) = place(device, [launch(kernel, problem, (9, 0), 3)])
        placed.run()
        compute.behind = 2
        with pytest.raises(ModelError, match="wrote behind output 0"):
            placed.run()
        before = len(device._memory)
        placed.close()
        assert len(device._memory) < before


def test_goals_are_decided_by_what_they_name():
    record = {
        "kernel": "attention", "rivals": [{"name": "torch.scaled_dot_product_attention", "share": 2.0}], "share_of_copy": 0.5,
    }  # fmt: skip
    assert gpu.goal(record)["met"] is None
    record["rivals"].append({"name": "FlashAttention-3", "share": 0.89})
    assert gpu.goal(record) == {"against": "FlashAttention-3", "least": 0.9, "share": 0.89, "met": False}
    assert gpu.goal({"kernel": "layer-norm", "share_of_copy": 0.86, "rivals": []})["met"]
    assert gpu.goal({"kernel": "nothing", "rivals": []}) is None


def test_rows_are_as_many_as_the_bound_asks_for():
    norm, linear, w4 = (KERNELS[n]() for n in ("layer-norm", "linear", "linear-int4-decode"))
    rows = gpu.rows_of(norm, norm.examples[0], None)
    assert norm.work(norm.examples[0], norm.shapes(norm.examples[0], rows))[1] == pytest.approx(
        256 << 20, rel=0.01
    )
    assert gpu.rows_of(linear, linear.examples[0], "fp16") == 8192
    assert gpu.rows_of(w4, w4.examples[0], "bf16") == 1


def test_one_row_is_decoded_with_weights_that_no_cache_holds():
    kernel = KERNELS["linear-int4-decode"]()
    (problem,) = gpu.problems(kernel)
    _, moved = kernel.work(problem, kernel.shapes(problem, 1))
    assert moved > 2 * max(t.l2 for t in map(target, TARGETS) if t.vendor == "nvidia")
    assert gpu.goal({"kernel": kernel.name, "share_of_bandwidth": 0.81, "rivals": []})["met"]
    assert gpu.problems(KERNELS["linear"]()) == KERNELS["linear"].examples


def test_what_nobody_judged_is_no_goal_reached_where_its_rival_could_run():
    alone = {"kernel": "attention", "problem": {}, "ms": 1.0, "rivals": []}
    alone["goal"] = gpu.goal(alone)
    found = {"device": {"major": 9}, "kernels": [alone], "numerics": [{"kernel": "softmax", "met": True}]}
    assert gpu.missed(found) == ["attention"]
    assert "FlashAttention-3 is not there: not judged" in gpu.line(alone)
    assert gpu.missed({**found, "device": {"major": 8}}) == []
    assert gpu.missed({**found, "kernels": [], "numerics": [{"kernel": "softmax", "met": False}]}) == [
        "softmax"
    ]


@pytest.mark.needs("triton", "onnxscript")
@pytest.mark.parametrize("recipe", ["triton-fp16", "tensorrt-fp16"])
def test_a_model_stands_beside_onnx_runtime_and_torch_compile(tmp_path, recipe):
    torch._dynamo.reset()
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.LayerNorm(64)).eval()
    finished = Finished(device={"device": "Pretended GPU"}, cosine=1.0, batches=({"median_ms": 0.5},))
    record = gpu.model_record(
        "small", module, (torch.randn(4, 64),), H100, tmp_path / "out", finish=lambda folder: finished,
        recipe=recipe, torch_device="cpu", provider="CPUExecutionProvider", compiler="eager",
    )  # fmt: skip
    assert record["ms"] == 0.5 and record["cosine"] == 1.0
    assert ("without_kernel" in record) == (recipe == "triton-fp16")
    assert f"small by {recipe}: 0.5000 ms" in gpu.line(record)
    assert [r["name"] for r in record["rivals"]] == [
        "ONNX Runtime, the same graph",
        "torch.compile (eager), float16",
    ]
    assert all(r["ms"] > 0 for r in record["rivals"])
    assert not record["evidence"]["ran_on_device"]
    with pytest.raises(BackendUnavailableError, match="does not run with CUDAExecutionProvider"):
        gpu._onnx_runtime(tmp_path / "out" / "model.onnx", {}, {}, "CUDAExecutionProvider")


def test_the_file_of_a_target_is_written_whole(tmp_path):
    file = gpu.write({"target": "h100", "kernels": []}, tmp_path / "new")
    assert file.name == "h100.json" and json.loads(file.read_text())["target"] == "h100"
    assert [f.name for f in file.parent.iterdir()] == ["h100.json"]


def test_no_figure_is_claimed_before_there_is_a_record():
    folder = Path(gpu.__file__).parent / "baselines"
    if not list(folder.glob("*.json")):
        readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
        assert "Not measured on a GPU" in readme


def test_bits_that_numpy_has_no_letter_for_reach_torch():
    import ml_dtypes

    from optkit.benchmarks.rivals import tensor

    array = np.linspace(-2, 2, 9).astype(ml_dtypes.bfloat16)
    found = tensor(array, "cpu")
    assert found.dtype == torch.bfloat16 and (found.float().numpy() == array.astype(np.float32)).all()
