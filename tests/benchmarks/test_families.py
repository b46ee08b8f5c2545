"""A sample of the families goes through every stage; `python -m optkit.benchmarks.families` runs them all."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import optkit.benchmarks

if pytest.importorskip("torch") and pytest.importorskip("onnxscript"):
    import torch

    from optkit.benchmarks.families import matrix
    from optkit.benchmarks.families.catalogue import Built, build, table
    from optkit.benchmarks.families.stages import STAGES, Row, examine
    from optkit.targets import target

pytestmark = pytest.mark.needs("torch", "onnxscript")
_RESULTS = Path(optkit.benchmarks.__file__).parent


@pytest.mark.needs("openvino", "coremltools", "ai_edge_litert")
@pytest.mark.parametrize("name", ["gru_tagger", "rnnt_streaming_step"])
def test_recurrent_families_pass_every_stage(name):
    row = examine(name, "recurrent", table("recurrent")[name])
    assert row.passed == list(STAGES), row.failed
    assert len(row.sizes) == 2


@pytest.mark.needs("openvino", "transformers", "ai_edge_litert")
@pytest.mark.parametrize(("kind", "name"), [("decoders", "retnet_parallel"), ("geometry", "gaussian_splat")])
def test_other_families_pass_every_stage(kind, name):
    row = examine(name, kind, table(kind)[name])
    assert row.passed == list(STAGES), row.failed


def test_a_family_that_fails_says_at_which_line():
    class Choosing(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    row = examine("choice", "vision", lambda: Built(module=Choosing(), inputs=torch.randn(4, 3), dynamic={}))
    assert row.passed == []
    assert "benchmarks/test_families.py:" in row.failed["export"]
    page = matrix.written(
        {
            "processors": {"export": "this one", "onnx": "this one", "int8": "that one"},
            "versions": {},
            "rows": [asdict(row)],
        }
    )
    assert "| torch.export | 0 of 1 |" in page
    assert "Last run on: this one (torch.export, ONNX, every size); that one (int8)." in page
    assert "* **choice**, torch.export:" in page


@pytest.mark.needs("openvino", "ai_edge_litert")
def test_the_suppression_of_textbooks_exports_as_a_loop():
    row = examine("loop", "detection", table("detection")["mask_rcnn_nms_loop"])
    # Its boxes hardly survive in 8 bits where products saturate.
    loose = {"int8"} if target("cpu").saturates else set()
    assert set(row.passed) | loose == (set(STAGES) - {"coreml", "litert"}) | loose, row.failed
    assert row.rung == "static, with loops compiled"
    assert "SequenceInsert" in row.failed["coreml"]


def test_a_size_baked_in_fails_the_stage_and_not_the_run():
    class Baked(torch.nn.Module):
        def forward(self, x):
            return x + torch.zeros(4 if torch.compiler.is_compiling() else x.shape[0], 1)

    row = examine("baked", "vision", lambda: Built(module=Baked(), inputs=torch.randn(4, 3), dynamic={"x": {0: "batch"}}))  # fmt: skip
    assert row.passed == ["export"]
    assert "onnx" in row.failed


def test_weights_and_inputs_are_the_same_every_time():
    first, second = (build(table("recurrent")["gru_tagger"]) for _ in range(2))
    assert torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_page_is_what_the_results_say():
    found = json.loads((_RESULTS / "results" / "families.json").read_text())
    assert matrix.written(found) == (_RESULTS / "families.md").read_text()
    assert {frozenset(asdict(Row(name="", kind="")))} == {frozenset(r) for r in found["rows"]}


def test_stages_that_run_anew_leave_what_others_found():
    from optkit.benchmarks.families.__main__ import _merged

    before = Row(
        name="net", kind="vision", nodes=(9, 4), passed=["export", "onnx", "onnxruntime", "coreml", "int8"], fixed=True,
        errors={"onnx": 1e-7, "coreml": 2e-6, "int8": 0.999}, failed={"openvino": "no", "litert": "not then"}, in_float=(1, 3),
        seconds=30.0,
    )  # fmt: skip
    after = Row(
        name="net", kind="vision", passed=["export", "onnx", "litert"], errors={"onnx": 3e-7, "litert": 4e-7}
    )
    assert _merged(asdict(before), asdict(after), ["litert"]) == asdict(before) | {
        "passed": ["export", "onnx", "onnxruntime", "coreml", "litert", "int8"],
        "errors": {"onnx": 3e-7, "coreml": 2e-6, "int8": 0.999, "litert": 4e-7},
        "failed": {"openvino": "no"},
        "rung": "",
        "sizes": [],
    }
    broken = Row(name="net", kind="vision", failed={"export": "no graph"})
    assert _merged(asdict(before), asdict(broken), ["litert"]) == asdict(broken)
