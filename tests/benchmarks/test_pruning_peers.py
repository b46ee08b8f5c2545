"""The comparison of pruning with torch-pruning."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

import optkit.benchmarks
from optkit.benchmarks.bounded import bounded

pytest.importorskip("torch", reason="needs the package torch")

from optkit.benchmarks.pruning_peers import _limit, _TooLong, page

_RESULTS = Path(optkit.benchmarks.__file__).parent / "results"


def _spin():
    """What catches all exceptions, in a loop without an end."""
    _limit(1)
    try:
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))
    except _TooLong as error:
        return str(error)


def test_a_tool_is_stopped_by_the_cpu_time_that_it_takes():
    assert bounded(_spin, seconds=300, memory=1 << 40, start="fork")[0] == "stopped: beyond 1 CPU seconds"


def test_the_page_is_what_the_results_say():
    pytest.importorskip("transformers", reason="needs the package transformers")
    found = json.loads((_RESULTS / "pruning_peers.json").read_text(encoding="utf-8"))
    assert (_RESULTS / "pruning_peers.md").read_text(encoding="utf-8") == page(found)
