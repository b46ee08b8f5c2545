"""``optkit.finetune``: schedules, checkpoints, early stopping, mixed precision, wrappers."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

import optkit
from optkit.errors import DataError, UsageError
from optkit.passes.base import Progress
from optkit.training_loop import Fit


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 3)

    def forward(self, x):
        return self.b(F.dropout(F.relu(self.norm(self.a(x))), 0.1, self.training))


GRADUAL = {
    "recipe": 1,
    "passes": [{"prune-weights": {"sparsity": 0.5, "end": 0.5, "every": 1, "targets": ["b"]}}],
}
QAT = {"recipe": 1, "passes": ["quantize-aware"]}
DISTIL = {"recipe": 1, "passes": [{"distil": {"teacher": "average"}}]}


@pytest.fixture
def data():
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def _made(seed=0):
    torch.manual_seed(seed)
    return _Net()


def _loader(data, **options):
    return DataLoader(data, batch_size=20, **options)


def _weights(done):
    return {k: v.clone() for k, v in done.trained.module.state_dict().items()}


@pytest.mark.parametrize("recipe", [QAT, GRADUAL, DISTIL], ids=["qat", "gradual", "distil"])
def test_an_interrupted_training_goes_on_to_the_same_weights(data, tmp_path, recipe):
    def run(path, stop_after=99):
        seen = []

        def evaluate(module):
            seen.append(module)
            if len(seen) > stop_after:
                raise KeyboardInterrupt
            return 0.0

        torch.manual_seed(9)
        fit = Fit(epochs=4, learning_rate=0.01, checkpoint=path)
        return optkit.finetune(
            _made(), recipe, _loader(data, shuffle=True), F.cross_entropy, fit=fit, evaluate=evaluate
        )

    whole = run(tmp_path / "one.pt")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two.pt", stop_after=2)
    resumed = run(tmp_path / "two.pt")
    assert resumed.losses == whole.losses
    assert len(whole.losses) == len(resumed.metrics) == 4
    for name, value in _weights(whole).items():
        torch.testing.assert_close(_weights(resumed)[name], value, rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_learning_rate_rises_and_falls_along_a_cosine(data):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda o, *_: rates.append([g["lr"] for g in o.param_groups]))
    fit = Fit(epochs=4, learning_rate=0.1, warmup=0.25)
    try:
        optkit.finetune(_made(), DISTIL, _loader(data), F.cross_entropy, fit=fit)
    finally:
        hook.remove()
    # Twelve steps, three of them to rise.
    expected = [0.025, 0.05, 0.075, *(0.05 * (1 + math.cos(math.pi * n / 9)) for n in range(9))]
    assert [a for a, _ in rates] == pytest.approx(expected)
    assert [b for _, b in rates] == pytest.approx(expected)


def test_it_stops_early_and_brings_the_best_epoch_back(data):
    metrics, kept = iter([0.1, 0.5, 0.3, 0.2, 0.9]), []

    def evaluate(module):
        kept.append(copy.deepcopy(module.state_dict()))
        return next(metrics)

    fit = Fit(epochs=5, patience=2, learning_rate=0.01)
    done = optkit.finetune(_made(), DISTIL, _loader(data), F.cross_entropy, fit=fit, evaluate=evaluate)
    assert list(done.metrics) == [0.1, 0.5, 0.3, 0.2]
    for name, value in _weights(done).items():
        torch.testing.assert_close(value, kept[1][name], rtol=0, atol=0)


def test_an_epoch_before_the_schedule_is_complete_is_never_the_best(data):
    metrics = iter([0.9, 0.8, 0.1, 0.2, 0.15, 0.1])
    shares = []

    def evaluate(module):
        shares.append(float((module.b.weight == 0).float().mean()))
        return next(metrics)

    fit = Fit(epochs=6, patience=2, learning_rate=0.01)
    done = optkit.finetune(_made(), GRADUAL, _loader(data), F.cross_entropy, fit=fit, evaluate=evaluate)
    # Half of six epochs is the third: 0.2 is the best behind it, and two epochs later it stops.
    assert len(done.metrics) == 6
    assert 0 < shares[0] < shares[1] < shares[2] == pytest.approx(0.5)
    assert float((done.trained.module.b.weight == 0).float().mean()) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "options", [{"autocast": "bf16"}, {"autocast": "fp16"}, {"clip": 0.1}, {"optimizer": "sgd"}]
)
def test_it_learns(data, options):
    module, x = _made(), data.tensors[0]
    fit = Fit(epochs=15, learning_rate=0.03, **options)
    done = optkit.finetune(module, QAT, _loader(data, shuffle=True), F.cross_entropy, fit=fit)
    assert done.losses[-1] < 0.75 * done.losses[0]
    with torch.no_grad():
        right = (done.trained.module(x).argmax(1) == data.tensors[1]).float().mean()
    assert right > 0.75


class _Kept(Progress):
    """What was said of each task: its name, its length and how often it advanced."""

    def __init__(self):
        self.tasks = []

    @contextlib.contextmanager
    def task(self, what, total=None):
        self.tasks.append([what, total, 0])
        yield self

    def advance(self, n=1):
        self.tasks[-1][2] += n


def test_each_epoch_says_how_far_it_is(data):
    kept = _Kept()
    optkit.finetune(_made(), QAT, _loader(data), F.cross_entropy, fit=Fit(epochs=2), progress=kept)
    assert kept.tasks == [["epoch 1 of 2", 3, 3], ["epoch 2 of 2", 3, 3]]


class _Stream(io.StringIO):
    """Takes what is written; a terminal or not."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_drawn_on_a_terminal_and_lines_elsewhere(data, terminal, monkeypatch):
    stream = _Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("optkit.progress._LINES", 0.0)
    optkit.finetune(_made(), QAT, _loader(data), F.cross_entropy, fit=Fit(epochs=1), progress=True)
    said = stream.getvalue()
    assert "epoch 1 of 1" in said
    assert ("━" in said) is terminal
    assert ("epoch 1 of 1: 3/3\n" in said) is not terminal


def test_what_is_wrapped_is_what_is_called(data):
    calls = []

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.inner = module

        def forward(self, x):
            calls.append(self.training)
            return self.inner(x)

    optkit.finetune(_made(), DISTIL, _loader(data), F.cross_entropy, fit=Fit(epochs=2), wrap=Wrapper)
    assert calls == [True] * 6


def test_a_file_that_is_no_checkpoint_of_this_training_is_refused(data, tmp_path):
    path = tmp_path / "c.pt"
    optkit.finetune(_made(), DISTIL, _loader(data), F.cross_entropy, fit=Fit(checkpoint=path))
    with pytest.raises(UsageError, match=r"c\.pt: not a checkpoint of this training") as caught:
        optkit.finetune(_made(), QAT, _loader(data), F.cross_entropy, fit=Fit(checkpoint=path))
    assert "remove the file" in str(caught.value.hint)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match=r"c\.pt: not a checkpoint of this training"):
        optkit.finetune(_made(), DISTIL, _loader(data), F.cross_entropy, fit=Fit(checkpoint=path))


def test_what_makes_no_sense_is_refused(data):
    for options, message in (
        ({"epochs": 0}, "epochs: 0 is less than 1"),
        ({"learning_rate": 0}, "not positive"),
        ({"warmup": 2.0}, "not a share of the steps"),
        ({"optimizer": "lion"}, "optimizer: 'lion' is not known"),
        ({"autocast": "int8"}, "autocast: 'int8' is not known"),
        ({"patience": 0}, "patience: 0 is less than 1"),
    ):
        with pytest.raises(UsageError, match=message):
            Fit(**options)
    with pytest.raises(UsageError, match="has no length"):
        optkit.finetune(_made(), DISTIL, (b for b in _loader(data)), F.cross_entropy)
    with pytest.raises(UsageError, match="the loader is empty"):
        optkit.finetune(_made(), DISTIL, [], F.cross_entropy)
    with pytest.raises(UsageError, match="patience needs evaluate="):
        optkit.finetune(_made(), DISTIL, _loader(data), F.cross_entropy, fit=Fit(patience=1))
    with pytest.raises(UsageError, match=r"something other than \(inputs, targets\)"):
        optkit.finetune(_made(), DISTIL, [torch.ones(2, 8)], F.cross_entropy)
    with pytest.raises(DataError, match="epoch 1: the loss is nan"):
        optkit.finetune(_made(), DISTIL, _loader(data), lambda y, t: F.cross_entropy(y, t) * math.nan)
