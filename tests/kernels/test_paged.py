"""Pages of keys and values: calls by name, since ONNX has no operator for them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends.triton.bundle import refusal
from optkit.frontend import load
from optkit.graph import walk
from optkit.kernels import KERNELS
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
