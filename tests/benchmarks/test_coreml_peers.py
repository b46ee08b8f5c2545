"""Core ML here and by others, on something small."""

from __future__ import annotations

import pytest

pytestmark = [
    pytest.mark.needs("coremltools"),
    pytest.mark.needs("torch"),
    pytest.mark.needs("transformers"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def small(monkeypatch):
    """A family of one convolution and one product, with two axes free."""
    import torch

    from optkit.benchmarks import coreml_peers
    from optkit.benchmarks.families.catalogue import Built

    def builder():
        module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GELU(), torch.nn.Linear(6, 5))
        return Built(
            module=module, inputs=(torch.randn(2, 3, 7, 8),), dynamic={"input": {0: "batch", 2: "height"}}
        )

    monkeypatch.setattr(coreml_peers, "table", lambda kind: {"small": builder})
    return coreml_peers


def test_tools_get_one_network_and_are_judged_by_what_it_computes(small, tmp_path):
    assert small._prepare("vision", "small", tmp_path) == {"against": "float64", "rounding": 0.0}
    assert [a.dtype for a in small._arrays(tmp_path / "expected.npz")] == ["float64"]
    ours, theirs = (small._WORK[t]("vision", "small", tmp_path) for t in ("optkit", "coremltools"))
    assert ours["error"] < 1e-6
    assert theirs.get("error", 1) < 1e-6, theirs
    assert theirs["from"] == "program"
    assert min(ours["seconds"], theirs["seconds"]) > 0


def test_a_package_that_computes_something_else_is_found_out(small, tmp_path):
    import numpy as np

    small._prepare("vision", "small", tmp_path)
    (expected,) = small._arrays(tmp_path / "expected.npz")
    np.savez(tmp_path / "expected.npz", expected * np.float32(1.01))
    assert small._WORK["optkit"]("vision", "small", tmp_path)["error"] == pytest.approx(0.01 / 1.01, rel=0.05)


def test_what_a_tool_raises_is_a_row(small, tmp_path):
    found = small._caught(small._WORK["optkit"], "vision", "small", tmp_path)
    assert "model.onnx" in found["failed"]


def test_the_page_names_what_peers_do_better():
    from optkit.benchmarks.coreml_peers import markdown

    def row(name, ours, other):
        return {
            "name": name,
            "kind": "vision",
            "tools": {"optkit": ours, "coremltools": other, "onnx2coreml": {}},
        }

    good, worse = {"error": 1e-7, "seconds": 2.0}, {"error": 5e-5, "seconds": 0.5}
    page = markdown({
        "processor": {"name": "some"}, "versions": {"optkit": "1"},
        "rows": [
            row("even", good, good), row("worse", worse, good), row("lost", {"failed": "no <such> thing"}, good),
            row("wrong", good, {"error": 0.5, "seconds": 1.0}),
            row("as far as its reference", worse, good) | {"against": "ONNX Runtime", "rounding": 6e-5},
        ],
    })  # fmt: skip
    assert "it alone converts lost." in page
    assert "move a file that is published as one, at worse." in page
    assert "right to 0.001: 4 by optkit, 4 by coremltools, 0 by onnx2coreml" in page
    assert "more than its at 0 of 3" in page
    assert "| even ¹ |" in page and "| as far as its reference |" in page
    assert "* **lost**, optkit: no ‹such› thing" in page
