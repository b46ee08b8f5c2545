"""Scores of hidden keys that are put in their place by hand, as ``masked_fill`` and ``torch.where`` write it."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.frontend import read
from optkit.graph import walk
from optkit.masks import Sight, sight
from optkit.passes.base import Context
from optkit.passes.fusion.attention import CleanAttention
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import check_pass, parse

H100 = Context(target=target("h100"))
TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[2, 4, T, 8] q, float[2, 4, 8, T] k, float[2, 4, T, 8] v, bool[2, 1, T, T] m%s) => (float[2, 4, T, 8] y) <float half = {0.5}> {
  s = MatMul (q, k) a = Mul (s, half) %s w = Softmax <axis = -1> (h) y = MatMul (w, v)
}
"""
HALVES, HALF = (
    TEXT.replace("float[2", "float16[2").replace(" <float half = {0.5}>", ""),
    np.array(0.5, np.float16),
)
# Of three rows, the second is hidden altogether; so is every row of the second batch.
ROWS = np.array([[[[0, 1, 0], [1, 1, 1], [1, 0, 0]]], [[[1, 1, 1]] * 3]], bool)
AFTER = ["MatMul", "Mul", "Where", "Add", "Softmax", "MatMul"]


def _low(number):
    return {"low": np.array(number, np.float32)}


@pytest.mark.parametrize("low", [-1e4, -1e9, float(np.finfo(np.float32).min), -np.inf])
@pytest.mark.parametrize(("choice", "m"), [("Where (m, low, a)", ROWS), ("Where (m, a, low)", ~ROWS)])
def test_a_choice_in_front_of_the_softmax_becomes_a_mask_also_where_a_query_sees_no_key(choice, m, low):
    # Minus infinity gives NaN there, before and after; a number the same weight for all keys.
    model = parse(TEXT % ("", f"h = {choice}"), **_low(low))
    check_pass(CleanAttention(), model, ops=AFTER, m=m)


def test_choices_one_behind_the_other_become_one_mask():
    text = TEXT % (", bool[2, 1, 1, T] p", "b = Where (m, low, a) h = Where (p, b, low)")
    pad = np.array([[[[1, 1, 0]]], [[[1, 1, 1]]]], bool)
    ops = ["MatMul", "Mul", "Not", "And", "Where", "Add", "Softmax", "MatMul"]
    check_pass(CleanAttention(), parse(text, **_low(-1e9)), ops=ops, m=ROWS, p=pad)


def test_scores_that_are_widened_first_become_scores_with_a_mask():
    text = HALVES % ("", "c = Cast <to = 1> (a) b = Where (m, low, c) h = Cast <to = 10> (b)")
    text = text.replace(
        "h = Cast <to = 10> (b) w = Softmax <axis = -1> (h)",
        "e = Softmax <axis = -1> (b) w = Cast <to = 10> (e)",
    )
    ops = ["MatMul", "Mul", "Cast", "Where", "Add", "Softmax", "Cast", "MatMul"]
    check_pass(CleanAttention(), parse(text, half=HALF, **_low(-1e9)), ops=ops, m=ROWS, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    "nodes",
    [
        "h = Where (m, low, a)",  # -100 leaves a weight
        "n = Neg (a) h = Where (m, low9, n)",  # no scores
        "b = Where (m, low9, a) h = Where (m, lower, b)",  # of which is hidden by both, the other would be seen
        "b = Where (m, low9, a) h = Identity (b) z = Add (b, half)",
        "b = Where (m, low9, a) h = Relu (b)",
    ],
)
def test_other_choices_stay(nodes):
    lows = {
        "low": np.array(-100, np.float32),
        "low9": np.array(-1e9, np.float32),
        "lower": np.array(-2e9, np.float32),
    }
    model = parse(TEXT % ("", nodes), **{k: v for k, v in lows.items() if f"{k}," in nodes})
    assert not [
        c for c in CleanAttention().run(model, Context(target=target("cpu"))) if c.rule == "hidden-scores"
    ]


@pytest.mark.parametrize(("low", "made"), [(-60000, False), (-np.inf, True)])
def test_in_float16_no_number_is_so_low_that_hidden_scores_are_all_the_same(low, made):
    text = HALVES % ("", "h = Where (m, low, a)")
    model = parse(text, half=HALF, low=np.array(low, np.float16))
    changes = CleanAttention().run(model, Context(target=target("cpu")))
    assert ("hidden-scores" in {c.rule for c in changes}) == made


def test_a_softmax_over_another_axis_stays():
    model = parse((TEXT % ("", "h = Where (m, low, a)")).replace("axis = -1", "axis = 2"), **_low(-1e9))
    assert CleanAttention().run(model, Context(target=target("cpu"))) == []


# What constants let queries see


def _mask(array):
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21]>\ng (float[1, 1, N, 6] s) => (float[1, 1, N, 6] y) { y = Add (s, mask) }',
        mask=array,
    )
    return sight(model.graph.initializers["mask"], None)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (np.tri(6, dtype=bool), Sight(causal=True)),
        (np.tri(6, dtype=bool) & ~np.tri(6, k=-3, dtype=bool), Sight(causal=True, window=3)),
        (np.eye(6, dtype=bool), Sight(causal=True, window=1)),
    ],
)
@pytest.mark.parametrize("axes", [(), (1, 1)])
def test_a_constant_triangle_is_causal(seen, axes, expected):
    for low in (-1e9, -np.inf):
        assert _mask(np.where(seen, 0, low).astype(np.float32).reshape(*axes, 6, 6)) == expected


def _without(row, column):
    seen = np.tri(6, dtype=bool)
    seen[row, column] = False
    return seen


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (np.where(_without(4, 2), 0, -1e9), "no band"),
        (np.where(_without(0, 0), 0, -1e9), "no band"),
        (np.where(np.tri(6, k=1, dtype=bool), 0, -1e9), "ends 1 keys"),
        (np.where(np.tri(6, k=-1, dtype=bool), 0, -1e9), "ends -1 keys"),
        (np.where(np.tri(6, dtype=bool), 0, -2.0), "very low numbers alone"),
        (np.zeros((6, 6)), "not causal"),
        (np.full((6, 6), -1e9), "the same for all"),
        (np.where(np.tri(6, dtype=bool), 0, -1e9) * np.ones((2, 1, 1)), "the same for all"),
    ],
)
def test_other_constants_are_not_causal(mask, why):
    assert why in _mask(mask.astype(np.float32))


# From torch to kernels


def _attention(low, causal, given):
    import torch

    class Attention(torch.nn.Module):
        """As nanoGPT and many before it write it."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(64, 192), torch.nn.Linear(64, 64)
            self.register_buffer("bias", torch.tril(torch.ones(24, 24)).view(1, 1, 24, 24))

        def forward(self, x, mask=None):
            batch, length, _ = x.shape
            q, k, v = (t.view(batch, length, 2, 32).transpose(1, 2) for t in self.qkv(x).split(64, 2))
            scores = (q @ k.transpose(-2, -1)) * 32**-0.5
            if causal:
                scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, low)
            if mask is not None:
                scores = scores.masked_fill(mask[:, None, None, :] == 0, low)
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, 64))

    torch.manual_seed(0)
    module = Attention().eval()
    inputs = (torch.randn(2, 16, 64), *([torch.ones(2, 16, dtype=torch.int64)] if given else []))
    return module, inputs


@pytest.mark.needs("torch", "onnxscript")
@pytest.mark.parametrize(
    ("low", "causal", "given", "free"),
    [
        (-1e9, True, False, False), (-np.inf, True, False, True), (-1e9, False, True, True), (-np.inf, False, True, False),
        (-1e9, True, True, False), (-np.inf, True, True, True),
    ],
)  # fmt: skip
def test_masked_fill_of_torch_becomes_a_kernel_that_gives_the_same(low, causal, given, free):
    import torch

    module, inputs = _attention(low, causal, given)
    names = ("x", "mask")[: len(inputs)]
    axes = {name: {0: "batch", 1: "length"} for name in names} if free else None
    model = read(module, inputs=inputs, dynamic=axes).model
    run_passes(model, Recipe.load("triton-fp16").passes, H100)
    kernel = "MaskedAttention" if given else "CausalAttention"
    assert [n.op_type for n in walk(model) if n.domain] == ["Linear", kernel, "Linear"]
    feeds = {"x": inputs[0]}
    if given:
        # A sample with padding, and one whose keys are all hidden.
        feeds["mask"] = torch.tensor([[1] * 10 + [0] * 6, [0] * 16])
    with torch.no_grad():
        right = module(*feeds.values()).numpy()
    found = ReferenceSession(model).run({k: v.numpy() for k, v in feeds.items()})[
        str(model.graph.outputs[0].name)
    ]
    assert np.array_equal(np.isnan(found), np.isnan(right)) and np.isnan(right).any() == (
        given and low == -np.inf
    )
    # Outputs of about 1, by sums of 64 numbers of float16 three times.
    assert np.nanmax(np.abs(found - right)) < 4e-3
