"""Plans for hardware that is not at hand: which nodes are launched together, and what each launch moves and multiplies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optkit.errors import BackendUnavailableError, UsageError
from optkit.kernels.triton.attention import CausalAttention
from optkit.planning import dollars, estimate, plan
from optkit.targets import TARGETS, target
from optkit.targets.prices import PRICES
from optkit.testing import parse

H100 = target("h100")
COLD = replace(H100, l2=None)
BLOCK = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[8, 64] x) => (float[8, 32] y) {
  h = MatMul (x, w)
  a = Add (h, b)
  g = Gelu (a)
  n = LayerNormalization <axis = -1> (g, s, s)
  t = Reshape (n, form)
  p = MatMul (t, v)
  y = Add (p, p)
}
"""
GIVEN = {
    "w": np.ones((64, 128), np.float32), "b": np.ones(128, np.float32), "s": np.ones(128, np.float32), "v": np.ones((128, 32), np.float32),
    "form": np.array([8, 128]),
}  # fmt: skip


def layers(precision=None, where=H100, text=BLOCK, **given):
    return plan(parse(text, **{**GIVEN, **given}), where, precision).layers


def test_what_follows_a_product_element_by_element_is_fused_behind_it():
    found = layers()
    assert [(layer.op, layer.nodes) for layer in found] == [
        ("MatMul", 3),
        ("LayerNormalization", 1),
        ("MatMul", 2),
    ]
    assert [layer.macs for layer in found] == [8 * 64 * 128, 0, 8 * 128 * 32]


def test_each_value_is_moved_once_and_what_is_fused_not_at_all():
    first, norm, second = layers()
    assert first.bytes == 4 * (8 * 64 + 64 * 128 + 128 + 8 * 128)
    assert norm.bytes == 4 * (8 * 128 + 128 + 8 * 128)
    assert second.bytes == 4 * (8 * 128 + 128 * 32 + 8 * 32)


@pytest.mark.parametrize(
    ("precision", "fmt", "width"),
    [("fp16", "fp16", 2), ("int8", "int8", 1), ("fp8", "fp8", 1), ("w4a16", "fp16", 0.5)],
)
def test_weights_have_the_width_of_the_precision_and_all_else_is_half(precision, fmt, width):
    first, *_ = layers(precision)
    assert first.format == fmt
    assert first.bytes == 2 * (8 * 64 + 128 + 8 * 128) + width * 64 * 128


def test_products_without_weights_stay_in_half_precision():
    text = BLOCK.replace("p = MatMul (t, v)", "u = Transpose <perm = [1, 0]> (t) p = MatMul (t, u)").replace(
        "[8, 32] y", "[8, 8] y"
    )
    model = parse(text, **{k: v for k, v in GIVEN.items() if k != "v"})
    assert [layer.format for layer in plan(model, H100, "int8").layers if layer.macs] == ["int8", "fp16"]


def test_what_no_fusion_saves_is_weights_inputs_and_outputs():
    first, norm, second = layers()
    assert (first.needed, norm.needed, second.needed) == (4 * (8 * 64 + 64 * 128), 0, 4 * (128 * 32 + 8 * 32))


def test_the_floor_is_the_longer_of_all_operations_and_all_bytes_and_not_above_the_estimate():
    whole = plan(parse(BLOCK, **GIVEN), COLD)
    compute = 2 * (8 * 64 * 128 + 8 * 128 * 32) / H100.peak["fp32"]
    memory = 4 * (8 * 64 + 64 * 128 + 128 * 32 + 8 * 32) / H100.bandwidth
    assert (whole.floor, whole.least.bound) == (pytest.approx(max(compute, memory)), "memory")
    assert whole.floor == whole.cold.seconds
    assert whole.floor <= sum(layer.floor for layer in whole.layers) * (1 + 1e-9)
    assert whole.floor <= whole.low <= whole.high
    for layer in whole.layers:
        assert layer.floor == pytest.approx(
            max(2 * layer.macs / H100.peak["fp32"], layer.needed / H100.bandwidth)
        )
        assert layer.floor <= layer.low <= layer.high


def test_the_floor_is_not_that_of_a_pool_of_which_pages_are_read():
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float16[100000, 64] pool, int64[8] pages) => (float16[8, 32] y) { x = Gather (pool, pages) y = MatMul (x, w) }
    """
    found = plan(parse(text, w=np.ones((64, 32), np.float16)), COLD)
    assert found.least.bytes == 2 * (8 * 64 + 64 * 32 + 8 * 32) + 8 * 8
    assert [layer.needed for layer in found.layers] == [found.least.bytes - 8 * 8]


def test_what_the_last_cache_holds_is_not_read_from_memory_but_with_cold_caches():
    warm, cold = plan(parse(BLOCK, **GIVEN), H100), plan(parse(BLOCK, **GIVEN), COLD)
    assert (warm.least.bound, warm.least.memory) == ("compute", 0)
    assert warm.floor == pytest.approx(2 * (8 * 64 * 128 + 8 * 128 * 32) / H100.peak["fp32"])
    assert warm.cold.seconds == cold.floor > warm.floor
    half = plan(parse(BLOCK, **GIVEN), replace(H100, l2=cold.least.bytes // 2))
    assert half.least.memory == pytest.approx(cold.least.memory / 2)


def test_compile_reports_the_floor_and_the_estimate_of_the_plan():
    model = parse(BLOCK, **GIVEN)
    reported, planned = estimate(model, H100, {"x": (8, 64)}), plan(model, H100)
    assert (reported.floor, reported.low, reported.high) == (planned.floor, planned.low, planned.high)
    assert reported.bound == planned.least.bound


# Softmax in float32 between products in float16, as a typed graph has it.
ATTENTION = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[2, 16, 8] q, float16[2, 16, 8] k, float16[2, 16, 8] v, float[16, 16] mask) => (float16[2, 16, 8] y) {
  t = Transpose <perm = [0, 2, 1]> (k)
  s = MatMul (q, t)
  f = Cast <to = 1> (s)
  a = Add (f, mask)
  p = Softmax (a)
  h = Cast <to = 10> (p)
  y = MatMul (h, v)
}
"""


def test_attention_is_one_layer_whose_scores_stay_inside():
    (layer,) = plan(parse(ATTENTION), H100).layers
    assert (layer.op, layer.nodes, layer.format) == ("Attention", 4, "fp16")
    assert layer.macs == 2 * (2 * 16 * 16 * 8)
    assert layer.bytes == 2 * 4 * (2 * 16 * 8) + 4 * 16 * 16


# What exporters write for a causal mask: from places, with the tokens that padding leaves, as a choice among scores.
MASKS = {
    "added": ("m = Where (near, zero, low) a = Add (f, m)", False),
    "chosen": ("a = Where (near, f, low)", False),
    "padded": (
        "p1 = Unsqueeze (tokens, one) b = And (near, p1) m = Where (b, zero, low) a = Add (f, m)",
        False,
    ),
    "multiplied": ("o = Not (near) c = Cast <to = 1> (o) m = Mul (c, low) a = Add (f, m)", False),
    "a window": (
        "d = Sub (i, j) w = Less (d, five) o = And (near, w) m = Where (o, zero, low) a = Add (f, m)",
        True,
    ),
    "a shift": ("m = Where (near, shift, low) a = Add (f, m)", False),
}
CAUSAL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[2, 4, 12, 8] q, float[2, 4, 8, 12] k, float[2, 4, 12, 8] v, bool[2, 1, 12] tokens, float[2, 1, 1, 12] shift) => (float[2, 4, 12, 8] y)
<float zero = {0}, float low = {-3.4e38}, int64 start = {0}, int64 step = {1}, int64[1] one = {1}, int64 five = {5}> {
  s = MatMul (q, k)
  f = Mul (s, eighth)
  shape = Shape <start = 2, end = 3> (q)
  n = Squeeze (shape)
  j = Range (start, n, step)
  i = Unsqueeze (j, one)
  near = LessOrEqual (j, i)
  %s
  p = Softmax (a)
  y = MatMul (p, v)
}
"""


@pytest.mark.parametrize("how", list(MASKS))
def test_the_floor_counts_no_key_that_no_query_sees(how):
    mask, window = MASKS[how]
    model = parse(CAUSAL % mask, eighth=np.float32(0.125))
    seen = sum(j <= i and (not window or i - j < 5) for i in range(12) for j in range(12))
    found = plan(model, replace(COLD, bandwidth=1e30))
    (layer,) = [one for one in found.layers if one.macs]
    assert found.least.compute == pytest.approx(2 * 2 * 2 * 4 * seen * 8 / H100.peak["fp32"])
    assert layer.floor == pytest.approx(found.floor)
    assert layer.macs == 2 * 2 * 4 * 12 * 12 * 8


def test_layers_that_use_one_mask_in_two_ways_are_told_apart():
    text = (CAUSAL % MASKS["chosen"][0]).replace(
        "y = MatMul (p, v)",
        """z = MatMul (p, v)
      s2 = MatMul (q, k) f2 = Mul (s2, eighth) a2 = Where (near, low, f2) p2 = Softmax (a2) z2 = MatMul (p2, v) y = Add (z, z2)""",
    )
    found = plan(parse(text, eighth=np.float32(0.125)), COLD)
    assert found.least.compute == pytest.approx(2 * 2 * 2 * 4 * (78 + 66) * 8 / H100.peak["fp32"])


def test_masks_in_halves_are_read_too():
    text = (CAUSAL % MASKS["added"][0]).replace("float zero = {0}, float low = {-3.4e38}, ", "")
    given = {"eighth": np.float16(0.125), "zero": np.float16(0), "low": np.float16(-65504)}
    found = plan(parse(text.replace("float", "float16"), **given), COLD)
    assert found.least.compute == pytest.approx(2 * 2 * 2 * 4 * 78 * 8 / H100.peak["fp16"])


def test_a_kernel_whose_body_makes_the_mask_counts_what_it_computes():
    text = """
    <ir_version: 10, opset_import: ["" : 21, "optkit" : 1]>
    g (float16[2, 4, 64, 16] q, float16[2, 4, 64, 16] k, float16[2, 4, 64, 16] v) => (float16[2, 4, 64, 16] y) {
      y = optkit.CausalAttention <scale = 0.25, window = 9, last = 0> (q, k, v)
    }
    """
    model = parse(text)
    function = CausalAttention().function()
    model.functions[function.identifier()] = function
    seen = sum(max(0, i - 8) <= j <= i for i in range(64) for j in range(64))
    assert plan(model, COLD).least.compute == pytest.approx(2 * 2 * 2 * 4 * seen * 16 / H100.peak["fp16"])


def test_a_mask_from_outside_hides_nothing_for_sure():
    mask = "p1 = Cast <to = 1> (tokens) c = Unsqueeze (p1, one) h = Sub (zero, c) m = Mul (h, low) a = Add (f, m)"
    found = plan(parse(CAUSAL % mask, eighth=np.float32(0.125)), COLD)
    assert found.least.compute == pytest.approx(2 * 2 * 2 * 4 * 12 * 12 * 8 / H100.peak["fp32"])


def test_scores_that_are_an_output_are_all_computed():
    text = CAUSAL.replace("=> (", "=> (float[2, 4, 12, 12] s, ") % MASKS["added"][0]
    found = plan(parse(text, eighth=np.float32(0.125)), COLD)
    assert found.least.compute > 1.9 * 2 * 2 * 4 * 78 * 8 / H100.peak["fp32"]


def test_how_many_heads_and_samples_there_are_does_not_make_a_mask_large(monkeypatch):
    monkeypatch.setattr("optkit.seen._MOST", 200)
    text = (CAUSAL % MASKS["padded"][0]).replace(
        "f = Mul (s, eighth)", "r = Reshape (s, flat) r2 = Mul (r, eighth) f = Reshape (r2, whole)"
    )
    given = {"eighth": np.float32(0.125), "flat": np.array([2, 2, 24, 12]), "whole": np.array([2, 4, 12, 12])}
    found = plan(parse(text, **given), COLD)
    assert found.least.compute == pytest.approx(2 * 2 * 2 * 4 * 78 * 8 / H100.peak["fp32"])


def test_of_a_mask_too_large_to_look_at_the_floor_counts_nothing(monkeypatch):
    monkeypatch.setattr("optkit.seen._MOST", 100)
    found = plan(parse(CAUSAL % MASKS["added"][0], eighth=np.float32(0.125)), COLD)
    assert found.least.compute == 0


# A token of two sequences: four heads share two of keys, which lie in int8 before it.
CACHE = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[2, 2, 2, 64] q, int8[2, 2, 1, 64] k, int8[2, 2, 1, 64] v, int8[2, 2, 99, 64] pk, int8[2, 2, 99, 64] pv, float16[%s] ks, float16[%s] vs)
  => (float16[2, 2, 2, 64] y, int8[2, 2, 100, 64] nk, int8[2, 2, 100, 64] nv) {
  nk = Concat <axis = 2> (pk, k)
  nv = Concat <axis = 2> (pv, v)
  a = DequantizeLinear <%s> (nk, ks)
  b = DequantizeLinear <%s> (nv, vs)
  t = Transpose <perm = [0, 1, 3, 2]> (a)
  s = MatMul (q, t)
  p = Softmax (s)
  y = MatMul (p, b)
}
"""


@pytest.mark.parametrize(
    ("shape", "where", "scales"),
    [("2", "axis = 1", 2), ("2, 2, 100, 1", "axis = -1, block_size = 64", 2 * 2 * 100)],
)
def test_keys_and_values_in_int8_are_a_byte_each_with_their_scales_and_of_a_cache_only_the_new_are_written(
    shape, where, scales
):
    found = plan(parse(CACHE % (shape, shape, where, where)), COLD)
    (layer,) = found.layers
    read = 2 * (2 * 2 * 100 * 64) + 2 * 2 * scales
    assert layer.bytes == read + 2 * 2 * (2 * 2 * 2 * 64)
    assert layer.macs == 2 * 2 * 2 * 2 * 100 * 64 and layer.format == "fp16"
    assert found.least.bytes == layer.bytes + 2 * (2 * 2 * 64)


def test_a_call_that_puts_keys_behind_a_cache_in_int8_writes_the_new_ones_alone():
    text = """
    <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
    g (float16[1, 1, 256] q, float16[1, 1, 128] k, float16[1, 1, 128] v, int8[1, 2, 99, 64] pk, int8[1, 2, 99, 64] pv, int32[1, 1] n,
      int32 t, float[1] ks, float[1] vs) => (float16[1, 1, 256] y, int8[1, 2, 100, 64] nk, int8[1, 2, 100, 64] nv) {
      y, nk, nv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, k_quant_type = "PER_TENSOR",
        v_quant_type = "PER_TENSOR", kv_cache_bit_width = 8> (q, k, v, pk, pv, n, t, , , , , , ks, vs)
    }
    """
    found = plan(parse(text), COLD)
    (layer,) = found.layers
    assert layer.macs == 4 * 2 * 100 * 64
    read = 2 * (256 + 128 + 128) + 2 * (2 * 99 * 64) + 4 + 4 + 4 + 4
    assert layer.bytes == found.least.bytes == read + 2 * 256 + 2 * (2 * 64)


def test_a_softmax_behind_a_product_with_weights_is_no_attention():
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[8, 64] x) => (float[8, 32] y) { h = MatMul (x, w) p = Softmax (h) y = MatMul (p, v) }
    """
    given = {"w": np.ones((64, 16), np.float32), "v": np.ones((16, 32), np.float32)}
    assert [layer.op for layer in plan(parse(text, **given), H100).layers] == ["MatMul", "Softmax", "MatMul"]


def test_a_norm_between_casts_moves_what_lies_before_and_behind_them():
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float16[8, 64] x) => (float16[8, 64] y) {
      f = Cast <to = 1> (x)
      n = LayerNormalization <axis = -1> (f, s, s)
      h = Cast <to = 10> (n)
      y = MatMul (h, w)
    }
    """
    norm, product = plan(parse(text, s=np.ones(64, np.float32), w=np.ones((64, 64), np.float16)), H100).layers
    assert norm.bytes == 2 * (8 * 64 + 8 * 64) + 4 * 64
    assert product.bytes == 2 * (8 * 64 + 64 * 64 + 8 * 64)


def test_an_activation_whose_input_is_read_twice_is_fused_too():
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[8, 64] x) => (float[8, 32] y) { h = MatMul (x, w) s = Sigmoid (h) y = Mul (h, s) }
    """
    (layer,) = plan(parse(text, w=np.ones((64, 32), np.float32)), H100).layers
    assert (layer.nodes, layer.bytes) == (3, 4 * (8 * 64 + 64 * 32 + 8 * 32))


def test_a_batch_norm_is_fused_behind_its_convolution():
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[1, 3, 8, 8] x) => (float[1, 16, 6, 6] y) { c = Conv (x, w) b = BatchNormalization (c, s, s, s, s) y = Relu (b) }
    """
    model = parse(text, w=np.ones((16, 3, 3, 3), np.float32), s=np.ones(16, np.float32))
    (layer,) = plan(model, H100).layers
    assert (layer.nodes, layer.bytes) == (3, 4 * (3 * 64 + 16 * 27 + 16 + 16 * 36))


def test_sizes_that_the_graph_computes_are_found_by_folding():
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[8, 3, 5, 5] x) => (float[N, C, H, W] y) <int64[4] front = {0, 0, 1, 1}> {
      n = ConstantOfShape <value = int64[1] {1}> (four)
      b = Mul (n, front)
      p = Concat <axis = 0> (b, b)
      z = Pad (x, p)
      y = Conv (z, w)
    }
    """
    model = parse(text, four=np.array([4]), w=np.ones((16, 3, 3, 3), np.float32))
    assert [layer.macs for layer in plan(model, H100).layers] == [8 * 16 * 5 * 5 * 27]


def test_sizes_that_depend_on_data_are_those_of_a_run_and_the_plan_says_so():
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[8, 64] x) => (float[K, 32] y) {
      e = Exp (x)
      i = NonZero (e)
      f = Cast <to = 1> (i)
      t = Transpose <perm = [1, 0]> (f)
      y = MatMul (t, w)
    }
    """
    found = plan(parse(text, w=np.ones((2, 32), np.float32)), H100)
    assert sum(layer.macs for layer in found.layers) == 8 * 64 * 2 * 32
    assert any("one input drawn at random" in note for note in found.notes)


def test_a_branch_is_the_one_that_runs_at_the_shapes():
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[8, 64] x, bool c) => (float[M, N] y) {
      y = If (c) <
        then_branch = t () => (float[A, B] a) { a = MatMul (x, w) },
        else_branch = e () => (float[C, D] b) { b = MatMul (x, v) }
      >
    }
    """
    # Three rows do not go with 64 columns.
    model = parse(text, w=np.ones((3, 3), np.float32), v=np.ones((64, 32), np.float32))
    found = plan(model, H100)
    assert [layer.macs for layer in found.layers] == [8 * 64 * 32]
    assert "else branch" in found.notes[0]


FUNCTION = """
<ir_version: 10, opset_import: ["" : 21, "mine" : 1]>
g (float[8, 64] x) => (float[8, 64] y) { [a] h = mine.Square (x, w) [b] y = mine.Square (h, w) }
<domain: "mine", opset_import: ["" : 21]>
Square (x, w) => (y) { p = MatMul (x, w) s = Sigmoid (p) y = Mul (p, s) }
"""


def test_a_call_of_a_function_is_one_launch_with_the_products_of_its_body():
    model = parse(FUNCTION, w=np.ones((64, 64), np.float32))
    found = plan(model, COLD)
    assert [(layer.op, layer.name, layer.macs) for layer in found.layers] == [
        ("Square", "a", 8 * 64 * 64),
        ("Square", "b", 8 * 64 * 64),
    ]
    assert [layer.bytes for layer in found.layers] == [4 * (8 * 64 + 64 * 64 + 8 * 64)] * 2
    # Weights of both once.
    assert found.least.bytes == 4 * (8 * 64 + 64 * 64 + 8 * 64)


def test_products_of_integers_are_counted_in_int8():
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[8, 64] x) => (float[8, 32] y) {
      q, s, z = DynamicQuantizeLinear (x)
      i = MatMulInteger (q, w, z)
      f = Cast <to = 1> (i)
      y = Mul (f, s)
    }
    """
    (layer,) = plan(parse(text, w=np.ones((64, 32), np.int8)), H100).layers
    assert (layer.op, layer.macs, layer.format, layer.nodes) == ("MatMulInteger", 8 * 64 * 32, "int8", 2)
    assert layer.needed == 4 * 8 * 64 + 64 * 32 + 4 * 8 * 32


def test_what_is_not_counted_is_named():
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[4, 64, 64] x) => (float[4] y) { h = MatMul (x, x) y = Det (h) }
    """
    found = plan(parse(text), H100)
    assert found.uncounted == ("Det",)
    assert sum(layer.macs for layer in found.layers) == 4 * 64**3


def test_a_million_samples_cost_what_their_hours_do():
    assert dollars(0.0036, 2.0) == pytest.approx(2.0)
    assert dollars(0.0036, 2.0, samples=4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("where", "precision", "error", "said"),
    [
        ("a100", "fp8", BackendUnavailableError, "fp8 starts with sm_89"),
        ("cpu", None, UsageError, "no bandwidth and peaks of cpu are known"),
        ("mac-m4", None, UsageError, "no peaks of mac-m4 are known"),
        ("h100", "w4a8", UsageError, "no plan is made for w4a8"),
        ("t4", "bf16", BackendUnavailableError, "bf16"),
    ],
)
def test_what_cannot_be_planned_is_refused(where, precision, error, said):
    with pytest.raises(error, match=said):
        layers(precision, target(where))


def test_free_axes_are_refused_with_the_option_that_fixes_them():
    with pytest.raises(UsageError) as caught:
        layers(
            text=BLOCK.replace("[8, 64] x", "[N, 64] x").replace("[8, 32] y", "[N, 32] y"),
            form=np.array([-1, 128]),
        )
    assert "--shape" in caught.value.hint


def test_every_price_is_of_a_target_and_says_where_it_is_from():
    assert set(PRICES) <= set(TARGETS)
    assert all(p.dollars > 0 and "2026-" in p.source for p in PRICES.values())
