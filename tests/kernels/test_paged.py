"""Pages of keys and values: calls by name, since ONNX has no operator for them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends.triton.bundle import refusal
from optkit.frontend import load
from optkit.graph import walk
from optkit.kernels import KERNELS
from optkit.kernels.numerics import Launch, interpret, launch
from optkit.passes.base import Context
from optkit.passes.lowering.kernels import CallKernels
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse

H100 = target("h100")
CALL = """
<ir_version: 10, opset_import: ["" : 21, "optkit" : 1]>
g (float16[2, 8, 64] q, float16[P, 2, 16, 64] k, float16[P, 2, 16, 64] v, int32[2, M] table, int32[2] lengths) => (float16[2, 8, 64] y) {
  y = optkit.PagedAttention <scale = 0.125, window = 0> (q, k, v, table, lengths)
}
"""


def _model(text=CALL, name="paged-attention"):
    model = parse(text)
    function = KERNELS[name]().function()
    model.functions[function.identifier()] = function
    return model


def test_a_call_by_name_is_kept_and_compiled():
    model = load(_model())
    (node,) = [n for n in walk(model) if n.domain == "optkit"]
    assert refusal(node, H100) is None
    assert KERNELS["paged-attention"]().problem(node) == {
        "format": "fp16", "depth": 64, "page": 16, "share": 4, "window": 0, "scale": "0.125",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("float16", "float", "no formats"),
        ("float16[P, 2, 16, 64] k", "int8[P, 2, 16, 64] k", "no formats"),
        ("float16[P, 2, 16, 64] k", "float16[P, 2, 64] k", "not heads of"),
        ("16, 64] k", "S, 64] k", "not fixed"),
        ("64]", "48]", "16, 32, 64, 128"),
        ("8, 64]", "7, 64]", "do not share"),
        ("8, 64]", "128, 64]", "32 at most"),
    ],
)
def test_pages_that_no_program_reads_are_refused(old, new, why):
    (node,) = [n for n in walk(parse(CALL.replace(old, new))) if n.domain == "optkit"]
    assert why in refusal(node, H100)


def test_pages_in_eight_bit_floats_are_refused_before_ada():
    text = CALL.replace("float16[P", "float8e4m3fn[P").replace("PagedAttention", "PagedAttentionQuantized")
    text = text.replace("int32[2] lengths", "int32[2] lengths, float[2] ks, float[2] vs").replace(
        "lengths)\n", "lengths, ks, vs)\n"
    )
    (node,) = [n for n in walk(parse(text)) if n.domain == "optkit"]
    assert refusal(node, target("a100")) == "sm_80 has no fp8"
    assert refusal(node, target("l4")) is None


def test_what_is_written_is_what_is_read():
    write, read = KERNELS["rotary-write-quantized"](), KERNELS["paged-attention-quantized"]()
    problem = {**write.small[0], "stored": "int8"}
    k, v, cos, sin, slots, *_ = write.draw(problem, 5, seed=0)
    empty = np.zeros((3, 2, 16, 32), np.int8)
    scales = [np.full(2, 0.03, np.float32)] * 2
    slots = np.arange(5, dtype=np.int32) + 16  # the second page
    keys, values = write.reference(problem, [k, v, cos, sin, slots, empty, empty.copy(), *scales])
    q = k[-1]
    pages = {**read.small[0], "stored": "int8", "page": 16}
    table, lengths = np.array([[1]], np.int32), np.array([5], np.int32)
    (found,) = read.reference(
        pages, [q[None], keys.astype(np.int8), values.astype(np.int8), table, lengths, *scales]
    )
    low, high = np.split(k.astype(np.float64), 2, -1)
    turned = (
        k * cos.astype(np.float64)[:, None]
        + np.concatenate([-high, low], -1) * sin.astype(np.float64)[:, None]
    )
    scores = np.einsum("hd,thd->ht", q.astype(np.float64), turned) * 0.2
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("ht,thd->hd", shares / shares.sum(-1, keepdims=True), v.astype(np.float64))
    # Half a step of each value, and of each key in the scores.
    np.testing.assert_allclose(found[0], expected, atol=0.2)


def test_the_formats_of_a_cache_are_those_of_onnx():
    kernel = KERNELS["paged-attention-quantized"]()
    drawn = [kernel.draw(p, 3, seed=0)[1].dtype for p in kernel.small]
    assert [ir.DataType.from_numpy(d) for d in drawn] == [ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN]


PARTS = [
    ("paged-attention-parts", "paged-attention"),
    ("paged-attention-parts-quantized", "paged-attention-quantized"),
]


@pytest.mark.parametrize(("name", "whole"), PARTS)
@pytest.mark.parametrize("index", [0, 1])
def test_parts_merged_are_the_whole(name, whole, index):
    kernel, merge = KERNELS[name](), KERNELS["merge-parts"]()
    problem = kernel.small[index]
    inputs = kernel.draw(problem, 150, seed=2)
    found = kernel.reference(problem, inputs)
    assert found[1].shape[2] > 2
    (merged,) = merge.reference({}, found)
    np.testing.assert_allclose(merged, KERNELS[whole]().reference(problem, inputs)[0], atol=1e-12)


@pytest.mark.needs("triton", "torch")
@pytest.mark.parametrize(("name", "whole"), PARTS)
def test_what_the_interpreter_finds_of_parts_is_the_whole_too(name, whole):
    kernel, merge = KERNELS[name](), KERNELS["merge-parts"]()
    for problem in kernel.small:
        one = launch(kernel, problem, (9, 0), 150, seed=2)
        (found,) = interpret([one])
        to = {"format": "fp32", "output": "fp32", "depth": problem["depth"]}
        program = merge.program(to, (9, 0))
        (merged,) = interpret([Launch(kernel=merge, problem=to, program=program, inputs=found)])
        (right,) = KERNELS[whole]().reference(problem, one.inputs)
        # Shares are rounded to the format before they multiply the values.
        np.testing.assert_allclose(merged[0], right, atol=2e-2 if problem["format"] == "bf16" else 2e-3)


LONG = CALL.replace("int32[2, M]", "int32[2, 100]").replace("[P, ", "[300, ")


def test_few_samples_with_long_caches_are_decoded_in_parts():
    rng = np.random.default_rng(0)
    feeds = {
        "q": rng.standard_normal((2, 8, 64)).astype(np.float16),
        **{n: rng.standard_normal((300, 2, 16, 64)).astype(np.float16) for n in "kv"},
        "table": rng.permutation(300)[:200].reshape(2, 100).astype(np.int32),
        "lengths": np.array([1600, 700], np.int32),
    }
    model = _model(LONG)
    before = ReferenceSession(model).run(feeds)["y"]
    CallKernels().run(model, Context(target=H100))
    assert [n.op_type for n in model.graph] == ["PagedAttentionParts", "MergeParts"]
    assert [v.shape.numpy() for v in model.graph[0].outputs] == [(2, 8, 4, 64), (2, 8, 4)]
    assert all(refusal(n, H100) is None for n in model.graph)
    after = ReferenceSession(model).run(feeds)["y"]
    np.testing.assert_allclose(before.astype(np.float32), after.astype(np.float32), atol=2e-3)


@pytest.mark.parametrize(("old", "new"), [("2, 100]", "2, 60]"), ("2, 100]", "2, M]"), ("[2", "[40")])
def test_few_keys_many_samples_and_sizes_that_are_not_known_stay_whole(old, new):
    model = _model(LONG.replace(old, new))
    CallKernels().run(model, Context(target=H100))
    assert [n.op_type for n in model.graph] == ["PagedAttention"]
