"""Weights that make up for the errors of those before them: GPTQ by its definition, and what it is worth."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
import pytest

from optkit.data import CalibrationData
from optkit.passes.base import Context
from optkit.passes.quantization.compensate import compensated
from optkit.passes.quantization.palette import PalettizeWeights
from optkit.passes.quantization.weights import QuantizeWeights
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
LAYERS = {
    "(float[50, 96] x) => (float[50, 32] y) { y = MatMul(x, w) }": (96, 32),
    "(float[50, 96] x) => (float[50, 32] y) { y = Gemm<transB = 1>(x, w) }": (32, 96),
    "(float[4, 96, 5, 5] x) => (float[4, 32, 5, 5] y) { y = Conv(x, w) }": (32, 96, 1, 1),
    "(float[4, 12, 8, 8] x) => (float[4, 32, 6, 6] y) { y = Conv(x, w) }": (32, 12, 3, 3),
    "(float[4, 64, 8, 8] x) => (float[4, 64, 6, 6] y) { y = Conv<group = 64>(x, w) }": (64, 1, 3, 3),
}
PASSES = [
    PalettizeWeights(bits=3, group=16, smallest=1),
    PalettizeWeights(bits=4, group=16, scaled=True, smallest=1),
    QuantizeWeights(bits=4, smallest=1),
    QuantizeWeights(smallest=1),
]


def _case(graph: str) -> tuple[ir.Model, CalibrationData]:
    """A layer whose inputs go together, as those of trained models do."""
    random = np.random.default_rng(0)
    model = parse(HEAD + "g " + graph, w=random.normal(size=LAYERS[graph]).astype(np.float32))
    model.graph[0].name = "layer"
    shape = model.graph.inputs[0].shape.numpy()
    mix = random.normal(size=(shape[1], shape[1])) * 0.5 ** (np.arange(shape[1]) / 6)
    batches = []
    for _ in range(6):
        x = np.moveaxis(random.normal(size=shape), 1, -1) @ mix.T
        x += np.roll(x, 1, axis=1)
        batches.append({"x": np.moveaxis(x, -1, 1).astype(np.float32)})
    return model, CalibrationData(batches)


def _error(model: ir.Model, pass_, data: CalibrationData | None, batches: CalibrationData) -> float:
    changed = model.clone()
    pass_.run(changed, Context(target=target("mac-m4"), data=data))
    exact, found = ReferenceSession(model), ReferenceSession(changed)
    return float(np.mean([np.square(exact.run(b)["y"] - found.run(b)["y"]).mean() for b in batches]))


def test_it_is_gptq_by_its_definition():
    """Algorithm 1 of the paper, a row and a column at a time, on a grid of quarters."""
    random = np.random.default_rng(1)
    w, x = random.normal(size=(3, 7)), random.normal(size=(40, 7)) * np.arange(1, 8)
    h = x.T @ x / len(x)
    found = compensated(w[None], h[None], lambda _, v: np.round(v * 4) / 4)[0]
    order = np.argsort(-np.diag(h))
    damped = h[np.ix_(order, order)] + 0.01 * np.diag(h).mean() * np.eye(7)
    for row, got in zip(w, found, strict=True):
        rest, inverse, expected = row[order].copy(), np.linalg.inv(damped), np.empty(7)
        for j in range(7):
            expected[j] = np.round(rest[j] * 4) / 4
            left = slice(j, 7)
            rest[left] -= (rest[j] - expected[j]) / inverse[0, 0] * inverse[0]
            inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
        np.testing.assert_allclose(got[order], expected)


def test_inputs_that_never_come_do_no_harm():
    h = np.zeros((1, 4, 4))
    found = compensated(np.array([[[0.1, 0.6, 0.9, -0.4]]]), h, lambda _, v: np.round(v))
    np.testing.assert_array_equal(found, [[[0, 1, 1, 0]]])


@pytest.mark.parametrize("graph", LAYERS)
@pytest.mark.parametrize("pass_", PASSES, ids=["palette", "scaled", "int4", "int8"])
def test_outputs_are_closer_than_with_nearest_values(graph, pass_):
    model, batches = _case(graph)
    plain = _error(model, pass_, batches, batches)
    # Nine inputs of one channel have little to make up for each other with.
    share = 1.0 if "group" in graph else 0.7
    assert _error(model, pass_.model_copy(update={"compensate": True}), batches, batches) < share * plain


@pytest.mark.parametrize("pass_", PASSES[1:3], ids=["palette", "int4"])
def test_without_data_values_are_the_nearest_and_it_says_so(pass_, caplog):
    model, batches = _case(next(iter(LAYERS)))
    with caplog.at_level(logging.WARNING, logger="optkit"):
        error = _error(model, pass_.model_copy(update={"compensate": True}), None, batches)
    assert error == _error(model, pass_, None, batches)
    assert [r.message for r in caplog.records] == [
        "without calibration data weights are rounded to the nearest value"
    ]


def test_what_other_passes_did_before_does_not_matter():
    """Which of two passes takes a layer is what repair decides; the result must not depend on the way there."""
    random = np.random.default_rng(0)
    model = parse(
        HEAD + "g (float[50, 64] x) => (float[50, 64] y) { a = MatMul(x, w)\n y = MatMul(a, v) }",
        w=random.normal(size=(64, 64)).astype(np.float32), v=random.normal(size=(64, 64)).astype(np.float32),
    )  # fmt: skip
    for node, name in zip(model.graph, ("first", "second"), strict=True):
        node.name = name
    data = CalibrationData([{"x": random.normal(size=(50, 64)).astype(np.float32)}])
    four, six = (PalettizeWeights(bits=b, smallest=1, compensate=True) for b in (4, 6))
    tables = []
    for warm in (False, True):
        changed, context = model.clone(), Context(target=target("mac-m4"), data=data)
        if warm:
            six.run(model.clone(), context)
        four.model_copy(update={"ignore": ("=second",)}).run(changed, context)
        six.run(changed, context)
        tables.append(changed.graph.initializers["v/indices"].const_value.numpy())
    np.testing.assert_array_equal(*tables)
