"""Pages of results are what the records beside them say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("name", "package"),
    [("litert", "ai_edge_litert"), ("coreml", "coremltools"), ("coreml_compressed", "coremltools")],
)
def test_the_page_is_what_the_results_say(name, package):
    pytest.importorskip(package, reason=f"needs the package {package}")
    module = importlib.import_module(f"optkit.benchmarks.{name}")
    found = json.loads((RESULTS / f"{name}.json").read_text())
    assert module.markdown(found) == (RESULTS / f"{name}.md").read_text()
