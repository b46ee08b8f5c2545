"""What zeros are worth: a gain must show twice to be one. The times are planted."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.backends import BACKENDS
from optkit.bench import Speedup, Timing
from optkit.passes.base import Context
from optkit.sparsity import exploited, worth
from optkit.targets import target
from optkit.testing import parse

MODEL = '<ir_version: 10, opset_import: ["" : 21]> g (float[N, 4] x) => (float[N, 4] y) { y = MatMul(x, w) }'
FEEDS = [{"x": np.ones((2, 4), np.float32)}]


def _worth(monkeypatch, tmp_path, low):
    """Planted lower ends, in order; gives what comes out and the first inputs' outputs of each pair of runs."""
    seen = []

    def planted(one, other, feeds, **_):
        seen.append((one(feeds[0])["y"][0, 0], other(feeds[0])["y"][0, 0]))
        end, time = low[len(seen) - 1], Timing(median=1e-3, p99=1e-3, wall=1e-3, runs=9, warmup=2)
        return Speedup(reference=time, candidate=time, ratio=end, ci95=(end, end), threads=1, loaded=False)

    monkeypatch.setattr("optkit.sparsity.speedup", planted)
    dense, sparse = (parse(MODEL, w=np.full((4, 4), v, np.float32)) for v in (1, 0))
    engine = BACKENDS["onnxruntime"]()
    context = Context(target=target("cpu"), placements=engine.placements)
    return worth(dense, sparse, FEEDS, context, engine, tmp_path), seen


@pytest.mark.parametrize(
    ("low", "runs", "gain"), [([1.5, 1.4], 2, True), ([1.5, 1.0], 2, False), ([1.0], 1, False)]
)
def test_a_gain_counts_where_it_shows_again_in_the_other_order(monkeypatch, tmp_path, low, runs, gain):
    found, seen = _worth(monkeypatch, tmp_path, low)
    # The dense one is the reference in either order.
    assert seen == [(4.0, 0.0)] * runs
    assert found.ci95[0] == min(low)
    assert exploited(found) == gain
