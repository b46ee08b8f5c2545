"""OpenVINO and NNCF as the harness drives them, and what happens where they are missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest

from optkit.benchmarks import peers_openvino
from optkit.benchmarks.peers import Peer, peers
from optkit.benchmarks.variants import REFERENCE, Variant, Work, variants
from optkit.reference import ReferenceSession

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[batch, 3, 8, 8] x) => (float[batch, 4, 8, 8] y)
{
  c = Conv <pads = [1, 1, 1, 1]> (x, w)
  y = Relu(c)
}
"""


@pytest.fixture
def work(tmp_path: Path) -> Work:
    graph, rng = onnx.parser.parse_model(MODEL), np.random.default_rng(0)
    w = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    onnx.save(graph, tmp_path / "conv.onnx")
    batches = [{"x": rng.uniform(-1, 1, (1, 3, 8, 8)).astype(np.float32)} for _ in range(4)]
    (tmp_path / "work").mkdir()
    return Work(
        model=tmp_path / "conv.onnx", batches=batches, folder=tmp_path / "work", reference=ReferenceSession(tmp_path / "conv.onnx")
    )  # fmt: skip


def _made(work: Work, *names: str) -> dict[str, Variant]:
    chosen = [p for p in peers(transformer=False) if p.name in names]
    return {v.name: v for v in variants(work, {}, chosen)}


@pytest.mark.needs("openvino")
def test_openvino_computes_the_same_in_float32_and_says_that_it_did(work: Work) -> None:
    found = _made(work, "OpenVINO fp32")
    expected = found[REFERENCE].run(work.batches[0])
    one = found["OpenVINO fp32"]
    outputs = one.run(work.batches[0])
    assert list(outputs) == ["y"]
    np.testing.assert_allclose(outputs["y"], expected["y"], rtol=1e-5, atol=1e-5)
    # 8 x 8 outputs of 4 channels, each a sum of 27 products.
    assert {e.format: e.macs for e in one.executed(work.batches[0]) if e.macs} == {"fp32": 8 * 8 * 4 * 27}
    assert sum(e.macs for e in found[REFERENCE].executed(work.batches[0])) == 8 * 8 * 4 * 27


@pytest.mark.needs("openvino")
@pytest.mark.needs("nncf")
def test_nncf_quantizes_once_and_runs_in_both_settings(work: Work) -> None:
    found = _made(work, "NNCF, hint f32", "NNCF, defaults")
    expected = found[REFERENCE].run(work.batches[0])["y"]
    for name in ("NNCF, hint f32", "NNCF, defaults"):
        y = found[name].run(work.batches[0])["y"]
        assert not np.array_equal(y, expected)
        np.testing.assert_allclose(y, expected, atol=0.05 * expected.max())
    assert len(work.made) == 1
    ran = found["NNCF, hint f32"].executed(work.batches[0])
    assert {e.format for e in ran if e.macs} == {"int8"}


def test_a_package_that_is_missing_is_a_row_that_says_so(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(peers_openvino, "find_spec", lambda name: None if name == "openvino" else real(name))
    found = _made(work, "OpenVINO fp32", "NNCF, hint f32", "NNCF, defaults")
    assert [v.error for v in found.values()] == [None, *["openvino is not installed"] * 3]


@pytest.mark.needs("openvino")
def test_nncf_missing_is_a_row_that_says_so(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(peers_openvino, "find_spec", lambda name: None if name == "nncf" else real(name))
    found = _made(work, "NNCF, hint f32", "NNCF, defaults")
    assert [v.error for v in found.values()] == [None, *["nncf is not installed"] * 2]


def test_a_peer_that_raises_is_a_row_with_its_error(work: Work) -> None:
    def make(model: Path, batches: object, folder: Path) -> Path:
        raise RuntimeError(f"cannot read {folder}/x.onnx")

    (_, failed) = variants(work, {}, [Peer(name="broken", make=make)])
    assert failed.error == "RuntimeError: cannot read x.onnx"
    assert failed.run is None
