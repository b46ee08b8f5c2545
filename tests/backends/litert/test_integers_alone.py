"""Hardware that computes in integers alone: nothing in float is a way out, and what was quantized for it ships."""

from __future__ import annotations

import numpy as np
import pytest

import optkit
from optkit.errors import UnsupportedOpError
from optkit.testing import parse

pytestmark = pytest.mark.needs("ai_edge_litert")

NET = """<ir_version: 10, opset_import: ["" : 21]>
g (float[1, 3, 8, 8] x) => (float[1, 4] y) {
  [a] a = Conv<kernel_shape = [3, 3]>(x, w) b = Relu(a) p = GlobalAveragePool(b) f = Flatten(p) [g] y = Gemm<transB = 1>(f, v) }"""


def _net():
    random = np.random.default_rng(0)
    shapes = {"w": (8, 3, 3, 3), "v": (4, 8)}
    return parse(NET, **{k: random.normal(size=s).astype(np.float32) for k, s in shapes.items()})


def _batches():
    random = np.random.default_rng(1)
    return [{"x": random.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(4)]


def _compiled(folder, **options):
    return optkit.compile(_net(), target="edge-tpu", out=folder / "out", **options)


def test_auto_ships_what_quantizes_everything(tmp_path):
    artifact, report = _compiled(tmp_path, data=_batches(), overrides=["limits.min_cosine=0.9"])
    verdicts = {c.name: c.verdict for c in report.candidates}
    floats = dict.fromkeys(("fp32", "litert-fp16", "litert-int8-dynamic"), "failed")
    assert verdicts == {**floats, "litert-int8": "shipped"}
    assert not report.missed and report.manifest.achieved.formats == {"int8": 1}
    assert (artifact.folder / "model.tflite").is_file()


@pytest.mark.parametrize("recipe", ["auto", "litert-int8"])
def test_what_misses_its_limits_ships_as_missed_since_no_float_can(tmp_path, recipe):
    artifact, report = _compiled(
        tmp_path, recipe=recipe, data=_batches(), overrides=["limits.min_cosine=0.9999999"]
    )
    assert any("cosine to the fp32 reference" in m for m in report.missed)
    assert (artifact.folder / "model.tflite").is_file()


def test_without_data_it_says_that_data_is_needed(tmp_path):
    with pytest.raises(UnsupportedOpError, match="the Edge TPU computes in 8-bit integers alone") as caught:
        _compiled(tmp_path)
    assert caught.value.hint == (
        "give calibration data (--calib FOLDER): litert-int8 would be tried, which quantizes"
    )
    with pytest.raises(UnsupportedOpError) as caught:
        _compiled(tmp_path, recipe="litert-fp32")
    assert "-r auto or litert-int8 with --calib FOLDER" in str(caught.value.hint)
