"""Two processes, with whole parameters and with sharded ones, come to the weights that one comes to on all of the data."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_SCRIPT = Path(__file__).with_name("two_processes.py")


def _script():
    found = importlib.util.spec_from_file_location("two_processes", _SCRIPT)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_two_processes_train_as_one(tmp_path):
    command = [sys.executable, str(_SCRIPT)]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    script = _script()
    alone = {
        name: script.train(name, lambda module: module, slice(None)).finish().module.state_dict()
        for name in script.RECIPES
    }
    try:
        # Nearly a minute of each processor on its own: long enough for one that others load, short enough for a hang.
        said = [process.communicate(timeout=600)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said
    for recipe, wrapper in itertools.product(alone, script.WRAPPERS):
        expected = alone[recipe]
        one, other = (
            torch.load(tmp_path / f"{recipe}-{wrapper}-{rank}.pt", weights_only=True) for rank in range(2)
        )
        assert one.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
            # Means of halves are summed in another order; a value on the edge of its grid may fall on the other side.
            torch.testing.assert_close(one[name], value, rtol=1e-3, atol=1e-4)
    pruned = alone["distil"]["b.weight"]
    assert pruned.shape == (16, 16)
    assert float((pruned == 0).float().mean()) == pytest.approx(0.5)
    assert any(name.endswith("integers") for name in alone["int8-qat"])
    for rank in range(2):
        average, back, kept = (tmp_path / f"refused-{rank}.txt").read_text().splitlines()
        assert average.startswith("distil: a teacher that is the average")
        assert back.startswith("prune-weights: weights that go back")
        assert kept.startswith("checkpoint and patience keep whole weights")
