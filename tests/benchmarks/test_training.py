"""The page of the recipes for training is what the results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import optkit.benchmarks

pytest.importorskip("torch", reason="needs the package torch")

from optkit.benchmarks.training import CASES, page

_RESULTS = Path(optkit.benchmarks.__file__).parent / "results"


def test_the_page_is_what_the_results_say():
    found = json.loads((_RESULTS / "training.json").read_text(encoding="utf-8"))
    assert (_RESULTS / "training.md").read_text(encoding="utf-8") == page(found)
    assert [row["label"] for row in found["rows"]] == [case.label for case in CASES]
