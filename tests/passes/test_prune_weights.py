"""Zeros in the weights of a module: which, when, and that they stay; held against NumPy and plain formulas."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from pydantic import ValidationError

torch = pytest.importorskip("torch", reason="needs the package torch")
pytest.importorskip("onnxscript", reason="needs the package onnxscript")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import optkit  # noqa: E402
from optkit.errors import PassError, UsageError  # noqa: E402
from optkit.passes.pruning.weights import PruneWeights  # noqa: E402


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.depth = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.group = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.hidden, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = F.gelu(self.group(self.depth(F.gelu(self.conv(x)))))
        return self.head(F.gelu(self.hidden(x.mean((2, 3)))))


# Those with at least 16 weights an output.
_LARGE = ("conv", "group", "head")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return _Net().eval()


@pytest.fixture
def x():
    return torch.randn(6, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def _session(module, x, steps=0, **options):
    recipe = {"recipe": 1, "passes": [{"prune-weights": options}]}
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    return optkit.training(
        module, recipe, example=(x,), steps=steps, loss=lambda y, _: F.cross_entropy(y, labels)
    )


def _array(module, path):
    return module.get_submodule(path).weight.detach().double().numpy()


def _train(session, module, x, steps, each=None):
    optimizer = torch.optim.SGD(session.parameters(), lr=0.1, momentum=0.9)
    for step in range(1, steps + 1):
        outputs = module(x)
        optimizer.zero_grad()
        session.loss(outputs.square().mean(), (x,), outputs).backward()
        optimizer.step()
        session.step()
        if each is not None:
            each(step)


def _share(module, path):
    return float((module.get_submodule(path).weight == 0).float().mean())


def test_the_smallest_of_each_layer_go_and_small_layers_stay(net, x):
    before = copy.deepcopy(net)
    _session(net, x, sparsity=0.75)
    for path in _LARGE:
        w = _array(before, path)
        limit = np.sort(np.abs(w), axis=None)[w.size * 3 // 4]
        np.testing.assert_array_equal(_array(net, path), np.where(np.abs(w) >= limit, w, 0))
    for path in ("depth", "hidden"):
        np.testing.assert_array_equal(_array(net, path), _array(before, path))


def test_the_smallest_of_all_layers_together(net, x):
    before = copy.deepcopy(net)
    _session(net, x, sparsity=0.5, scope="all")
    sizes = np.concatenate([np.abs(_array(before, path)).ravel() for path in _LARGE])
    limit = np.sort(sizes)[sizes.size // 2]
    for path in _LARGE:
        w = _array(before, path)
        np.testing.assert_array_equal(_array(net, path), np.where(np.abs(w) >= limit, w, 0))


def test_by_the_gradient(net, x):
    before, twin = copy.deepcopy(net), copy.deepcopy(net).double()
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    F.cross_entropy(twin(x.double()), labels).backward()
    _session(net, x, sparsity=0.5, criterion="taylor")
    for path in _LARGE:
        score = (_array(before, path) * twin.get_submodule(path).weight.grad.numpy()) ** 2
        kept = np.sort(score, axis=None)[score.size // 2 :]
        assert np.mean((_array(net, path) != 0) == (score >= kept[0])) > 0.995


def test_by_weights_times_inputs_within_an_output(net, x):
    before = copy.deepcopy(net)
    seen = {}
    for path in _LARGE:
        before.get_submodule(path).register_forward_pre_hook(lambda m, i, p=path: seen.__setitem__(p, i[0]))
    with torch.no_grad():
        before(x)
    _session(net, x, sparsity=0.5, criterion="wanda")
    for path in _LARGE:
        w, inputs = _array(before, path), seen[path].double().numpy()
        norm = np.sqrt((np.moveaxis(inputs, 1, 0).reshape(inputs.shape[1], -1) ** 2).sum(1))
        for out in range(w.shape[0]):
            # A grouped convolution sees the channels of its own half.
            mine = norm if path != "group" else norm.reshape(2, -1)[out // 4]
            score = np.abs(w[out]) * mine.reshape(-1, *[1] * (w.ndim - 2))
            kept = np.argsort(-score, axis=None)[: score.size // 2]
            assert set(np.flatnonzero(_array(net, path)[out])) == set(kept)


@pytest.mark.parametrize("criterion", ["magnitude", "sparsegpt"])
def test_two_of_each_four_input_channels_stay_and_training_leaves_them_there(net, x, criterion):
    session = _session(net, x, pattern="2:4", criterion=criterion)
    masks = {path: _array(net, path) != 0 for path in _LARGE}
    for mask in masks.values():
        assert np.all(np.moveaxis(mask, 1, -1).reshape(-1, 4).sum(1) == 2)
    _train(session, net, x, 3)
    assert [c.node for c in session.finish().changes["prune-weights"]] == list(_LARGE)
    for path, mask in masks.items():
        np.testing.assert_array_equal(_array(net, path) != 0, mask)


def _one_by_one(w, inputs, mask):
    """Algorithm 1 by its definition: each weight that goes is made up for by those behind it, with an inverse of its own."""
    hessian = inputs.T @ inputs
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    new = w.copy()
    for j in range(w.shape[1]):
        inverse = np.linalg.inv(hessian[j:, j:])
        for row in np.flatnonzero(~mask[:, j]):
            new[row, j:] -= new[row, j] / inverse[0, 0] * inverse[0]
            new[row, j] = 0
    return new


@pytest.mark.parametrize("pattern", ["any", "2:4"])
def test_sparsegpt_makes_up_for_what_goes(pattern):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 24))
    random = np.random.default_rng(0)
    inputs = random.standard_normal((512, 8)) @ random.standard_normal((8, 32))
    x = torch.as_tensor(inputs + 0.3 * random.standard_normal((512, 32)), dtype=torch.float32)
    inputs, w, plain = x.double().numpy(), _array(net, "0"), copy.deepcopy(net)
    options = {"sparsity": 0.5, "pattern": pattern}
    _session(net, x, criterion="sparsegpt", **options)
    _session(plain, x, **options)
    new = _array(net, "0")
    assert np.mean(new == 0) == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(new, _one_by_one(w, inputs, new != 0), rtol=1e-4, atol=1e-6)
    errors = [np.square(inputs @ (n - w).T).sum() for n in (new, _array(plain, "0"))]
    assert errors[0] < 0.4 * errors[1]


def test_sparsegpt_of_a_convolution_is_that_of_its_patches(net, x):
    before = copy.deepcopy(net)
    _session(net, x, criterion="sparsegpt", pattern="2:4", targets=("conv",))
    # Columns by position, then channel: neighbours are what the pattern is about.
    patches = (
        F.unfold(x, 3, padding=1)
        .movedim(1, 2)
        .reshape(-1, 4, 9)
        .movedim(1, 2)
        .reshape(-1, 36)
        .double()
        .numpy()
    )
    old, new = (np.moveaxis(_array(n, "conv").reshape(8, 4, 9), 1, 2).reshape(8, 36) for n in (before, net))
    np.testing.assert_allclose(new, _one_by_one(old, patches, new != 0), rtol=1e-4, atol=1e-6)


def test_a_schedule_rises_by_the_cubic_law(net, x):
    shares = {}
    session = _session(net, x, steps=20, sparsity=0.8, begin=0.1, end=0.6, every=2)
    assert _share(net, "conv") == 0
    _train(session, net, x, 20, lambda step: shares.__setitem__(step, _share(net, "conv")))
    for step, share in shares.items():
        # From step 2 to step 12, each second step.
        done = min(max(step - step % 2 - 2, 0), 10) / 10
        assert share == pytest.approx(0.8 * (1 - (1 - done) ** 3), abs=2 / 288), step


def test_rewinding_goes_back_to_an_early_step_with_ever_more_zeros(net, x):
    early, shares = {}, {}

    def look(step):
        if step == 2:
            early.update({n: p.detach().clone() for n, p in net.named_parameters()})
        if step in (5, 10, 15):
            shares[step] = _share(net, "conv")
            for name, value in net.named_parameters():
                mask = value != 0 if name.removesuffix(".weight") in _LARGE else 1
                torch.testing.assert_close(value.detach(), early[name] * mask, rtol=0, atol=0)

    session = _session(net, x, steps=20, sparsity=0.8, scope="all", rewind=0.1, rounds=3)
    _train(session, net, x, 20, look)
    assert list(shares) == [5, 10, 15]
    total = sum(_array(net, p).size for p in _LARGE)
    zeros = sum(int((_array(net, p) == 0).sum()) for p in _LARGE)
    assert zeros == pytest.approx(0.8 * total, abs=2)
    session.finish()


def test_masks_survive_a_checkpoint(net, x):
    twin = copy.deepcopy(net)
    session = _session(net, x, steps=10, sparsity=0.5, end=0.5, every=1)
    _train(session, net, x, 6)
    state, weights = session.state_dict(), copy.deepcopy(net.state_dict())
    other = _session(twin, x, steps=10, sparsity=0.5, end=0.5, every=1)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    assert other.steps == 6
    with torch.no_grad():
        twin.conv.weight.add_(1.0)
    other.step()
    assert _share(twin, "conv") == pytest.approx(0.5, abs=2 / 288)


def test_what_makes_no_sense_is_refused(net, x):
    for options, message in (
        ({"criterion": "wanda", "end": 0.5}, "looks at the example inputs once"),
        ({"begin": 0.5, "end": 0.4}, "begin must come before end"),
        ({"end": 0.5, "rewind": 0.1}, "rewind prunes in rounds"),
        ({"pattern": "2:4", "scope": "all"}, "the same in every layer"),
        ({"pattern": "4:4"}, "write any, or N:M"),
    ):
        with pytest.raises(ValidationError, match=message):
            PruneWeights(**options)
    with pytest.raises(PassError, match="pruned 0 layers"):
        _session(net, x, targets=("nothing",))
    with pytest.raises(UsageError, match="needs the number of steps"):
        _session(net, x, end=0.5)
    with pytest.raises(PassError, match="pruned 0 weights"):
        _session(net, x, steps=100, end=1.0, begin=0.5).finish()
    recipe = {"recipe": 1, "passes": [{"prune-weights": {"criterion": "taylor"}}]}
    with pytest.raises(UsageError, match="needs gradients"):
        optkit.training(net, recipe, example=(x,))
