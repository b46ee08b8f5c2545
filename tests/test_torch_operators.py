"""Kernels as operators of PyTorch: on a processor, traced, exported, compiled, and launched by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import optkit
from optkit.errors import UnknownNameError, UsageError
from optkit.kernels import KERNELS

torch = pytest.importorskip("torch")

from optkit.benchmarks.rivals import tensor  # noqa: E402
from optkit.torch import bodies  # noqa: E402
from optkit.torch.operators import body, launch, offered, operator  # noqa: E402

# Those whose bodies are made of operators that optkit.torch.bodies has.
NAMES = sorted(offered().values())
# Their bodies round to half precision before they round to integers, which may then come out one beside.
HALVES = {name for name in NAMES if name.endswith("-quantize")} | {"rotary-write-quantized"}


def tensors(kernel, problem, rows=3, seed=0):
    return [tensor(array, "cpu") for array in kernel.draw(problem, rows, seed)]


def test_the_kernels_of_the_table_are_offered():
    assert {"layer-norm", "linear", "attention", "linear-int8", "linear-int4", "rotary", "softmax"} <= set(
        NAMES
    )
    assert all(
        torch.ops.optkit.__getattr__(word).default is operator(name) for word, name in offered().items()
    )


def test_an_operator_that_nobody_offers_is_refused():
    with pytest.raises(UnknownNameError) as caught:
        operator("layer-nrom")
    assert "layer_norm" in str(caught.value.hint)


@pytest.mark.parametrize("name", NAMES)
def test_on_a_processor_they_compute_what_the_reference_does(name):
    kernel = KERNELS[name]()
    for problem in kernel.small:
        inputs = tensors(kernel, problem)
        found = operator(name)(*inputs, **kernel.attributes(problem))
        found = found if isinstance(found, tuple) else (found,)
        arrays = kernel.draw(problem, 3, 0)
        # An operator gives all that it has.
        whole = {**problem, **{k: True for k in ("normal", "total")[: len(found) - 1] if k in problem}}
        for value, right in zip(found, kernel.reference(whole, arrays), strict=False):
            if not value.dtype.is_floating_point:
                most = 1 if value.dtype == torch.int8 and name in HALVES else 0
                assert np.abs(value.numpy() - right).max() <= most
                continue
            # Half precision rounds in each operator of the body, also where what comes out is float32.
            kind = (
                inputs[0].dtype
                if inputs[0].dtype.itemsize == 2 and value.dtype.itemsize == 4
                else value.dtype
            )
            step = {1: 0.07, 2: 4e-3 if kind == torch.float16 else 3e-2, 4: 1e-5}[kind.itemsize]
            scale = max(1.0, float(np.abs(right).max()))
            np.testing.assert_allclose(value.double().numpy() / scale, right / scale, rtol=0, atol=step)


@pytest.mark.parametrize("name", NAMES)
def test_torch_finds_nothing_wrong_with_schema_and_shapes(name):
    kernel = KERNELS[name]()
    problem = kernel.small[0]
    arguments = tuple(tensors(kernel, problem))
    # The check of schemas multiplies what it is given, which torch does not do with 8 bits.
    small = any(x.dtype == torch.float8_e4m3fn for x in arguments)
    checks = ("test_faketensor",) if small else ("test_schema", "test_faketensor")
    torch.library.opcheck(operator(name), arguments, kernel.attributes(problem), test_utils=checks)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.scale = torch.nn.Parameter(torch.rand(32, generator=generator) + 0.5)
        self.w = torch.nn.Parameter(torch.randn(32, 32, generator=generator) / 6)

    def forward(self, x, residual):
        y, total = torch.ops.optkit.add_rms_norm(x, residual, self.scale, 1e-6)
        return torch.ops.optkit.swiglu(y @ self.w, total)


def given(rows):
    generator = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(rows, 32, generator=generator) for _ in range(2))


def test_export_keeps_them_with_their_free_axes():
    free = {0: torch.export.Dim("rows", min=1, max=64)}
    program = torch.export.export(Block(), given(4), dynamic_shapes=(free, free))
    called = [str(n.target) for n in program.graph.nodes if "optkit" in str(n.target)]
    assert called == ["optkit.add_rms_norm.default", "optkit.swiglu.default"]
    torch.testing.assert_close(program.module()(*given(7)), Block()(*given(7)))


def test_torch_compile_takes_them_apart_where_there_is_no_gpu():
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(Block(), backend="aot_eager", fullgraph=True)(*given(5))
    torch.testing.assert_close(found, Block()(*given(5)))


@pytest.mark.needs("onnxscript")
def test_optkit_compiles_a_module_that_calls_them(tmp_path):
    artifact, _ = optkit.compile(
        Block(), given(4), dynamic_shapes={"x": {0: "rows"}, "residual": {0: "rows"}}, recipe="fp32", out=tmp_path / "out"
    )  # fmt: skip
    x, residual = given(9)
    (found,) = artifact.run({"x": x.numpy(), "residual": residual.numpy()}).values()
    np.testing.assert_allclose(found, Block()(x, residual).detach().numpy(), atol=1e-5)


_LAUNCH = """
import sys
import optkit.kernels.triton.interpret  # mends the interpreter
from test_torch_operators import HALVES, KERNELS, NAMES, body, launch, tensors, torch
for name in NAMES:
    kernel = KERNELS[name]()
    for problem in kernel.small:
        inputs, attributes = tensors(kernel, problem), kernel.attributes(problem)
        found = launch(kernel, inputs, attributes, (9, 0))
        right = body(name)(*inputs, **attributes)
        right = right if isinstance(right, tuple) else (right,)
        for a, b in zip(found, right, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape, (name, a.dtype, b.dtype, a.shape, b.shape)
            limits = {torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 6e-2, torch.float8_e4m3fn: 0.13}
            wide = b.double().abs().max().clamp(min=1)
            kind = inputs[0].dtype if inputs[0].dtype.itemsize == 2 and a.dtype.itemsize == 4 else a.dtype
            limit = limits.get(kind, 1.01 / wide if name in HALVES and a.dtype == torch.int8 else 0)
            assert (a.double() - b.double()).abs().max() / wide <= limit, (name, problem)
        print(name)
"""


@pytest.mark.needs("triton")
def test_what_is_launched_computes_the_body(tmp_path):
    folder = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": folder}
    command = [sys.executable, "-c", _LAUNCH]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) == set(NAMES)


def test_sizes_without_a_program_are_refused_before_anything_is_launched():
    with pytest.raises(UsageError, match="layer-norm: rows of 24 are not read 16 bytes at a time"):
        launch(
            KERNELS["layer-norm"](), [torch.zeros(2, 24)] + [torch.ones(24)] * 2, {"epsilon": 1e-5}, (9, 0)
        )


def test_bodies_with_operators_that_are_not_here_are_known():
    assert bodies.missing(KERNELS["linear"]().function()) == []
    assert body("softmax")(torch.zeros(2, 16)).shape == (2, 16)
    text = '<domain: "optkit", opset_import: ["" : 21]> F (x) => (y) { y = Erf (x) }'
    import onnx
    import onnx_ir as ir

    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    assert bodies.missing(function) == ["Erf"]
