"""Pruning to a measured speed-up; what is asked for is far from what noise could decide."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.backends import BACKENDS
from optkit.errors import BackendUnavailableError, PassError
from optkit.latency_table import LatencyTable
from optkit.narrowing import reach
from optkit.passes.base import Context
from optkit.passes.pruning.structured import PruneChannels
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse

SOURCE = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 3, 24, 24] x) => (float[N, 10] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, first)
  ra = Relu(a)
  b = Conv<pads = [1, 1, 1, 1]>(ra, second)
  rb = Relu(b)
  c = Conv<pads = [1, 1, 1, 1]>(rb, third)
  rc = Relu(c)
  p = GlobalAveragePool(rc)
  f = Flatten(p)
  y = Gemm<transB = 1>(f, last)
}
"""
_SHAPES = {"first": (64, 3, 3, 3), "second": (128, 64, 3, 3), "third": (64, 128, 3, 3), "last": (10, 64)}


@pytest.fixture
def model():
    random = np.random.default_rng(0)
    return parse(
        SOURCE, **{n: random.standard_normal(s).astype(np.float32) * 0.1 for n, s in _SHAPES.items()}
    )


FEEDS = [{"x": np.random.default_rng(1).standard_normal((1, 3, 24, 24)).astype(np.float32)}]


def _reach(model, tmp_path, wanted, where="cpu", **options):
    engine = BACKENDS["onnxruntime"]()
    context = Context(target=target(where), placements=engine.placements)
    return reach(model, PruneChannels(**options), FEEDS, context, engine, tmp_path, wanted=wanted)


def test_the_widths_found_reach_the_speed_up_and_prune_the_same_again(model, tmp_path):
    found = _reach(model, tmp_path, 1.5)
    assert found.reached
    assert found.measured.ratio >= 1.5
    assert found.layers > 3
    assert all(n % 16 == 0 and n < _SHAPES[name][0] for name, n in found.keep.items())
    before = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    PruneChannels(keep=dict(found.keep)).run(model, Context(target=target("cpu")))
    assert {n: model.graph.initializers[n].shape.numpy()[0] for n in found.keep} == dict(found.keep)
    # The same numbers as with the removed channels at 0, which are those whose weights are gone.
    masked = dict(before)
    for name, after in (("first", "second"), ("second", "third"), ("third", "last")):
        kept = model.graph.initializers[after].const_value.numpy()
        # Rows of it may be gone too: of a channel that stays, some row is whole.
        whole = np.isin(before[after], kept).reshape(*before[after].shape[:2], -1).all(2)
        gone = np.flatnonzero(~whole.any(0))
        assert len(gone) == _SHAPES[name][0] - found.keep.get(name, _SHAPES[name][0])
        masked[after] = before[after].copy()
        masked[after][:, gone] = 0
    expected = ReferenceSession(parse(SOURCE, **masked), optimize=False).run(FEEDS[0])["y"]
    np.testing.assert_allclose(
        ReferenceSession(model, optimize=False).run(FEEDS[0])["y"], expected, rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_reached_ends_at_the_narrowest(model, tmp_path):
    found = _reach(model, tmp_path, 1000.0)
    assert not found.reached
    assert all(found.keep[name] <= 32 for name in ("first", "second", "third"))
    assert found.measured.ratio > 2


def test_what_may_not_be_touched_stays(model, tmp_path):
    found = _reach(model, tmp_path, 1000.0, ignore=("first",), least=0.5)
    assert "first" not in found.keep
    assert 64 <= found.keep["second"] < 128
    assert found.keep.get("third", 64) >= 32


def test_a_target_elsewhere_is_refused_before_any_work(model, elsewhere, tmp_path):
    with pytest.raises(BackendUnavailableError, match=f"{elsewhere} cannot be measured on this machine"):
        _reach(model, tmp_path, 1.5, where=elsewhere)
    assert not list(tmp_path.iterdir())


def test_no_width_left_is_an_error(model, tmp_path):
    with pytest.raises(PassError, match="nothing would be pruned: no narrower layer is faster"):
        _reach(model, tmp_path, 1.5, least=1.0)


def test_a_layer_is_timed_once_and_wider_ones_take_longer(model):
    table = LatencyTable(BACKENDS["onnxruntime"]())
    node = next(n for n in model.graph if n.op_type == "Conv")
    narrow = table.seconds(node, [(1, 16, 24, 24), (16, 16, 3, 3)])
    wide = table.seconds(node, [(1, 256, 24, 24), (256, 256, 3, 3)])
    assert wide > 4 * narrow > 0
    assert table.seconds(node, [(1, 16, 24, 24), (16, 16, 3, 3)]) == narrow
    assert table.entries == 2


def test_a_backend_that_runs_no_single_layers_says_so(model):
    class Mute(BACKENDS["onnxruntime"]):
        def runner(self, model, feeds, precision):
            return None

    node = next(n for n in model.graph if n.op_type == "Conv")
    with pytest.raises(BackendUnavailableError, match="runs no single layers"):
        LatencyTable(Mute()).seconds(node, [(1, 3, 24, 24), (16, 3, 3, 3)])
