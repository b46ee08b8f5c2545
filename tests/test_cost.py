"""Costs against sums by hand."""

from __future__ import annotations

import pytest

from optkit.cost import by_family, costs, floor
from optkit.testing import parse

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
MODEL = (
    HEADER
    + """
g (float[2, 3, 8, 8] x, int64[5] i) => (float[2, 16] y, float[5, 4] r)
<float[16, 3, 3, 3] w, float[1000, 4] table> {
  [conv] c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
  [relu] a = Relu (c)
  [pool] p = GlobalAveragePool (a)
  [view] y = Flatten (p)
  [look] r = Gather (table, i)
}
"""
)
PEAK, BANDWIDTH = {"fp32": 1e9}, 1e8


def _model():
    import numpy as np

    return parse(
        MODEL.replace("<float[16, 3, 3, 3] w, float[1000, 4] table>", ""),
        w=np.zeros((16, 3, 3, 3), np.float32),
        table=np.zeros((1000, 4), np.float32),
    )


def test_each_node_reads_and_writes_what_it_touches():
    found = costs(_model())
    assert found.nodes["conv"].macs == 2 * 16 * 64 * 27
    assert found.nodes["conv"].bytes == 4 * (2 * 3 * 64 + 16 * 27 + 2 * 16 * 64)
    assert found.nodes["relu"].bytes == 2 * 4 * 2 * 16 * 64
    assert (found.nodes["view"].macs, found.nodes["view"].bytes) == (0, 0)
    # Of a table, the rows that are looked up, not all.
    assert found.nodes["look"].bytes == 4 * 20 + 8 * 5 + 4 * 20


def test_families_add_up():
    model = _model()
    found = by_family(model, costs(model))
    assert next(iter(found)) == "conv"
    assert found["conv"].intensity == pytest.approx(2 * 55296 / (4 * (384 + 432 + 2048 + 2048 + 32)))
    assert found["shape"].parameters == 4000
    assert found["elementwise"].intensity == 0
    assert sum(f.nodes for f in found.values()) == 5


def test_the_floor_is_the_slower_of_operations_and_bytes():
    model = _model()
    found = costs(model)
    # A window of 3 reaches over the edge twice in each axis of 8, into pads.
    operations = 2 * 55296 * 22**2 // 24**2
    assert found.operations == {"fp32": operations}
    outside = 4 * 384 + 8 * 5 + 4 * 32 + 4 * 20
    least = floor(found, PEAK, lambda size: BANDWIDTH)
    assert least is not None
    assert (least.bytes, least.bound) == (4 * 432 + outside, "compute")
    assert least.seconds == pytest.approx(operations / 1e9)
    slow = floor(found, PEAK, lambda size: 1e3)
    assert slow is not None
    assert slow.bound == "memory"
    assert slow.seconds == pytest.approx(least.bytes / 1e3)


@pytest.mark.parametrize(
    ("size", "pads", "stride", "dilation"), [((1, 1), (1, 1, 1, 1), 1, 1), ((7, 5), (2, 0, 1, 3), 2, 1), ((6, 9), (3, 2, 3, 2), 1, 2)]
)  # fmt: skip
def test_a_convolution_multiplies_no_pads(size, pads, stride, dilation):
    import numpy as np

    from optkit.reference import ReferenceSession

    made = [
        (s + a + b - 2 * dilation - 1) // stride + 1 for s, a, b in zip(size, pads[:2], pads[2:], strict=True)
    ]
    text = (
        f"g (float[1, 2, {size[0]}, {size[1]}] x) => (float[1, 3, {made[0]}, {made[1]}] y) {{ y = Conv <kernel_shape = [3, 3], "
        f"pads = {list(pads)}, strides = [{stride}, {stride}], dilations = [{dilation}, {dilation}]> (x, w) }}"
    )
    model = parse(HEADER + text, w=np.ones((3, 2, 3, 3), np.float32))
    session = ReferenceSession(model)
    # Of ones alone, each output is how many products it has.
    (y,) = session.run({"x": np.ones((1, 2, *size), np.float32)}).values()
    session.close()
    assert costs(model).operations == {"fp32": 2 * int(y.sum())}


def test_outputs_have_the_sizes_that_follow_from_the_inputs():
    model = parse(HEADER + "g (float[2, 3] x) => (float[?, M] y) { y = Relu (x) }")
    assert costs(model).outside == {"x": 4 * 6, "y": 4 * 6}


def test_free_axes_leave_costs_open():
    model = parse(
        HEADER + "g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] w> { [p] y = MatMul (x, w) }".replace(
            "<float[4, 4] w>", "<float[4] w = {1, 2, 3, 4}>"
        ).replace("float[N, 4] y", "float[N] y")
    )  # fmt: skip
    found = costs(model)
    assert (found.nodes["p"].macs, found.nodes["p"].bytes) == (None, None)
    assert found.operations is None
    assert floor(found, PEAK, lambda size: BANDWIDTH) is None
    assert by_family(model, found)["matmul"].macs is None


def test_recurrent_steps_multiply_with_both_weights():
    import numpy as np

    source = (
        HEADER
        + """
        g (float[7, 2, 5] x) => (float[7, 1, 2, 3] y) {
          [rnn] y = LSTM <hidden_size = 3> (x, w, r)
        }
        """
    )
    model = parse(source, w=np.zeros((1, 12, 5), np.float32), r=np.zeros((1, 12, 3), np.float32))
    assert costs(model).nodes["rnn"].macs == 7 * 2 * (12 * 5 + 12 * 3)
    assert list(by_family(model, costs(model))) == ["recurrent"]


def test_products_between_int8_are_told_apart():
    import numpy as np

    source = (
        HEADER
        + """
        g (uint8[2, 4] x, float s, uint8 z) => (float[2, 3] y) {
          a = DequantizeLinear (x, s, z)
          b = DequantizeLinear (w, s)
          [p] y = MatMul (a, b)
        }
        """
    )
    model = parse(source, w=np.zeros((4, 3), np.int8))
    found = costs(model)
    assert found.nodes["p"].format == "int8"
    least = floor(found, {"int8": 1e9}, lambda size: BANDWIDTH)
    assert least is not None
    # One byte a weight; the scalars that come from outside count with the inputs.
    assert least.bytes == 12 + 8 + 4 + 1 + 24


@pytest.mark.parametrize(
    ("text", "read", "written"),
    [
        # One token of a prompt, in one half of two.
        (
            "g (float16[1, 512, 64] x) => (float16[1, 1, 32] y) { t = Transpose <perm = [0, 2, 1]> (x) a, b = Split <axis = 1, num_outputs = 2> (t) "
            "l = Gather <axis = 2> (b, last) u = Transpose <perm = [0, 2, 1]> (l) y = Relu (u) }",
            {"x": 2 * 32},
            {"y": 2 * 32},
        ),
        # Pages of a pool, and an input that only gives a size.
        (
            "g (float16[4096, 16, 64] x, int64[8] pages, float[8, 999] shaped) => (float16[8, 16, 64] y, int64[2] n) "
            "{ p = Gather (x, pages) y = Relu (p) n = Shape (shaped) }",
            {"x": 2 * 8 * 16 * 64, "pages": 8 * 8, "shaped": 0},
            {"y": 2 * 8 * 16 * 64, "n": 2 * 8},
        ),
        # A cache into which a row is written where it lies, and of which all is read.
        (
            "g (float16[512, 64] x, float16[1, 64] row, int64[1, 1] at) => (float16[512, 64] cache, float16[1, 64] y) "
            "{ cache = ScatterND (x, at, row) y = ReduceMax <keepdims = 1> (cache, axis) }",
            {"x": 2 * 512 * 64, "row": 2 * 64, "at": 8},
            {"cache": 2 * 64, "y": 2 * 64},
        ),
        # One that grows, of which all is read, and one that is only passed on.
        (
            "g (int8[1, 2, 1023, 64] x, int8[1, 2, 1, 64] new, int8[1, 2, 1023, 64] other, float[2] s) => "
            "(int8[1, 2, 1024, 64] cache, int8[1, 2, 1024, 64] z, float[1, 2, 1024, 1] y) "
            "{ cache = Concat <axis = 2> (x, new) z = Concat <axis = 2> (other, new) f = DequantizeLinear <axis = 1> (cache, s) "
            "y = ReduceMax <keepdims = 1> (f, axis) }",
            {"x": 2 * 1023 * 64, "new": 2 * 64, "other": 0, "s": 4 * 2},
            {"cache": 2 * 64, "z": 2 * 64, "y": 4 * 2 * 1024},
        ),
        (
            "g (float16[1, 1, 512] q, float16[1, 1, 128] k, float16[1, 1, 128] v, float16[1, 2, 1023, 64] x, float16[1, 2, 1023, 64] z, "
            "int32[1, 1] n, int32 t) => (float16[1, 1, 512] y, float16[1, 2, 1024, 64] a, float16[1, 2, 1024, 64] b) "
            "{ y, a, b = com.microsoft.GroupQueryAttention <num_heads = 8, kv_num_heads = 2> (q, k, v, x, z, n, t) }",
            {"q": 1024, "k": 256, "v": 256, "x": 2 * 2 * 1023 * 64, "z": 2 * 2 * 1023 * 64, "n": 4, "t": 4},
            {"y": 1024, "a": 2 * 2 * 64, "b": 2 * 2 * 64},
        ),
    ],
)  # fmt: skip
def test_of_inputs_what_is_read_counts_and_of_outputs_what_is_written(text, read, written):
    import numpy as np

    source = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n' + text
    constants = {"last": np.array([511]), "axis": np.array([-1 if "Concat" in text else 0])}
    model = parse(source, **{k: v for k, v in constants.items() if f"{k})" in text})
    assert costs(model).outside == read | written
