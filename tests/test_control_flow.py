"""Control flow written out computes what ONNX Runtime makes of it."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.control_flow import flatten
from optkit.graph import text, verify, walk
from optkit.testing import parse, random_feeds, same_numbers

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\ng %s'

CASES = {
    "If": """(float[3] x) => (float[3] y) <bool c = {1}> {
      y = If(c) <then_branch = t () => (float[3] a) <float k = {2}> { a = Mul(x, k) }, else_branch = e () => (float[3] b) { b = Neg(x) }> }""",
    "If in If": """(float[3] x) => (float[3] y) <bool c = {0}> {
      y = If(c) <then_branch = t () => (float[3] a) { a = Neg(x) },
        else_branch = e () => (float[3] b) { b = If(c) <then_branch = u () => (float[3] d) { d = Abs(x) },
          else_branch = f () => (float[3] g) { g = Exp(x) }> }> }""",
    "If that gives what is outside": """(float[3] x) => (float[3] y, float[3] z) <bool c = {1}> {
      z = Neg(x) y = If(c) <then_branch = t () => (float[3] a) { a = Identity(z) }, else_branch = e () => (float[3] b) { b = Neg(x) }> }""",
    "Loop": """(float[3] x) => (float[3] y, float[4, 3] r) <int64 n = {4}, bool go = {1}> {
      y, r = Loop(n, go, x) <body = b (int64 i, bool c, float[3] s) => (bool d, float[3] t, float[3] u) <float k = {0.5}> {
        d = Identity(c) f = Cast<to = 1>(i) p = Mul(s, k) t = Add(p, f) u = Neg(s) }> }""",
    "Loop without a condition": """(float[3] x) => (float[3] y) <int64 n = {3}> {
      y = Loop(n, , x) <body = b (int64 i, bool c, float[3] s) => (bool d, float[3] t) { d = Constant<value = bool {1}>() t = Sin(s) }> }""",
    "Loop of no step": """(float[3] x) => (float[3] y) <int64 n = {0}> {
      y = Loop(n, , x) <body = b (int64 i, bool c, float[3] s) => (bool d, float[3] t) { d = Identity(c) t = Sin(s) }> }""",
    "Scan": """(float[2] s, float[4, 2] x) => (float[2] e, float[4, 2] y) {
      e, y = Scan<num_scan_inputs = 1, body = b (float[2] p, float[2] q) => (float[2] n, float[2] o) { n = Add(p, q) o = Tanh(n) }>(s, x) }""",
    "Scan along other axes, backwards": """(float[2] s, float[2, 4] x, float[4, 2] w) => (float[2] e, float[2, 4] y, float[4, 2] z) {
      e, y, z = Scan<num_scan_inputs = 2, scan_input_axes = [1, 0], scan_input_directions = [1, 0], scan_output_axes = [1, 0],
        scan_output_directions = [0, 1],
        body = b (float[2] p, float[2] q, float[2] r) => (float[2] n, float[2] o, float[2] m) {
          a = Mul(p, r) n = Add(a, q) o = Tanh(n) m = Identity(r) }>(s, x, w) }""",
    "Loop in Scan": """(float[2] s, float[3, 2] x) => (float[2] e) <int64 k = {2}> {
      e = Scan<num_scan_inputs = 1, body = b (float[2] p, float[2] q) => (float[2] n) {
        n = Loop(k, , p) <body = c (int64 i, bool g, float[2] u) => (bool d, float[2] v) { d = Identity(g) v = Add(u, q) }> }>(s, x) }""",
}  # fmt: skip
# What depends on data, or is long.
LEFT = {
    "If": """(float[3] x, bool c) => (float[3] y) {
      y = If(c) <then_branch = t () => (float[3] a) { a = Neg(x) }, else_branch = e () => (float[3] b) { b = Abs(x) }> }""",
    "Loop of computed length": """(float[3] x, int64 n) => (float[3] y) {
      y = Loop(n, , x) <body = b (int64 i, bool c, float[3] s) => (bool d, float[3] t) { d = Identity(c) t = Sin(s) }> }""",
    "Loop that may end before": """(float[3] x) => (float[3] y) <int64 n = {9}, float l = {1}> {
      y = Loop(n, , x) <body = b (int64 i, bool c, float[3] s) => (bool d, float[3] t) {
        t = Add(s, s) m = ReduceMax<keepdims = 0>(t) d = Less(m, l) }> }""",
    "Loop of many steps": """(float[3] x) => (float[3] y) <int64 n = {9000}> {
      y = Loop(n, , x) <body = b (int64 i, bool c, float[3] s) => (bool d, float[3] t) { d = Identity(c) t = Sin(s) }> }""",
    "Scan of free length": """(float[2] s, float[N, 2] x) => (float[2] e) {
      e = Scan<num_scan_inputs = 1, body = b (float[2] p, float[2] q) => (float[2] n) { n = Add(p, q) }>(s, x) }""",
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_written_out_it_computes_the_same(name):
    model = parse(HEAD % CASES[name])
    after = model.clone()
    assert flatten(after)
    verify(after)
    assert not {"If", "Loop", "Scan"} & {n.op_type for n in walk(after)}
    for seed in (1, 2):
        same_numbers(model, after, random_feeds(model, seed=seed))


@pytest.mark.parametrize("name", LEFT)
def test_what_depends_on_data_or_is_long_stays(name):
    model = parse(HEAD % LEFT[name])
    before = text(model)
    assert not flatten(model)
    assert text(model) == before


def test_steps_share_the_constants_of_the_body():
    model = parse(HEAD % CASES["Loop"])
    flatten(model)
    floats = [v for v in model.graph.initializers.values() if v.dtype.numpy() == np.float32]
    assert len(floats) == 1
