"""A module that is trained comes back from an evaluation as it was."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the package torch")

from torch import nn  # noqa: E402

import optkit  # noqa: E402
from optkit.passes.modes import evaluating  # noqa: E402


def _frozen():
    module = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    module[1].eval()
    return module


def _training(module):
    return [name for name, each in module.named_modules() if each.training]


def test_each_module_gets_its_own_mode_back():
    module = _frozen()
    with evaluating(module):
        assert not _training(module)
    assert _training(module) == ["", "0", "2", "3"]


def test_the_modes_come_back_after_an_error_too():
    module = _frozen()
    with pytest.raises(RuntimeError, match="no loss"), evaluating(module):
        raise RuntimeError("no loss")
    assert _training(module) == ["", "0", "2", "3"]


@pytest.mark.parametrize("criterion", ["taylor", "wanda"])
def test_a_frozen_norm_stays_frozen_where_weights_are_judged_on_examples(criterion):
    module, x = _frozen(), torch.ones(8, 32)
    recipe = {"recipe": 1, "passes": [{"prune-weights": {"criterion": criterion, "sparsity": 0.5}}]}
    optkit.training(module, recipe, example=(x,), loss=lambda y, _: y.square().mean())
    assert not module.get_submodule("1").training
