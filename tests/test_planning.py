"""Plans for hardware that is not at hand: which nodes are launched together, and what each launch moves and multiplies."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.errors import BackendUnavailableError, UsageError
from optkit.planning import dollars, plan
from optkit.targets import TARGETS, target
from optkit.targets.prices import PRICES
from optkit.testing import parse

H100 = target("h100")
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
    # The last sum reads the product twice, so that it cannot be fused in the place of its only reader.
    assert [(layer.op, layer.nodes) for layer in found] == [
        ("MatMul", 3),
        ("LayerNormalization", 1),
        ("MatMul", 1),
        ("Add", 1),
    ]
    assert [layer.macs for layer in found] == [8 * 64 * 128, 0, 8 * 128 * 32, 0]


def test_each_value_is_moved_once_and_what_is_fused_not_at_all():
    first, norm, second, _ = layers()
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


def test_floors_are_rooflines_and_lie_below_estimates():
    for layer in layers("fp16"):
        assert layer.floor == pytest.approx(
            max(2 * layer.macs / H100.peak["fp16"], layer.bytes / H100.bandwidth)
        )
        assert layer.floor <= layer.low <= layer.high
    whole = plan(parse(BLOCK, **GIVEN), H100)
    assert whole.floor == pytest.approx(sum(layer.floor for layer in whole.layers))
    assert whole.share("compute") + whole.share("memory") == pytest.approx(1)


def test_a_million_samples_cost_what_their_hours_do():
    assert dollars(0.0036, 2.0) == pytest.approx(2.0)
    assert dollars(0.0036, 2.0, samples=4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("where", "precision", "error", "said"),
    [
        ("a100", "fp8", BackendUnavailableError, "fp8 starts with sm_89"),
        ("cpu", None, UsageError, "nothing is known of how fast"),
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
