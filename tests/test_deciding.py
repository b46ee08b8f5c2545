"""Layers whose numbers decide sizes, on graphs as exporters write them, and what repair makes of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends.onnxruntime import OnnxRuntime
from optkit.compilation import Compilation
from optkit.data import CalibrationData
from optkit.deciding import deciding
from optkit.frontend import read
from optkit.passes.base import Silent
from optkit.recipe import Recipe
from optkit.repair import repair
from optkit.targets import target

# Speech in small: how often each row comes is counted from what the first two layers give; the last two never matter to that.
SPEECH = """<ir_version: 10, opset_import: ["" : 21]>
speech (float[4, 32] x) => (float[frames, 32] y)
<float[32, 32] a, float[32, 32] b, float[32, 32] c, float[32, 32] d, float often = {7.3}, int64 zero = {0}, int64 one = {1}, int64 rows = {4}> {
  h1 = MatMul(x, a)
  h2 = MatMul(h1, b)
  size = Abs(h2)
  total = ReduceSum <keepdims: int = 0> (size)
  scaled = Mul(total, often)
  frames = Cast <to: int = 7> (scaled)
  places = Range(zero, frames, one)
  row = Mod(places, rows)
  e1 = MatMul(x, c)
  e2 = MatMul(e1, d)
  y = Gather(e2, row)
}"""


def _speech() -> ir.Model:
    model, random = ir.from_onnx_text(SPEECH), np.random.default_rng(0)
    for name in "abcd":
        value = model.graph.initializers.get(name) or next(
            v for n in model.graph for v in n.inputs if v.name == name
        )
        value.const_value = ir.tensor((random.normal(size=(32, 32)) / 6).astype(np.float32), name=name)
        model.graph.initializers[name] = value
    for node, name in zip(
        (n for n in model.graph if n.op_type == "MatMul"), ("first", "second", "third", "fourth"), strict=True
    ):
        node.name = name
    return model


def test_all_that_goes_into_a_size_decides_it_and_nothing_else_does():
    named = {n.name for n in _speech().graph if n.op_type == "MatMul"}
    assert deciding(_speech()) & named == {"first", "second"}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        # The size of a shape is not that of numbers.
        ("h = MatMul(x, x)\n s = Shape(h)\n y = Reshape(x, s)", set()),
        ("h = MatMul(x, x)\n g = Greater(h, x)\n n = NonZero(g)\n y = Cast<to: int = 1>(n)", {"h", "g"}),
        ("h = MatMul(x, x)\n g = Greater(h, x)\n y = Compress(x, g)", {"h", "g"}),
        # What is taken is not what decides.
        ("h = MatMul(x, x)\n g = Greater(x, x)\n f = Flatten<axis: int = 0>(g)\n k = Squeeze(f)\n y = Compress(h, k)", {"g", "f", "k"}),
        ("h = MatMul(x, x)\n y = Where(q, h, x)", set()),
    ],
)  # fmt: skip
def test_operators_whose_output_is_as_large_as_numbers_say(body, found):
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]>\ng (float[4, 4] x, bool[4, 4] q) => (float[m, n] y) {{\n{body}\n}}'
    )
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    assert deciding(model) == found


def test_a_branch_counts_with_what_it_reads_from_around_it():
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[4] x, bool c) => (float[n] y) <int64 zero = {0}, int64 one = {1}> {
          h = Exp(x)
          b = If(c) <then_branch = t () => (float s) { s = ReduceSum<keepdims: int = 0>(h) }, else_branch = e () => (float r) { r = ReduceMax<keepdims: int = 0>(h) }>
          k = Cast<to: int = 7>(b)
          p = Range(zero, k, one)
          y = Cast<to: int = 1>(p)
        }"""
    )
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    assert deciding(model) == {"h", "b", "k"}


class _Timed(Compilation):
    def measure(self, built, *, rounds, budget, hopeless=0.0):
        return None


def test_repair_returns_all_layers_that_decide_a_size_to_float_and_keeps_the_others_in_integers(tmp_path):
    batches = [{"x": np.random.default_rng(i).normal(size=(4, 32)).astype(np.float32)} for i in range(8)]
    recipe = Recipe.load({"recipe": 1, "passes": [{"quantize-static": {"placement": "linear"}}]})
    work = _Timed(
        read(_speech()), target("cpu"), OnnxRuntime(), CalibrationData(batches), None, seed=0, folder=tmp_path, progress=Silent()
    )  # fmt: skip
    # Longer by a frame or two is for the gate to judge, not an error of the runtime.
    built = work.build("int8", recipe)
    work.judge(built, recipe.limits)
    assert not built.fidelity.shapes_equal
    fixed = repair(work, recipe, built, strict=False, faster_than=0.0)
    assert fixed.fidelity.shapes_equal
    assert sorted(r.node for r in fixed.layers if r.kept_float) == ["first", "second"]
    assert sorted(r.node for r in fixed.layers if not r.kept_float) == ["fourth", "third"]
