"""Compiling for hardware that is not at hand: nothing is timed, and nothing says so."""

from __future__ import annotations

import json
import re

import numpy as np
import onnx_ir as ir
import pytest

import optkit
from optkit import sentences
from optkit.backends.base import Estimate
from optkit.backends.onnxruntime import OnnxRuntime
from optkit.page import page
from optkit.targets import TARGETS, Target
from optkit.testing import parse

LINEAR = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 64] x, float[64, 32] w1, float[32, 8] w2) => (float[N, 8] y)
{ h = MatMul(x, w1)
  r = Relu(h)
  y = MatMul(r, w2) }
"""
FAR = Target(
    name="faraway", vendor="any", arch="not this machine", backends=("onnxruntime",), formats=frozenset({"fp32", "int8"}),
)  # fmt: skip
STEPS = ("measure it there: optkit bench",)


@pytest.fixture
def model() -> ir.Model:
    graph, random = parse(LINEAR), np.random.default_rng(0)
    for value in list(graph.graph.inputs)[1:]:
        graph.graph.inputs.remove(value)
        shape = value.shape.numpy()
        value.const_value = ir.tensor((random.normal(size=shape) / 8).astype(np.float32), name=value.name)
        graph.graph.register_initializer(value)
    return graph


@pytest.fixture
def batches() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [{"x": random.normal(size=(4, 64)).astype(np.float32)} for _ in range(8)]


@pytest.fixture(autouse=True)
def far(monkeypatch) -> None:
    monkeypatch.setitem(TARGETS, FAR.name, FAR)
    monkeypatch.setattr(OnnxRuntime, "deferred", lambda *_: STEPS)
    monkeypatch.setattr(OnnxRuntime, "evidence", lambda *_: frozenset())


def _compile(model, batches, tmp_path, **options):
    return optkit.compile(model, target=FAR, data=batches, out=tmp_path / "out", **options)


def test_the_smallest_candidate_within_the_limits_ships_and_no_latency_is_claimed(model, batches, tmp_path):
    artifact, report = _compile(model, batches, tmp_path)
    assert report.latency is None and report.estimate is None
    assert all(c.speedup is None for c in report.candidates)
    others = [c for c in report.candidates if c.verdict in ("larger", "farther")]
    assert not any(c.verdict == "slower" for c in report.candidates)
    shipped = next(c for c in report.candidates if c.verdict == "shipped")
    assert shipped.name != "fp32" and all(shipped.bytes <= c.bytes * 1.05 for c in others)
    assert any("is smaller and keeps the limits" in c.reason for c in report.candidates)
    evidence = artifact.manifest.evidence
    assert evidence.emitted and evidence.executed_cpu
    assert not (evidence.compiled or evidence.inspected or evidence.ran_on_device or evidence.timed_on_device)
    assert artifact.manifest.fidelity is not None and artifact.manifest.fidelity.met
    assert optkit.load(tmp_path / "out").run(batches[0])["y"].shape == (4, 8)


def test_the_estimate_decides_where_there_is_one(model, batches, tmp_path, monkeypatch):
    def estimate(self, model, target, options):
        quantized = any(n.op_type == "DequantizeLinear" for n in model.graph)
        floor = 2e-3 if quantized else 1e-3
        return Estimate(floor=floor, low=2 * floor, high=3 * floor, bound="memory")

    monkeypatch.setattr(OnnxRuntime, "estimate", estimate)
    _, report = _compile(
        model, batches, tmp_path, overrides=["candidates=[fp32, int8-static]"], recipe="auto"
    )
    verdicts = {c.name: (c.verdict, c.reason) for c in report.candidates}
    assert verdicts["fp32"][0] == "shipped"
    assert verdicts["int8-static"] == ("slower", "fp32 is faster by the estimate and keeps the limits")
    assert report.estimate is not None and report.estimate.floor_ms == pytest.approx(1.0)
    first, second = sentences.untimed(report)
    assert first == "not measured: there is no faraway here"
    assert "floor 1.00 ms (bound by memory), estimate 2.00 ms to 3.00 ms" in second


def test_evidence_of_a_device_is_never_taken_from_a_backend(model, batches, tmp_path, monkeypatch):
    said = frozenset({"compiled", "proxy_compiled", "ran_on_device", "timed_on_device"})
    monkeypatch.setattr(OnnxRuntime, "evidence", lambda *_: said)
    artifact, _ = _compile(model, batches, tmp_path)
    evidence = artifact.manifest.evidence
    assert evidence.compiled and evidence.proxy_compiled
    assert not evidence.ran_on_device and not evidence.timed_on_device


def test_what_is_left_to_do_is_listed_and_limits_on_speed_are_left_too(model, batches, tmp_path):
    recipe = {"recipe": 1, "passes": ["remove-noops"], "limits": {"min_speedup": 2, "max_latency_ms": 1}}
    artifact, report = _compile(model, batches, tmp_path, recipe=recipe)
    assert artifact.manifest.deferred == (
        *STEPS, "hold the limits on speed against a measurement: there is no faraway here",
    )  # fmt: skip
    assert report.exit_code == 0
    assert sentences.deferred(report) == "DEFERRED: 2 steps that need faraway"
    assert sentences.outcome(report) == "What can be checked here was met; 2 steps must be done on faraway."
    shown = re.sub("<[^>]*>", " ", page(report))
    assert "Not measured: there is no faraway here" in shown and STEPS[0] in shown
    assert "measured on this machine" not in shown


def test_a_missed_limit_is_still_a_missed_limit(model, batches, tmp_path):
    _, report = _compile(
        model, batches, tmp_path, recipe="int8-static", overrides=["limits.min_cosine=0.9999999"]
    )
    assert report.exit_code == 3
    assert sentences.outcome(report).startswith("The request was not met")


def test_the_same_request_gives_the_same_bytes(model, batches, tmp_path):
    manifests = []
    for name in ("one", "two"):
        artifact, _ = optkit.compile(model, target=FAR, data=batches, out=tmp_path / name)
        manifests.append((artifact.folder / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]
    assert json.loads(manifests[0])["deferred"] == list(STEPS)
