"""A small model with data and an evaluator, and two ways to run the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from optkit.cli import main

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
classifier (float[N, 32] x) => (float[N, 10] y)
{
  [first] a = MatMul(x, w1)
  [bias] b = Add(a, b1)
  [relu] c = Relu(b)
  [nothing] d = Identity(c)
  [second] e = MatMul(d, w2)
  [relu2] f = Relu(e)
  [head] y = Gemm(f, w3, b3)
}
"""
_SHAPES = {"w1": (32, 128), "b1": (128,), "w2": (128, 128), "w3": (128, 10), "b3": (10,)}

EVALUATOR = """
import numpy as np

METRIC = "accuracy"

def samples():
    random = np.random.default_rng(7)
    for _ in range(40):
        x = random.standard_normal((1, 32)).astype(np.float32)
        yield {"x": x}, int(x[0, :10].argmax())

def score(outputs, label):
    return float(outputs["y"][0].argmax() == label)
"""

# Whether so small a model gets faster is chance: the tests do not ask for it.
RECIPE = """
recipe: 1
passes:
  - remove-noops
  - quantize-static: {method: min-max}
limits: {min_speedup: 0}
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)


def _write_model(path: Path) -> None:
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(MODEL)
    for name, shape in _SHAPES.items():
        values = (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, path)


@pytest.fixture(scope="session")
def bench_(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.onnx, calib/, eval.py and recipe.yaml; shared, so only to be read."""
    folder = tmp_path_factory.mktemp("given")
    _write_model(folder / "model.onnx")
    (folder / "eval.py").write_text(EVALUATOR)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "calib").mkdir()
    random = np.random.default_rng(1)
    for index in range(8):
        np.savez(folder / "calib" / f"{index:03}.npz", x=random.standard_normal((4, 32)).astype(np.float32))
    return folder


@pytest.fixture
def given(bench_: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; the value is the folder with the model and its data."""
    monkeypatch.chdir(tmp_path)
    return bench_


@pytest.fixture(scope="session")
def artifact(bench_: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact; shared, so only to be read."""
    out = tmp_path_factory.mktemp("compiled") / "build"
    code = main(
        [
            "compile",
            str(bench_ / "model.onnx"),
            "-r",
            str(bench_ / "recipe.yaml"),
            "--calib",
            str(bench_ / "calib"),
            "-o",
            str(out),
            "-q",
        ]
    )
    assert code == 0
    return out


@pytest.fixture
def optkit(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """``optkit("compile", ...)`` in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def command() -> Callable[..., list[str]]:
    """The command line for a process of its own."""
    return lambda *arguments: [sys.executable, "-m", "optkit", *(str(a) for a in arguments)]


@pytest.fixture
def process(command: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Ran]:
    """``process("compile", ...)`` in a process of its own, with pipes for its streams."""

    def run(*arguments: object, **environment: str) -> Ran:
        done = subprocess.run(
            command(*arguments), capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **environment}, timeout=60, check=False
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
