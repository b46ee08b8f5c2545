"""The whole road on a trained model from a package: the orientation classifier of PP-OCR, on rendered text lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import optkit
from optkit.benchmarks import suite
from optkit.errors import OptkitError
from optkit.evaluate import Evaluator, load_python

_EVALUATOR = Path(suite.__file__).parent / "evaluators" / "ppocr_cls.py"


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return suite.fetch("ppocr_cls")
    except OptkitError as error:
        pytest.skip(f"the model cannot be fetched: {error}")


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory):
    module = load_python(_EVALUATOR, "evaluator")
    return optkit.compile(
        model,
        target="cpu",
        data=lambda: module.calibration(16),
        evaluate=Evaluator(samples=lambda: module.samples(100), score=module.score, metric=module.METRIC),
        max_drop="2%",
        out=tmp_path_factory.mktemp("real") / "artifact",
    )


@pytest.mark.needs("PIL")
def test_what_ships_keeps_the_accuracy_of_the_original(compiled):
    _, report = compiled
    accuracy = report.manifest.accuracy
    assert accuracy.reference > 0.9
    assert accuracy.met in ("met", "inconclusive")
    assert accuracy.candidate >= accuracy.reference - 0.02 * accuracy.reference
    assert report.missed == ()


@pytest.mark.needs("PIL")
def test_what_ships_has_fewer_nodes_and_was_really_timed(compiled):
    _, report = compiled
    assert report.manifest.passes[-1].nodes_after < report.manifest.model.nodes
    assert report.manifest.evidence.timed_on_device
    assert report.latency.runs >= 5


@pytest.mark.needs("PIL")
def test_the_artifact_answers_as_onnx_runtime_does_on_the_original(compiled, model: Path):
    import onnxruntime as ort

    artifact, _ = compiled
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    loaded = optkit.load(artifact.folder)
    module = load_python(_EVALUATOR, "evaluator")
    same = []
    for feeds, _ in module.samples(40):
        (expected,) = session.run(None, feeds)
        (found,) = loaded.run(feeds).values()
        same.append(np.argmax(expected) == np.argmax(found))
    assert np.mean(same) >= 0.95
