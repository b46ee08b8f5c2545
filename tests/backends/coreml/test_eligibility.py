"""Which compute units may run what: every rule on a package that was written and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import optkit
from optkit import sentences
from optkit.backends import BACKENDS
from optkit.report import Report
from optkit.targets import target
from optkit.testing import parse

pytestmark = pytest.mark.needs("coremltools")

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
PHONE = target("iphone15")
REST = ("GPU", "CPU")


def _found(graph: str, folder: Path, precision: str = "fp16", **options):
    backend = BACKENDS.get("coreml")()
    chosen = backend.options.model_validate({"precision": precision, **options})
    backend.lower(parse(HEAD + graph), PHONE, chosen, folder)
    return {e.op: e for e in backend.eligibility(folder, PHONE, chosen)}


def test_what_computes_in_half_precision_at_a_fixed_size_may_run_on_the_neural_engine(tmp_path):
    found = _found("g (float[1, 8, 64] x) => (float[1, 8, 64] y) { a = Relu(x) y = Softmax(a) }", tmp_path)
    for op in ("relu", "softmax"):
        assert (found[op].units, found[op].reason) == (("Neural Engine", *REST), "")
    # The inputs and outputs of the package are in float32.
    assert (found["cast"].units, found["cast"].reason) == (REST, "computes with float32")


@pytest.mark.parametrize(
    ("graph", "op", "units", "reason", "options"),
    [
        ("g (float[1, 64] x) => (float[1, 64] y) { y = Relu(x) }", "relu", REST, "computes with float32", {"precision": "fp32"}),
        ("g (float[1, 64] x) => (float[1, 8] y) <int64[2] s = {8, 8}> { a = Relu(x) b = Reshape(a, s) y = Softmax(b) }".replace("[1, 8] y", "[8, 8] y"),
         "softmax", ("Neural Engine", *REST), "pads its last axis from 8 to 32 elements", {}),
        ("g (float[N, 64] x) => (float[N, 64] y) { y = Relu(x) }", "relu", ("Neural Engine", *REST), "at the default size alone: its shape is a range", {}),
        ("g (int64[2, 64] x) => (int64[2, 64] y) { y = Add(x, x) }", "add", ("CPU",), "computes with int32", {}),
        ("g (float[2, 64] x, bool c) => (float[2, 64] y) { y = If(c)<then_branch = t () => (float[2, 64] a) { a = Exp(x) }, else_branch = e () => (float[2, 64] b) { b = Sin(x) }> }",
         "cond", ("CPU",), "control flow", {}),
        ("g (float[2, 64] x, bool c) => (float[2, 64] y) { y = If(c)<then_branch = t () => (float[2, 64] a) { a = Exp(x) }, else_branch = e () => (float[2, 64] b) { b = Sin(x) }> }",
         "exp", ("CPU",), "inside control flow", {}),
        ("g (float[2, 64] x, float[2, 64] k) => (float[2, 64] y, float[2, 64] l) { l = Add(x, k) y = Relu(l) }", "read_state",
         REST, "keeps a state; the Neural Engine wants caches as inputs and outputs", {"states": {"k": "l"}}),
    ],
)  # fmt: skip
def test_what_the_neural_engine_does_not_run_is_told_with_its_reason(
    graph, op, units, reason, options, tmp_path
):
    found = _found(graph, tmp_path, **options)
    assert (found[op].units, found[op].reason) == (units, reason)


def test_the_report_lists_every_operation_as_predicted(tmp_path):
    graph = "g (float[1, 64] x) => (float[1, 64] y) { a = MatMul(x, w) y = Relu(a) }"
    model = parse(HEAD + graph, w=np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32) / 8)
    artifact, report = optkit.compile(model, target="iphone15", recipe="coreml-fp16", out=tmp_path / "out")
    assert {e.op for e in report.eligibility} >= {"linear", "relu", "cast"}
    first, *reasons = sentences.units(report)
    told = "predicted from documented rules, not observed: of 4 operations at best 2 on the Neural Engine, 2 on the GPU"
    assert first == told
    assert reasons == ["GPU: 2 cast: computes with float32"]
    kept = Report.model_validate_json((artifact.folder / "report.json").read_text("utf-8"))
    assert kept.eligibility == report.eligibility
    page = (artifact.folder / "report.html").read_text("utf-8")
    assert "Compute units, predicted" in page and "computes with float32" in page
    assert any("Performance, on iphone15" in step for step in report.manifest.deferred)


def test_nothing_is_predicted_for_what_runs_here(tmp_path):
    _, report = optkit.compile(
        parse(HEAD + "g (float[1, 64] x) => (float[1, 64] y) { y = Relu(x) }"), target="cpu", recipe="fp32", out=tmp_path / "out"
    )  # fmt: skip
    assert report.eligibility == () and sentences.units(report) == ()
