"""The report as a page: complete, escaped, deterministic, and without any request to elsewhere."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from optkit.page import page
from optkit.report import Report, dump

_NASTY = '<script>alert("x")</script>&'


def _candidate(name: str, verdict: str, **changes: Any) -> dict[str, Any]:
    known = {
        "name": name,
        "speedup": 1.5,
        "bytes": 5_000_000,
        "metric": 0.98,
        "drop": 0.002,
        "ci95": [-0.001, 0.005],
        "cosine": None,
    }
    return {**known, "verdict": verdict, "reason": "", **changes}


def _report(**changes: Any) -> Report:
    manifest: dict[str, Any] = {
        "schema": 1,
        "model": {"name": "embedder.onnx", "sha256": "0" * 64, "nodes": 342, "parameters": 22_565_376, "bytes": 90_261_504},
        "target": "cpu",
        "backend": "onnxruntime",
        "options": {"threads": 0},
        "recipe_digest": "ab" * 32,
        "passes": [
            {"name": "fold-constants", "nodes_before": 342, "nodes_after": 260, "changes": 82},
            {"name": "quantize-static", "nodes_before": 260, "nodes_after": 410, "changes": 37},
        ],
        "data": {"sha256": "1" * 64, "batches": 64, "random": False},
        "achieved": {
            "formats": {"int8": 0.953, "fp32": 0.047},
            "placement": {"cpu": 1.0},
            "operators": {"QGemm": 36, "Softmax": 6},
            "weights": {"int8": 22_000_000, "float": 1_200_000},
            "scheme": "weights int8 per channel, symmetric; activations uint8 per tensor, asymmetric",
        },
        "accuracy": {
            "metric": "recall@1", "reference": 0.616, "candidate": 0.614, "drop": 0.002, "ci95": [-0.003, 0.0055],
            "n": 500, "method": "Agresti-Min", "budget": "1%", "met": "met", "needed": None,
        },
        "fidelity": None,
        "size": {"before": 90_300_000, "after": 23_400_000},
        "evidence": {"emitted": True, "compiled": True, "inspected": True, "executed_cpu": True, "ran_on_device": True, "timed_on_device": True},
        "notes": ["converted from opset 17 to 21"],
        "versions": {"optkit": "0.1.0", "onnxruntime": "1.32.0"},
        "files": [{"path": "model.onnx", "bytes": 23_400_000, "sha256": "2" * 64}],
    }  # fmt: skip
    report: dict[str, Any] = {
        "schema": 1,
        "manifest": {**manifest, **changes.pop("manifest", {})},
        "latency": {
            "reference_ms": 33.27, "candidate_ms": 13.4, "candidate_p99_ms": 14.1, "wall_reference_ms": 33.9, "wall_candidate_ms": 13.6,
            "speedup": 2.48, "ci95": [2.44, 2.52], "runs": 40, "threads": 1, "loaded": False, "inputs": "input_ids [1, 128]",
        },
        "candidates": [
            _candidate("fp32", "slower", speedup=1.06, bytes=90_000_000, reason="a faster candidate keeps the limits"),
            _candidate("int8-static", "missed", speedup=2.6, drop=0.08, ci95=[0.05, 0.11], reason="recall@1 0.6160 -> 0.5360, drop 0.0800 (95% 0.0500 to 0.1100), allowed 1%: missed"),
            _candidate("int8-static-mixed-4", "shipped", speedup=2.48),
            _candidate("int8-dynamic", "failed", speedup=None, bytes=None, metric=None, reason="nothing to quantize"),
        ],
        "layers": [{"node": f"/encoder/layer.{i}/output/dense/MatMul", "sqnr_db": 18.0 + 1.7 * i, "kept_float": i < 4} for i in range(20)],
        "pass_seconds": {"fold-constants": 0.21, "quantize-static": 3.9},
        "operator_seconds": {"QGemm": 0.009, "Softmax": 0.0021, "LayerNormalization": 0.0012, "Add": 0.0004},
        "missed": [], "inconclusive": [], "advice": ["with more samples the interval would be narrower"],
        "resources": {"cpu_seconds": 41.2, "wall_seconds": 44.0, "peak_rss_bytes": 620_000_000},
        "machine": {"system": "Linux", "processor": "Example 9000"},
    }  # fmt: skip
    return Report.model_validate({**report, **changes})


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def _parsed(report: Report) -> _Page:
    parsed = _Page()
    parsed.feed(page(report))
    assert not parsed.open, f"not closed: {parsed.open}"
    return parsed


def test_a_stranger_finds_verdict_figures_and_evidence():
    text = " ".join(_parsed(_report()).text)
    for wanted in (
        "The request was met", "2.48x faster", "13.4 ms", "33.3 ms", "95% 2.44 to 2.52", "measured on this machine", "1 thread", "CPU time",
        "recall@1", "0.6160", "0.6140", "n = 500", "26%", "int8 95.3%", "int8-static-mixed-4", "fold-constants", "QGemm", "timed on device",
        "optkit compile embedder.onnx --recipe recipe.yaml --calib DATA --eval FILE", "Example 9000", "float", "and 5 more",
    ):  # fmt: skip
        assert wanted in text, wanted


def test_bits_that_were_chosen_are_told():
    layers = [
        {"node": f"layer.{i}", "sqnr_db": 20.0 + i, "kept_float": i == 0, "bits": (None, 8, 6, 4, 4)[i]}
        for i in range(5)
    ]
    text = " ".join(_parsed(_report(layers=layers)).text)
    told = "5 layers by what quantizing each alone does to the outputs: 2 of 4 bits, 1 of 6 bits, 1 of 8 bits"
    assert told.capitalize() in text
    assert "6 bits" in text and "1 of 5 layers went back to float" in text


def test_nothing_is_requested_from_elsewhere():
    html = page(_report())
    assert not re.search(r"(?i)https?:|//|url\(|@import|<script|<link|<img|<iframe", html)
    assert "default-src 'none'" in html


def test_everything_from_outside_is_escaped():
    nasty = _report(
        manifest={
            "model": {"name": _NASTY, "sha256": None, "nodes": 1, "parameters": 1, "bytes": 1},
            "notes": [_NASTY],
            "target": _NASTY,
        },
        candidates=[_candidate(_NASTY, "shipped", reason=_NASTY)],
        layers=[{"node": _NASTY, "sqnr_db": 3.0, "kept_float": True}],
        operator_seconds={_NASTY: 1.0},
        missed=[_NASTY],
        machine={_NASTY: _NASTY},
    )
    assert "<script" not in page(nasty)
    assert _NASTY in "".join(_parsed(nasty).text)


def test_the_same_report_gives_the_same_page():
    report = _report()
    assert page(report) == page(Report.model_validate_json(dump(report)))


def test_what_was_not_done_is_not_claimed():
    text = " ".join(
        _parsed(_report(latency=None, manifest={"accuracy": None, "evidence": {"emitted": True}})).text
    )
    assert "Not measured: there is no cpu here." in text
    assert "Neither accuracy nor fidelity was measured" in text
    assert "speed-up" not in text.split("What was tried")[0]
    assert text.count("not done") >= 6


@pytest.mark.parametrize("verdict", ["met", "missed", "inconclusive", None])
@pytest.mark.parametrize("ci95", [(-0.01, 0.02), (-math.inf, math.inf), (0.0, 0.0)])
def test_every_verdict_has_a_drawing(verdict, ci95):
    accuracy = {
        **_report().manifest.accuracy.model_dump(),
        "met": verdict,
        "ci95": ci95,
        "drop": 0.0,
        "needed": 1200,
        "budget": None if verdict is None else "0.01",
    }
    parsed = _parsed(_report(manifest={"accuracy": accuracy}))
    text = " ".join(parsed.text)
    assert (verdict or "no limit was given") in text
    coordinates = [v for name, v in parsed.attributes if name in ("x1", "x2", "cx", "cy", "y1", "y2")]
    assert coordinates
    assert all(math.isfinite(float(v)) for v in coordinates)


def test_fidelity_is_never_called_accuracy():
    fidelity = {
        "cosine": 0.9987,
        "sqnr_db": 31.0,
        "top1_agreement": 0.99,
        "batches": 16,
        "inputs": "held-out calibration data",
        "met": True,
    }
    text = " ".join(_parsed(_report(manifest={"accuracy": None, "fidelity": fidelity})).text)
    assert "Fidelity" in text
    assert "this is not an accuracy" in text
