"""Kernels as plug-ins of TensorRT: the graph that calls them, and the C++, compiled with TensorRT's headers and run without TensorRT.

The headers are not part of optkit: ``$OPTKIT_TENSORRT_INCLUDE`` is a folder with ``NvInferRuntime.h`` and ``cuda.h`` below it, several are
separated by colons. Without them the C++ is only written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends.triton import bundle, plugins
from optkit.backends.triton.lower import Triton, TritonOptions
from optkit.errors import ModelError
from optkit.kernels.expressions import evaluate, of_shapes
from optkit.kernels.launching import Function, read
from optkit.passes.base import Context
from optkit.passes.lowering.kernels import CallKernels
from optkit.targets import target
from optkit.testing import parse

HERE = Path(__file__).resolve().parent
H100 = target("h100")
INCLUDE = [p for p in os.environ.get("OPTKIT_TENSORRT_INCLUDE", "").split(":") if p]
pytestmark = pytest.mark.needs("triton")

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[B, S, 64] x, float16[B, 4, S, 16] q, bool[1] turned) => (float16[B, S, 64] y, float16[B, 4, S, 16] a, float[B, S, 64] e)
<float step = {0.02}, int8 zero = {-3}> {
  h = MatMul (x, w)
  c = Add (h, s)
  t = Add (x, c)
  n = LayerNormalization <axis = -1> (t, s, s)
  z = MatMul (n, w)
  y = Add (t, z)
  u = Cast <to = 1> (y)
  grid = QuantizeLinear (u, step, zero)
  back = DequantizeLinear (grid, step, zero)
  eight = DequantizeLinear <axis = 1> (weights, steps, zeros)
  e = MatMul (back, eight)
  k = Transpose <perm = [0, 1, 3, 2]> (q)
  scores = MatMul (q, k)
  shares = Softmax <axis = -1> (scores)
  p = MatMul (shares, q)
  a = If (turned) <
    then_branch = then_g () => (float16[B, 4, S, 16] i) { i = Neg (p) },
    else_branch = else_g () => (float16[B, 4, S, 16] j) { j = Identity (p) }
  >
}
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    random = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = parse(
            TEXT, w=(random.standard_normal((64, 64)) / 8).astype(np.float16), s=np.linspace(0.5, 1.5, 64).astype(np.float16),
            weights=random.integers(-127, 128, (64, 64)).astype(np.int8), steps=np.full(64, 0.01, np.float32), zeros=np.zeros(64, np.int8),
        )  # fmt: skip
        CallKernels().run(model, Context(target=H100))
        folder = tmp_path_factory.mktemp("plugins")
        Triton().lower(model, H100, TritonOptions(rest="cpu", plugins=True), folder)
    return folder


def nodes(artifact):
    model = ir.load(artifact / plugins.FOLDER / bundle.MODEL)
    return model, [n for n in model.graph if n.op_type.startswith("Optkit")]


def test_the_graph_calls_plugins_by_name_and_program(artifact):
    model, found = nodes(artifact)
    assert not model.functions
    assert sorted(n.op_type for n in found) == [
        "OptkitAddLayerNorm",
        "OptkitAttention",
        "OptkitLinear",
        "OptkitLinearInt8",
        "OptkitMatMul",
        "OptkitQuantize",
    ]
    rows = bundle.read(artifact)["launches"]
    for node in found:
        assert node.attributes["plugin_namespace"].as_string() == "optkit"
        assert node.attributes["plugin_version"].as_string() == "1"
        row = next(r for r in rows if r["outputs"][0]["name"] == node.outputs[0].name)
        assert [v.name for v in node.inputs] == row["inputs"]
        assert node.attributes["program"].as_string().startswith(row["kernels"][0] + ".")
    assert {n.op_type for n in model.graph} - {n.op_type for n in found} == {"Add", "If"}


def test_the_source_names_every_program_and_its_code_once(artifact):
    text = (artifact / plugins.FOLDER / plugins.SOURCE).read_text()
    _, found = nodes(artifact)
    programs = {n.attributes["program"].as_string() for n in found}
    assert all(text.count(f'"{name}"') == 1 for name in programs)
    kernels = {name.rpartition(".")[0] for name in programs}
    assert all(text.count(f"../kernels/{name}.cubin") == 1 for name in kernels)
    assert not any(mark in text for mark in ("@ARCH@", "@CODE@", "@PROGRAMS@", "@TABLE@", "@CREATORS@"))


@pytest.fixture(scope="module")
def host(artifact, tmp_path_factory) -> Path:
    """TensorRT's part, played by a program."""
    compiler = shutil.which("g++")
    if compiler is None or not INCLUDE:
        pytest.skip("needs g++, and TensorRT's headers in $OPTKIT_TENSORRT_INCLUDE")
    folder = tmp_path_factory.mktemp("host")
    flags = [f for p in INCLUDE for f in ("-isystem", p)] + [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fPIC",
    ]
    subprocess.run(
        ["cc", "-c", "-fPIC", "-w", "-o", folder / "cuda.o", HERE / "device" / "libcuda.c"], check=True
    )
    subprocess.run(
        [compiler, *flags, "-shared", "-fvisibility=hidden", "-Wno-deprecated-declarations", "-o", folder / "liboptkit.so", plugins.SOURCE],
        cwd=artifact / plugins.FOLDER, check=True,
    )  # fmt: skip
    subprocess.run(
        [compiler, *flags, "-Wno-deprecated-declarations", "-rdynamic", "-o", folder / "host", HERE / "device" / "plugin_host.cpp",
         folder / "cuda.o", folder / "liboptkit.so", f"-Wl,-rpath,{folder}"],
        check=True,
    )  # fmt: skip
    return folder / "host"


class Nothing:
    """A device that is asked for nothing but its name."""

    def facts(self):
        return {"major": 9, "minor": 0, "device": "", "cuda_driver": 0}

    def load(self, code, entry, *, shared=0):
        return 1


TYPES = {"FLOAT": 0, "FLOAT16": 1, "INT8": 2, "INT32": 3}


@pytest.mark.parametrize(("b", "s"), [(1, 1), (2, 5), (3, 200)])
def test_plugins_answer_and_launch_as_the_runtime_does(artifact, host, b, s):
    shapes = {"x": (b, s, 64), "q": (b, 4, s, 16)}
    rows = bundle.read(artifact)["launches"]
    _, found = nodes(artifact)
    for node in found:
        row = next(r for r in rows if r["outputs"][0]["name"] == node.outputs[0].name)
        given = [
            tuple(v.const_value.shape.numpy()) if v.const_value is not None
            else shapes["q"] if len(v.shape) == 4 else shapes["x"]
            for v in node.inputs
        ]  # fmt: skip
        code = read(artifact / bundle.FOLDER, row["kernels"][0])
        letters = {"i32": "i", "i64": "l"}
        kinds = (
            "".join(letters.get(code.record["signature"][p], "p") for p in code.record["parameters"]) + "pp"
        )
        dims = ",".join("x".join(map(str, shape)) or "-" for shape in given)
        arguments = [node.op_type, node.attributes["program"].as_string(), dims, kinds]
        done = subprocess.run([host, *arguments], capture_output=True, text=True, check=True)
        said, launched, after = (json.loads(line) for line in done.stdout.splitlines())
        known = of_shapes(given)
        outputs = [o for o in row["outputs"] if o is not None]
        assert said["outputs"] == [
            [TYPES[o["type"]], *(evaluate(d, known) for d in o["shape"])] for o in outputs
        ]
        types = [v.dtype.name for v in node.inputs] + [o["type"] for o in outputs]
        assert said["accepted"] == [TYPES[kind] for kind in types]
        sizes = {name: evaluate(text, known) for name, text in row["sizes"].items()}
        asked = []

        def allocate(size, asked=asked):
            asked.append(size)
            return 0x7000100

        right = Function(Nothing(), code).prepare(
            [0x1000 * (i + 1) for i in range(len(given))], [0x100000 * (i + 1) for i in range(len(outputs))], sizes, allocate
        )  # fmt: skip
        assert launched["grid"] == list(right.grid) and launched["threads"] == right.threads
        assert launched["shared"] == right.shared and launched["stream"] == 7
        assert launched["arguments"] == [a.value for a in right.arguments]
        assert said["workspace"] == (sum(asked) + 256 if asked else 0)
        # Without its code it does not run; operands that are not aligned are refused.
        assert after == {"early": 1, "load": 0, "done": 0, "crooked": 1}


def test_a_program_that_nobody_knows_makes_no_plugin(host):
    done = subprocess.run([host, "OptkitLinear", "another.0", "2x64", "p"], check=False)
    assert done.returncode == 3
    assert subprocess.run([host, "OptkitNothing", "another.0", "2x64", "p"], check=False).returncode == 2


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("min(132, cdiv(rows, 128) * 2)", "std::min(int64_t{132}, (cdiv(rows, int64_t{128}) * int64_t{2}))"),
        ("elements(0) // 64 - 1", "((s.elements({0}) / int64_t{64}) - int64_t{1})"),
    ],
)
def test_sizes_are_written_in_cpp(text, written):
    assert plugins._number(text) == written


GAP = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[N, 64] x, float16[N, 64] r) => (int8[N, 64] q, float16[N, 64] y) <float step = {0.02}, int8 zero = {0}> {
  t = Add (x, r)
  n = LayerNormalization <axis = -1> (t, s, s)
  f = Cast <to = 1> (n)
  q = QuantizeLinear (f, step, zero)
  y = Neg (t)
}
"""


def test_outputs_that_nobody_reads_are_no_outputs_of_plugins(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "cache"))
    model = parse(GAP, s=np.linspace(0.5, 1.5, 64).astype(np.float16))
    CallKernels().run(model, Context(target=H100))
    (tmp_path / "out").mkdir()
    Triton().lower(model, H100, TritonOptions(rest="cpu", plugins=True), tmp_path / "out")
    (row,) = bundle.read(tmp_path / "out")["launches"]
    assert [o is None for o in row["outputs"]] == [False, True, False]
    written, (node,) = nodes(tmp_path / "out")
    assert [v.name for v in node.outputs] == [row["outputs"][0]["name"], row["outputs"][2]["name"]]
    assert [v.name for v in written.graph.outputs] == ["q", "y"]
    source = (tmp_path / "out" / plugins.FOLDER / plugins.SOURCE).read_text()
    assert "a_q = reinterpret_cast<CUdeviceptr>(out[0])" in source
    assert "a_total = reinterpret_cast<CUdeviceptr>(out[1])" in source
    assert "out[2]" not in source


def test_what_cannot_be_a_plugin_is_refused_by_name(artifact, tmp_path):
    folder = Path(shutil.copytree(artifact, tmp_path / "copy"))
    facts = json.loads((folder / bundle.LAUNCHES).read_text())
    facts["launches"][0]["inputs"][0] = None
    (folder / bundle.LAUNCHES).write_text(json.dumps(facts))
    with pytest.raises(ModelError, match="a call that leaves out operands cannot be a plug-in"):
        plugins.write(folder)
    with pytest.raises(ModelError, match="is not a size that TensorRT works out"):
        plugins._symbol("axis(0, 0) % 2")
    with pytest.raises(ModelError, match="is not a size"):
        plugins._number("2.5")
