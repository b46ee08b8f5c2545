"""What the whole clean-up makes of idioms that exporters write; the results are in tests/golden."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.graph import text, verify
from optkit.passes.base import Context
from optkit.recipe import Recipe
from optkit.targets import target
from optkit.testing import parse, random_feeds, same_numbers

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32) / 4


IDIOMS = {
    # PyTorch, TorchScript exporter: x.view(x.size(0), x.size(1), 4, 8).transpose(1, 2) and back.
    "torch_heads": (
        """
        g (float[batch, tokens, 32] x) => (float[batch, tokens, 32] y) {
          zero = Constant<value_int = 0>() one = Constant<value_int = 1>() first = Constant<value_ints = [0]>()
          four = Constant<value_ints = [4]>() eight = Constant<value_ints = [8]>() rest = Constant<value_ints = [-1]>()
          s0 = Shape(x) b = Gather(s0, zero) s1 = Shape(x) t = Gather(s1, one)
          q0 = MatMul(x, w) q = Add(q0, v)
          b1 = Unsqueeze(b, first) t1 = Unsqueeze(t, first) shape = Concat<axis = 0>(b1, t1, four, eight)
          heads = Reshape(q, shape) turned = Transpose<perm = [0, 2, 1, 3]>(heads)
          soft = Softmax<axis = -1>(turned)
          back = Transpose<perm = [0, 2, 1, 3]>(soft)
          b2 = Unsqueeze(b, first) t2 = Unsqueeze(t, first) shape2 = Concat<axis = 0>(b2, t2, rest)
          y = Reshape(back, shape2)
        }
        """,
        {"w": (32, 32), "v": (32,)},
    ),
    # PyTorch: mask.expand(...) with the -1 of expand written out.
    "torch_expand": (
        """
        g (float[batch, tokens, 8] x, float[batch, tokens] mask) => (float[batch, tokens, 8] y) {
          rest = Constant<value_ints = [-1]>() two = Constant<value_ints = [2]>()
          m = Unsqueeze(mask, two) s = Shape(x) l = Shape(s) ones = ConstantOfShape<value = int64[1] {1}>(l)
          k = Constant<value_int = -1>() wanted = Mul(ones, k) hit = Equal(s, wanted) target = Where(hit, ones, s)
          e = Expand(m, target) y = Mul(x, e)
        }
        """,
        {},
    ),
    # Paddle: LearnableAffineBlock around hard swish (PP-LCNetV3), between a convolution and a padded depthwise one.
    "paddle_block": (
        """
        g (float[batch, 6, H, W] x) => (float[batch, 8, H, W] y) {
          three = Constant<value_float = 3.0>() zero = Constant<value_float = 0.0>() six = Constant<value_float = 6.0>()
          s1 = Constant<value_floats = [0.75]>() t1 = Constant<value_floats = [0.1]>()
          s2 = Constant<value_floats = [1.25]>() t2 = Constant<value_floats = [-0.2]>()
          c = Conv(x, w1) n = BatchNormalization(c, gain, shift, mean, var) m = Mul(s1, n) a = Add(m, t1)
          p = Add(a, three) q = Clip(p, zero, six) r = Mul(a, q) h = Div(r, six)
          m2 = Mul(s2, h) a2 = Add(m2, t2)
          y = Conv<group = 8, pads = [1, 1, 1, 1]>(a2, w2)
        }
        """,
        {"w1": (8, 6, 1, 1), "gain": (8,), "shift": (8,), "mean": (8,), "var": (8,), "w2": (8, 1, 3, 3)},
    ),
    # TensorFlow, tf2onnx: channels last between convolutions, bias and batch norm apart.
    "tf_convolutions": (
        """
        g (float[batch, 8, 8, 3] x) => (float[batch, 8, 8, 4] y) {
          bias = Constant<value_floats = [0.1, 0.2, 0.3, 0.4]>()
          a = Transpose<perm = [0, 3, 1, 2]>(x)
          c = Conv<pads = [1, 1, 1, 1]>(a, w1) d = Transpose<perm = [0, 2, 3, 1]>(c)
          e = Add(d, bias) f = Mul(e, gain) g = Add(f, shift) h = Relu(g)
          i = Transpose<perm = [0, 3, 1, 2]>(h)
          j = Conv<pads = [1, 1, 1, 1]>(i, w2) k = Transpose<perm = [0, 2, 3, 1]>(j)
          l = Add(k, bias) y = Relu(l)
        }
        """,
        {"w1": (4, 3, 3, 3), "w2": (4, 4, 3, 3), "gain": (4,), "shift": (4,)},
    ),
    # PyTorch before opset 17: a transformer's feed-forward block, everything written out.
    "torch_feed_forward": (
        """
        g (float[batch, tokens, 16] x) => (float[batch, tokens, 16] y) {
          last = Constant<value_ints = [-1]>() two = Constant<value_float = 2.0>() eps = Constant<value_float = 1e-5>()
          root = Constant<value_float = 1.4142135>() one = Constant<value_float = 1.0>() half = Constant<value_float = 0.5>()
          mean = ReduceMean(x, last) d = Sub(x, mean) q = Pow(d, two) v = ReduceMean(q, last) e = Add(v, eps)
          r = Sqrt(e) n = Div(d, r) s = Mul(n, gain) z = Add(s, shift)
          drop = Identity(z)
          u0 = MatMul(drop, w1) u = Add(u0, b1)
          g1 = Div(u, root) g2 = Erf(g1) g3 = Add(g2, one) g4 = Mul(u, g3) gelu = Mul(g4, half)
          o0 = MatMul(gelu, w2) o = Add(o0, b2) y = Add(x, o)
        }
        """,
        {"gain": (16,), "shift": (16,), "w1": (16, 64), "b1": (64,), "w2": (64, 16), "b2": (16,)},
    ),
    # PyTorch: squeeze(1) of an axis that is known to be 1 is exported as a choice; a state that is zero is built.
    "torch_recurrent": (
        """
        g (float[frames, 1, 4] x) => (float[frames, 6] y) {
          one = Constant<value_ints = [1]>() six = Constant<value_ints = [6]>() at = Constant<value_int = 1>()
          s = Shape(x) b = Gather(s, at) first = Constant<value_ints = [0]>() b1 = Unsqueeze(b, first)
          sizes = Concat<axis = 0>(one, b1, six) h = ConstantOfShape(sizes)
          l = LSTM<hidden_size = 6>(x, w, r, , , h, h)
          sq = Squeeze(l, one)
          t = Shape(sq) n = Gather(t, at) c = Equal(n, at)
          y = If (c) <
            then_branch = p () => (float[frames, 6] u) { u = Squeeze(sq, one) },
            else_branch = q () => (float[frames, 1, 6] v) { v = Identity(sq) }
          >
        }
        """,
        {"w": (1, 24, 4), "r": (1, 24, 6)},
    ),
    # PyTorch 2.13, torch.onnx.export(dynamo=True) of a decoder layer of transformers 5: root-mean-square norm, two heads of
    # keys and values for four of queries, boolean mask, guarded softmax.
    "torch_grouped_attention": (
        """
        g (float[batch, tokens, 16] x, bool[batch, 1, tokens, tokens] mask) => (float[batch, tokens, 16] y) {
          two = Constant<value_float = 2.0>() eps = Constant<value_float = 1e-6>() last = Constant<value_ints = [-1]>()
          at = Constant<value_ints = [2]>() zero = Constant<value_float = 0.0>() low = Constant<value_float = -3.4028235e38>()
          f4 = Constant<value_ints = [4]>() f2 = Constant<value_ints = [2]>() f16 = Constant<value_ints = [16]>()
          scale = Constant<value_float = 0.70710678>()
          b = Shape<start = 0, end = 1>(x) t = Shape<start = 1, end = 2>(x)
          p = Pow(x, two) m = ReduceMean(p, last) e = Add(m, eps) r = Sqrt(e) i = Reciprocal(r) n0 = Mul(x, i)
          n = Mul(gain, n0)
          heads = Concat<axis = 0>(b, t, last, f4)
          q0 = MatMul(n, wq) q1 = Reshape(q0, heads) q = Transpose<perm = [0, 2, 1, 3]>(q1)
          k0 = MatMul(n, wk) k1 = Reshape(k0, heads) k = Transpose<perm = [0, 2, 1, 3]>(k1)
          v0 = MatMul(n, wv) v1 = Reshape(v0, heads) v = Transpose<perm = [0, 2, 1, 3]>(v1)
          five = Concat<axis = 0>(b, f2, f2, t, f4) four = Concat<axis = 0>(b, f4, t, f4)
          ku = Unsqueeze(k, at) ke = Expand(ku, five) kr = Reshape(ke, four)
          vu = Unsqueeze(v, at) ve = Expand(vu, five) vr = Reshape(ve, four)
          flat = Concat<axis = 0>(last, t, f4) kf = Reshape(kr, flat) kt = Transpose<perm = [0, 2, 1]>(kf)
          whole = Concat<axis = 0>(b, f4, f4, t) kw = Reshape(kt, whole)
          qs = Mul(q, scale) ks = Mul(kw, scale) s = MatMul(qs, ks)
          w = Where(mask, zero, low) a = Add(s, w) o = Softmax<axis = -1>(a) c = IsNaN(o) g = Where(c, zero, o)
          h = MatMul(g, vr) back = Transpose<perm = [0, 2, 1, 3]>(h)
          joined = Concat<axis = 0>(b, t, f16) h2 = Reshape(back, joined)
          l = MatMul(h2, wo) y = Add(x, l)
        }
        """,
        {"gain": (16,), "wq": (16, 16), "wk": (16, 8), "wv": (16, 8), "wo": (16, 16)},
    ),
}


@pytest.mark.parametrize("name", IDIOMS)
def test_idiom(name, golden):
    source, shapes = IDIOMS[name]
    weights = {key: floats(*shape) for key, shape in shapes.items()}
    if "var" in weights:
        weights["var"] = np.abs(weights["var"]) + 0.5
    model = parse(HEADER + source, **weights)
    after, context = model.clone(), Context(target=target("cpu"))
    for pass_ in Recipe.load("cleanup").passes:
        pass_.run(after, context)
        verify(after)
    golden(f"idiom_{name}.txt", text(after))
    for size in (3, 5):
        # Values around 1, some dozens of roundings.
        same_numbers(model, after, random_feeds(model, size=size), atol=1e-5, rtol=1e-4)
    once = text(after)
    for pass_ in Recipe.load("cleanup").passes:
        assert not pass_.run(after, context), f"{pass_.name} found more in a second round"
    assert text(after) == once
