"""On a GPU: machine code against float64, whole models against ONNX Runtime, operators of torch against their bodies.

``pytest -m device`` runs these alone. None of them ran yet where this was written: there was no GPU.
"""

from __future__ import annotations

import numpy as np
import pytest

import optkit
from optkit.artifact import Artifact
from optkit.benchmarks import gpu
from optkit.errors import BackendUnavailableError, UsageError
from optkit.finish import finalize
from optkit.kernels import KERNELS
from optkit.kernels.cuda import Device
from optkit.kernels.numerics import errors, launch
from optkit.kernels.placed import place

pytestmark = [pytest.mark.device, pytest.mark.needs("triton", "torch")]


@pytest.fixture(scope="module")
def device():
    with Device() as found:
        yield found


@pytest.fixture(scope="module")
def where(device):
    try:
        return gpu.named(device, None)
    except UsageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", list(KERNELS))
def test_machine_code_computes_what_the_reference_does_at_the_edges_of_blocks(device, where, name):
    kernel = KERNELS[name]()
    for problem in kernel.small:
        for rows in kernel.edges(problem, where.capability):
            one = launch(kernel, problem, where.capability, rows)
            (placed,) = place(device, [one])
            for error in errors(one, placed.run()):
                assert error.steps <= kernel.allowed(problem), (problem, rows, error.output)
            placed.close()


@pytest.mark.parametrize("rest", ["cpu", "cuda"])
def test_a_model_is_finished_and_agrees_with_onnx_runtime(where, tmp_path, rest):
    import onnxruntime as ort
    import torch

    from optkit.benchmarks.builders.minilm import SentenceEncoder

    if rest == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    ids, mask = torch.randint(0, 1000, (4, 32)), torch.ones(4, 32, dtype=torch.int64)
    module = SentenceEncoder().eval()
    optkit.compile(
        module, (ids, mask), target=where, recipe="triton-fp16", overrides=[f"options.rest={rest}"], out=tmp_path / "out"
    )  # fmt: skip
    found = finalize(tmp_path / "out")
    evidence = Artifact(tmp_path / "out").manifest.evidence
    assert evidence.ran_on_device and evidence.timed_on_device
    assert found.cosine > 0.999 and found.batches[0]["median_ms"] > 0
    with Artifact(tmp_path / "out").on_device() as session:
        (value,) = session.run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()}).values()
    with torch.inference_mode():
        np.testing.assert_allclose(value, module(ids, mask).numpy(), atol=0.01)


def test_an_engine_of_tensorrt_is_built_verified_and_timed(where, tmp_path):
    import torch

    from optkit.benchmarks.builders.minilm import SentenceEncoder

    ids, mask = torch.randint(0, 1000, (4, 32)), torch.ones(4, 32, dtype=torch.int64)
    optkit.compile(
        SentenceEncoder().eval(), (ids, mask), target=where, recipe="tensorrt-fp16", out=tmp_path / "out"
    )
    try:
        found = finalize(tmp_path / "out")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    evidence = Artifact(tmp_path / "out").manifest.evidence
    assert evidence.ran_on_device and evidence.timed_on_device
    assert found.cosine > 0.999 and found.batches[0]["median_ms"] > 0


def test_operators_of_torch_launch_what_their_bodies_mean(where):
    import torch

    from optkit.benchmarks.rivals import tensor
    from optkit.torch.operators import body, offered, operator

    if not torch.cuda.is_available():
        pytest.skip("needs torch with CUDA")
    for name in offered().values():
        kernel = KERNELS[name]()
        problem = kernel.small[0]
        inputs = [tensor(a, "cuda") for a in kernel.draw(problem, 5, 0) if a is not None]
        attributes = kernel.attributes(problem)
        found = operator(name)(*inputs, **attributes)
        right = body(name)(*(x.cpu() for x in inputs), **attributes)
        for a, b in zip(_tuple(found), _tuple(right), strict=True):
            assert (
                torch.nn.functional.cosine_similarity(a.cpu().double().ravel(), b.double().ravel(), 0) > 0.999
            )


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


def test_a_benchmark_of_one_kernel_is_complete(device, where):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs torch with CUDA")
    kernel = KERNELS["rms-norm"]()
    record = gpu.kernel_record(device, where, kernel, kernel.examples[0], 1e12, rows=4096)
    assert record["ms"] > 0 and record["rivals"][0]["cosine"] > 0.999
