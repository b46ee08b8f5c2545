"""ONNX Runtime's own quantizers, as the harness drives them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

from optkit.benchmarks.cpu import _ratio
from optkit.benchmarks.peers import ORT_PEERS, Peer, prepare
from optkit.benchmarks.variants import brief
from optkit.reference import ReferenceSession

# Opset 12 has no per-channel DequantizeLinear: the one that needs it must raise it first.
LINEAR = """
<ir_version: 7, opset_import: ["" : 12]>
g (float[batch, 8] x) => (float[batch, 4] y)
{
  h = MatMul(x, w)
  y = Relu(h)
}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    graph = onnx.parser.parse_model(LINEAR)
    w = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    onnx.save(graph, tmp_path / "linear.onnx")
    return tmp_path / "linear.onnx"


@pytest.mark.parametrize("peer", ORT_PEERS, ids=lambda peer: peer.name)
def test_a_peer_quantizes_close_to_the_original(peer: Peer, model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    batches = [{"x": rng.uniform(-1, 1, (4, 8)).astype(np.float32)} for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their own
        path = peer.make(model, batches, tmp_path)
    expected = ReferenceSession(model).run(batches[0])["y"]
    found = ReferenceSession(path).run(batches[0])["y"]
    assert not np.array_equal(found, expected)
    # Eight products of a weight, off by half of 1/127 of the largest, and an input, off by half of 1/127 of its reach
    # (defaults), and half a step of the output.
    largest = np.abs(onnx.numpy_helper.to_array(onnx.load(model).graph.initializer[0])).max()
    np.testing.assert_allclose(found, expected, atol=8 * largest / 127 + expected.max() / 254)


def test_preparing_raises_an_old_opset(model: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare(model, tmp_path / "prepared.onnx")
    assert onnx.load(tmp_path / "prepared.onnx").opset_import[0].version == 17


def test_an_error_names_no_folder() -> None:
    assert (
        brief("cannot open /home/someone/zoo/model.onnx:\n it is\tempty")
        == "cannot open model.onnx: it is empty"
    )


def test_the_ratio_comes_with_its_interval() -> None:
    middle, (low, high) = _ratio(np.array([1.9, 2.0, 2.0, 2.0, 2.1]), np.zeros(5))
    assert middle == 2.0
    assert 1.9 <= low <= 2.0 <= high <= 2.1


def test_the_interval_of_a_ratio_holds_what_differs_between_processes() -> None:
    ratios = np.repeat([1.8, 2.0, 2.2, 2.0], 10) + np.tile(np.linspace(-0.01, 0.01, 10), 4)
    _, (low, high) = _ratio(ratios, np.repeat(range(4), 10))
    assert low < 1.95 and high > 2.05
    _, (low, high) = _ratio(ratios, np.tile(range(4), 10))
    assert low > 1.9 and high < 2.1
