"""The runtime of Triton artifacts on a driver that pretends: what it launches, with what, and what comes out.

No GPU is needed. The driver's memory is the host's; a launch is written down, and either filled in with what ONNX Runtime
computes, or computed by Triton's interpreter from the kernel's source with the arguments that the driver was given.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from optkit.artifact import Artifact
from optkit.backends.triton import bundle
from optkit.backends.triton.lower import Triton, TritonOptions
from optkit.backends.triton.memory import Pool, Tensor
from optkit.backends.triton.rest import need_provider
from optkit.backends.triton.runtime import DeviceSession, open_device
from optkit.backends.triton.schedule import Segment, schedule
from optkit.benchmarks import suite
from optkit.errors import BackendUnavailableError, ModelError, OptkitError, UsageError
from optkit.kernels.cuda import CudaError, Device
from optkit.kernels.launching import Function, read
from optkit.passes.base import Context
from optkit.passes.lowering.kernels import CallKernels
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse

HERE = Path(__file__).resolve().parent
H100 = target("h100")
_SPEC = importlib.util.spec_from_file_location("launches", HERE / "device" / "launches.py")
launches = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(launches)

# A block of an encoder, a sum that is an output too, and a branch that calls nothing.
ENCODER = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[B, S, 64] x, bool[1] turned) => (float16[B, S, 64] y, float16[B, S, 64] t, int64[3] sizes) {
  n = LayerNormalization <axis = -1> (x, s, b)
  q0 = MatMul (n, wq)
  k0 = MatMul (n, wk)
  v0 = MatMul (n, wv)
  heads = Constant <value = int64[4] {0, 0, 4, 16}> ()
  flat = Constant <value = int64[3] {0, 0, 64}> ()
  q1 = Reshape (q0, heads)
  k1 = Reshape (k0, heads)
  v1 = Reshape (v0, heads)
  q = Transpose <perm = [0, 2, 1, 3]> (q1)
  k = Transpose <perm = [0, 2, 3, 1]> (k1)
  v = Transpose <perm = [0, 2, 1, 3]> (v1)
  scores = MatMul (q, k)
  scaled = Mul (scores, quarter)
  shares = Softmax <axis = -1> (scaled)
  mixed = MatMul (shares, v)
  back = Transpose <perm = [0, 2, 1, 3]> (mixed)
  m = Reshape (back, flat)
  o = MatMul (m, wo)
  p = Add (o, bo)
  r = If (turned) <
    then_branch = then_g () => (float16[B, S, 64] a) { a = Neg (p) },
    else_branch = else_g () => (float16[B, S, 64] c) { c = Identity (p) }
  >
  t = Add (x, r)
  y = LayerNormalization <axis = -1> (t, s, b)
  sizes = Shape (y)
}
"""
_RANDOM = np.random.default_rng(0)
WEIGHTS = {
    **{n: (_RANDOM.standard_normal((64, 64)) / 8).astype(np.float16) for n in ("wq", "wk", "wv", "wo")},
    "s": np.linspace(0.5, 1.5, 64).astype(np.float16),
    "b": np.linspace(-1, 1, 64).astype(np.float16),
    "bo": np.linspace(-0.1, 0.1, 64).astype(np.float16),
    "quarter": np.float16(0.25),
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def graph():
    model = parse(ENCODER, **WEIGHTS)
    CallKernels().run(model, Context(target=H100))
    return model


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    pytest.importorskip("triton", reason="needs the package triton")
    folder = tmp_path_factory.mktemp("encoder")
    Triton().lower(graph(), H100, TritonOptions(rest="cpu"), folder)
    return folder


@pytest.fixture
def gpu(driver, monkeypatch):
    monkeypatch.setenv("OPTKIT_LIBCUDA", str(driver))


def feeds(batch, sequence):
    random = np.random.default_rng(batch * sequence)
    return {"x": random.standard_normal((batch, sequence, 64)).astype(np.float16), "turned": np.array([True])}


class Replay:
    """Holds each launch against what ONNX Runtime computes, and writes what the kernel would have written.

    Args:
        artifact: Whose launches come.
        given: The inputs.
        atol: How far an operand may be from ONNX Runtime's, relative to its largest.
    """

    def __init__(self, artifact: Path, given, atol: float = 0.01) -> None:
        self.rows = bundle.read(artifact)["launches"]
        model = ir.load(artifact / bundle.MODEL)
        constants = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
        names = {n for row in self.rows for n in row["inputs"] if n is not None}
        names |= {o["name"] for row in self.rows for o in row["outputs"] if o is not None}
        wanted = sorted(names - set(constants) - set(given))
        found = ReferenceSession(model, outputs=wanted, optimize=False).run(given)
        self.values, self.atol, self.count = {**constants, **given, **found}, atol, 0

    def __call__(self, launch) -> None:
        row, record = self.rows[self.count], launch["record"]
        self.count += 1
        program = record["program"]
        shapes = [() if n is None else self.values[n].shape for n in row["inputs"]]
        assert launch["grid"] == expected_grid(row["op"], program["constants"], shapes), row["node"]
        assert launch["block"] == [32 * record["warps"], 1, 1]
        assert launch["shared"] == record["shared"]
        assert launch["stream"] == 2
        scratch = int(np.prod(launch["grid"])) * record["scratch"]
        assert launch["arguments"]["profile_scratch"] == 0
        assert (launch["arguments"]["global_scratch"] != 0) == (scratch > 0)
        if scratch:
            assert room(launch["arguments"]["global_scratch"]) >= scratch
        sizes = expected_sizes(row["op"], shapes)
        for argument in program["arguments"]:
            value = launch["arguments"][argument["name"]]
            kind, _, index = argument["binds"].partition(":")
            if kind == "input":
                right = self.values[row["inputs"][int(index)]]
                found, right = launches.memory(value, right).astype(np.float64), right.astype(np.float64)
                limit = self.atol * max(1.0, np.abs(right[np.isfinite(right)]).max(initial=0))
                place = f"{row['node']}: {argument['name']}"
                np.testing.assert_allclose(found, right, rtol=0, atol=limit, err_msg=place)
            elif kind == "output":
                right = self.values[row["outputs"][int(index)]["name"]]
                assert room(value) >= right.nbytes
                ctypes.memmove(value, np.ascontiguousarray(right).ctypes.data, right.nbytes)
            else:
                assert value == sizes[argument["name"]], (row["node"], argument["name"])


def room(address: int) -> int:
    """Bytes that were allocated there."""
    usable = ctypes.CDLL(None).malloc_usable_size
    usable.restype, usable.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    return usable(address)


def expected_grid(op, constants, shapes):
    """Worked out from what the programs are documented to do, not from their expressions."""

    def up(a, b):
        return (a + b - 1) // b

    if op.endswith("Attention"):
        return [up(shapes[0][2], constants["M"]), shapes[0][0] * shapes[0][1], 1]
    rows = int(np.prod(shapes[0][:-1]))
    if op.endswith("Norm"):
        return [up(rows, constants["ROWS"]), 1, 1]
    return [min(132, up(rows, constants["M"]) * up(shapes[1][1], constants["N"])), 1, 1]


def expected_sizes(op, shapes):
    if op.endswith("Attention"):
        return {"queries": shapes[0][2], "keys": shapes[1][2], "heads": shapes[0][1]}
    return {"rows": int(np.prod(shapes[0][:-1]))}


@pytest.mark.needs("triton")
def test_calls_stand_between_as_few_segments_as_their_chain_allows():
    model = graph()
    calls = [node for node in model.graph if node.domain == "optkit"]
    steps = schedule(model.graph, calls)
    shown = [step.op_type if isinstance(step, ir.Node) else len(step.inputs) for step in steps]
    assert shown == [
        "LayerNorm",
        "MatMul",
        "MatMul",
        "MatMul",
        3,
        "Attention",
        1,
        "Linear",
        2,
        "AddLayerNorm",
        1,
    ]
    (branch,) = [s for s in steps if isinstance(s, Segment) and "turned" in s.inputs]
    (linear,) = [c for c in calls if c.op_type == "Linear"]
    assert set(branch.inputs) == {"turned", linear.outputs[0].name}
    assert steps[-1].outputs == steps[-1].host == ("sizes",)


@pytest.mark.needs("triton")
@pytest.mark.parametrize("shape", [(2, 5), (1, 131), (3, 128)])
def test_every_launch_gets_its_operands_its_sizes_and_its_grid(artifact, gpu, shape):
    given = feeds(*shape)
    replay = Replay(artifact, given)
    with launches.Recording(launches.records(artifact), replay) as device:
        session = DeviceSession(artifact, device, rest="cpu")
        found = session.run(given)
        assert replay.count == len(replay.rows) == 7
        replay.count = 0
        session.run(given)
        held, replay.count = len(device._memory), 0
        session.run(given)
        # What earlier runs took is used again.
        assert len(device._memory) == held
        session.close()
    right = ReferenceSession(artifact / bundle.MODEL).run(given)
    assert list(found) == ["y", "t", "sizes"] and found["sizes"].tolist() == [*shape, 64]
    for name, value in right.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name].astype(float), value.astype(float), atol=0.02)


@pytest.mark.needs("triton")
def test_threads_run_one_after_the_other_each_on_the_device(artifact, gpu):
    given = feeds(2, 5)
    replay = Replay(artifact, given)

    def compute(launch):
        replay.count %= len(replay.rows)
        replay(launch)

    right = ReferenceSession(artifact / bundle.MODEL).run(given)
    with launches.Recording(launches.records(artifact), compute) as device:
        session = DeviceSession(artifact, device, rest="cpu")
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(session.run, [given] * 6))
        session.close()
    assert len(device.seen) == 6 * len(replay.rows)
    for one in found:
        np.testing.assert_allclose(one["y"].astype(float), right["y"].astype(float), atol=0.02)


@pytest.mark.needs("triton", "torch")
@pytest.mark.parametrize("shape", [(2, 5), (1, 131)])
def test_the_launches_computed_by_the_interpreter_give_what_onnx_runtime_gives(
    artifact, driver, tmp_path, shape
):
    given = feeds(*shape)
    found, log = launches.interpret(artifact, given, driver, tmp_path)
    assert len(log) == 7
    right = ReferenceSession(artifact / bundle.MODEL).run(given)
    for name, value in right.items():
        # Half precision between kernels; values are of the order of 1.
        np.testing.assert_allclose(found[name].astype(float), value.astype(float), atol=0.01)


# A trained model


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> Path:
    from optkit.cli.app import main

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OPTKIT_CACHE")
        try:
            model = suite.fetch("minilm_l6")
        except OptkitError as error:
            pytest.skip(f"the model cannot be fetched: {error}")
    out = tmp_path_factory.mktemp("minilm") / "out"
    arguments = ["compile", str(model), "--target", "h100", "--recipe", "triton-fp16", "--out", str(out)]
    assert main([*arguments, "--set", "options.rest=cpu"]) == 0
    return out


def sentences(batch, sequence):
    random = np.random.default_rng(sequence)
    mask = np.ones((batch, sequence), np.int64)
    mask[-1, sequence // 2 :] = 0
    return {"input_ids": random.integers(0, 30000, (batch, sequence)), "attention_mask": mask}


@pytest.mark.needs("triton")
@pytest.mark.parametrize("shape", [(2, 7), (1, 130)])
def test_every_launch_of_minilm_is_what_its_node_asks_for(minilm, gpu, shape):
    given = sentences(*shape)
    replay = Replay(minilm, given, atol=0.02)
    with launches.Recording(launches.records(minilm), replay) as device:
        session = DeviceSession(minilm, device, rest="cpu")
        found = session.run(given)
        session.close()
    assert replay.count == len(replay.rows) == 55
    right = ReferenceSession(minilm / bundle.MODEL).run(given)
    for name, value in right.items():
        np.testing.assert_allclose(found[name], value, atol=0.002)


@pytest.mark.needs("triton", "torch")
def test_minilm_by_the_interpreter_gives_what_onnx_runtime_gives(minilm, driver, tmp_path):
    given = sentences(2, 7)
    found, log = launches.interpret(minilm, given, driver, tmp_path)
    assert len(log) == 55
    for name, value in ReferenceSession(minilm / bundle.MODEL).run(given).items():
        # Elements of vectors of length 1, from half precision.
        np.testing.assert_allclose(found[name], value, atol=0.001)


# What can go wrong


def test_without_a_driver_it_is_not_possible_here(artifact, monkeypatch):
    monkeypatch.setenv("OPTKIT_LIBCUDA", "/nonexistent/libcuda.so.1")
    with pytest.raises(BackendUnavailableError, match="no NVIDIA driver") as caught:
        Triton().on_device(artifact, H100, TritonOptions(rest="cpu"))
    assert caught.value.exit_code == 4 and "machine with the GPU" in caught.value.hint


def test_a_driver_without_a_device_is_told_apart(gpu, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_INIT", "100")
    with pytest.raises(BackendUnavailableError, match="cuInit: CUDA_ERROR_NO_DEVICE"):
        open_device("h100", "sm_90a")


def test_a_device_that_does_not_say_what_it_is_is_closed_again(gpu, monkeypatch):
    closed = []
    monkeypatch.setattr(Device, "close", lambda self: closed.append(self))

    def silent(self):
        raise CudaError("cuDeviceGetAttribute: CUDA_ERROR_UNKNOWN")

    monkeypatch.setattr(Device, "facts", silent)
    with pytest.raises(BackendUnavailableError, match="cuDeviceGetAttribute"):
        open_device("h100", "sm_90a")
    assert len(closed) == 1


def test_another_gpu_is_refused(artifact, gpu, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_MAJOR", "8")
    with pytest.raises(UsageError, match=r"is for h100 \(sm_90a\), the device is Pretended GPU \(sm_80\)"):
        Triton().on_device(artifact, H100, TritonOptions(rest="cpu"))
    with launches.Recording(launches.records(artifact)) as device:
        row = bundle.read(artifact)["launches"][0]
        with pytest.raises(UsageError, match="is code for sm_90a, the device is Pretended GPU"):
            Function(device, read(artifact / bundle.FOLDER, row["kernels"][0]))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FAKE_CUDA_LOAD", "209", r"does not load: cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU \(209\)"),
        ("FAKE_CUDA_FUNCTION", "500", "does not load: cuModuleGetFunction"),
        ("FAKE_CUDA_SHARED", "1024", "does not load: cuFuncSetAttribute"),
    ],
)
def test_code_that_the_driver_does_not_take_is_named(artifact, gpu, monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match=said) as caught:
        Triton().on_device(artifact, H100, TritonOptions(rest="cpu"))
    assert "CUDA driver 13000" in caught.value.hint


def test_a_launch_that_fails_names_its_node(artifact, gpu, monkeypatch):
    with Triton().on_device(artifact, H100, TritonOptions(rest="cpu")) as session:
        monkeypatch.setenv("FAKE_CUDA_LAUNCH", "700")
        with pytest.raises(ModelError, match=r"LayerNorm\): cuLaunchKernel: CUDA_ERROR_UNKNOWN \(700\)"):
            session.run(feeds(1, 3))


def test_inputs_that_do_not_fit_are_refused(artifact, gpu):
    with Triton().on_device(artifact, H100, TritonOptions(rest="cpu")) as session, pytest.raises(UsageError):
        session.run({"x": np.zeros((1, 3, 63), np.float16), "turned": np.array([True])})


@pytest.mark.parametrize("file", ["kernels/*.cubin", "kernels/*.json", "model.onnx", "launches.json"])
def test_a_file_that_is_missing_is_named(artifact, gpu, tmp_path, file):
    folder = Path(shutil.copytree(artifact, tmp_path / "copy"))
    next(folder.glob(file)).unlink()
    with pytest.raises(ModelError, match="is missing"):
        Triton().on_device(folder, H100, TritonOptions(rest="cpu"))


def test_code_that_was_changed_is_not_loaded(artifact, gpu, tmp_path):
    folder = Path(shutil.copytree(artifact, tmp_path / "copy"))
    with next(folder.glob("kernels/*.cubin")).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError, match="is not the code that"):
        Triton().on_device(folder, H100, TritonOptions(rest="cpu"))


def test_launches_of_another_version_are_refused(artifact, gpu, tmp_path):
    (tmp_path / bundle.LAUNCHES).write_text(json.dumps({"version": 1, "launches": []}))
    with pytest.raises(ModelError, match="another version"):
        bundle.read(tmp_path)


@pytest.fixture
def function(artifact, gpu):
    """The first program, of a LayerNorm."""
    with launches.Recording(launches.records(artifact)) as device:
        yield Function(
            device, read(artifact / bundle.FOLDER, bundle.read(artifact)["launches"][0]["kernels"][0])
        )


@pytest.mark.parametrize(
    ("inputs", "outputs", "rows", "said"),
    [
        (
            [1024, 2048 + 8, 4096],
            [512],
            4,
            "argument scale is 2056, and the code was promised a multiple of 16",
        ),
        ([1024, 2048, 4096], [520], 4, "argument y is 520"),
        ([1024, None, 4096], [512], 4, "argument scale is left out"),
        ([1024, 2048, 4096], [512], 1 << 33, "argument rows is 8589934592, more than 32 bits hold"),
        ([1024, 2048, 4096], [512], 1 << 40, "blocks are more than a GPU starts"),
    ],
)
def test_promises_that_the_code_relies_on_are_checked(function, inputs, outputs, rows, said):
    with pytest.raises(ModelError, match=said):
        function.prepare(inputs, outputs, {"rows": rows}, lambda size: 256)


def in_place(artifact, tmp_path, launch, output, written):
    """The artifact, with a launch that writes one of its inputs."""
    folder = Path(shutil.copytree(artifact, tmp_path / "copy"))
    for name in bundle.read(folder)["launches"][launch]["kernels"]:
        file = folder / bundle.FOLDER / f"{name}.json"
        record = json.loads(file.read_text())
        record["program"]["aliases"] = {str(output): written}
        file.write_text(json.dumps(record))
    return folder


def test_what_is_written_in_place_and_read_later_starts_as_a_copy(artifact, gpu, tmp_path):
    # The first norm reads the input, which is added at the end of the block too.
    folder = in_place(artifact, tmp_path, 0, 0, 0)
    given, seen = feeds(1, 3), []

    def compute(launch):
        if launch["record"]["program"].get("aliases") and not seen:
            seen.append(launches.memory(launch["arguments"]["y"], given["x"]).copy())
            assert launch["arguments"]["y"] != launch["arguments"]["x"]

    with launches.Recording(launches.records(folder), compute) as device:
        session = DeviceSession(folder, device, rest="cpu")
        session.run(given)
        session.close()
    assert (seen[0] == given["x"]).all()


@pytest.mark.parametrize("once", [True, False])
def test_what_nobody_reads_later_is_written_in_place(artifact, gpu, tmp_path, once):
    rows = bundle.read(artifact)["launches"]
    # The last one adds the input to what the branch gave; inputs that are bound for several runs stay as they are.
    assert rows[-1]["op"] == "AddLayerNorm"
    at = rows[-1]["inputs"].index("x")
    folder = in_place(artifact, tmp_path, len(rows) - 1, 0, at)
    given, written = feeds(1, 3), []

    def compute(launch):
        if launch["record"]["program"].get("aliases"):
            read = launch["arguments"][("x", "residual")[at]]
            written.append(launch["arguments"]["y"] == read)

    with launches.Recording(launches.records(folder), compute) as device:
        session = DeviceSession(folder, device, rest="cpu")
        if once:
            session.run(given)
            session.run(given)
        else:
            session.bind(given)
            session.enqueue()
            session.enqueue()
        session.close()
    assert written == [once] * 2


def test_no_rows_start_nothing(function):
    prepared = function.prepare([1024, 2048, 4096], [512], {"rows": 0}, lambda size: 256)
    assert prepared.grid == (0, 1, 1)
    prepared.start(function.device)
    assert function.device.seen == []


def test_onnx_runtime_without_cuda_is_refused_and_not_taken_in_its_place(artifact, gpu):
    with pytest.raises(BackendUnavailableError, match="ONNX Runtime with CUDA") as caught:
        Triton().on_device(artifact, H100, TritonOptions())
    assert "pip install onnxruntime-gpu" in caught.value.hint


def test_cuda_that_does_not_run_is_not_replaced_by_the_processor(artifact, gpu, monkeypatch):
    # As onnxruntime-gpu is where CUDA's libraries are missing: it has the name, and its sessions are the processor's.
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    import onnxruntime as ort

    real = ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda *a, **k: real(*a, **{**k, "providers": ["CPUExecutionProvider"]})
    )
    need_provider("cuda")
    with pytest.raises(BackendUnavailableError, match="does not run with it here"):
        Triton().on_device(artifact, H100, TritonOptions())


def test_tensors_go_to_the_device_and_back_as_they_are(gpu):
    with launches.Recording({}) as device:
        pool = Pool(device)
        for array in (
            np.arange(6, dtype=np.float32).reshape(2, 3), np.array(7, np.int64), np.zeros((0, 4), np.int8),
            np.linspace(-2, 2, 5).astype(ml_dtypes.bfloat16),
        ):  # fmt: skip
            tensor = Tensor.of(array, ir.DataType.from_numpy(array.dtype))
            address = tensor.to_device(pool)
            assert address % 16 == 0 and tensor.to_device(pool) == address
            there = Tensor(shape=tensor.shape, dtype=tensor.dtype, device=address, owners=[tensor])
            back = there.array(pool)
            assert back.dtype == array.dtype and back.shape == array.shape and (back == array).all()


def test_a_device_without_room_says_how_much_was_asked_for(gpu, monkeypatch):
    with launches.Recording({}) as device:

        def full(size):
            raise CudaError("cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY (2)")

        monkeypatch.setattr(device, "empty", full)
        with pytest.raises(ModelError, match="no room for 1024 bytes more: cuMemAlloc_v2"):
            Pool(device).take(600)


def test_strings_between_steps_are_refused_by_name():
    text = """
<ir_version: 10, opset_import: ["" : 21, "optkit" : 1]>
g (string[N] words, float[N, 16] x) => (float[N, 16] y, string[N] z) {
  z = Identity (words)
  y = optkit.LayerNorm (x, s, s)
}
"""
    model = parse(text, s=np.ones(16, np.float32))
    calls = [n for n in model.graph if n.domain == "optkit"]
    with pytest.raises(
        ModelError, match="words goes between steps of the device, and is not a tensor of numbers"
    ):
        schedule(model.graph, calls)


def test_backends_without_a_runtime_of_their_own_say_so(tmp_path):
    import optkit

    text = '<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }'
    optkit.compile(parse(text), recipe="fp32", out=tmp_path / "out")
    with pytest.raises(UsageError, match="no runtime for onnxruntime artifacts"):
        Artifact(tmp_path / "out").on_device()
