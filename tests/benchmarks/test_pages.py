"""Pages of results are what the records beside them say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("litert", "ai_edge_litert"),
        ("coreml", "coremltools"),
        ("coreml_compressed", "coremltools"),
        ("coreml_peers", "coremltools"),
        ("nvidia", "torch"),
    ],
)
def test_the_page_is_what_the_results_say(name, package):
    pytest.importorskip(package, reason=f"needs the package {package}")
    module = importlib.import_module(f"optkit.benchmarks.{name}")
    found = json.loads((RESULTS / f"{name}.json").read_text())
    assert module.markdown(found) == (RESULTS / f"{name}.md").read_text()


@pytest.mark.needs("coremltools")
def test_rows_measured_again_take_the_place_of_those_that_are_there():
    from optkit.benchmarks.coreml_compressed import merged

    before = [{"name": "magika", "recipe": r, "bytes": 1} for r in ("coreml-fp16", "coreml-w4")]
    after = [
        {"name": "magika", "recipe": "coreml-w4", "bytes": 2},
        {"name": "minilm_l6", "recipe": "coreml-w8", "bytes": 3},
        {"name": "magika", "recipe": "coreml-w8", "bytes": 4},
    ]
    found = [(r["name"], r["recipe"], r["bytes"]) for r in merged(before, after)]
    assert found == [
        ("minilm_l6", "coreml-w8", 3),
        ("magika", "coreml-fp16", 1),
        ("magika", "coreml-w8", 4),
        ("magika", "coreml-w4", 2),
    ]
