"""Distillation: every loss against its formula in float64, teachers that stay as they are, layers that are found."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the package torch")
pytest.importorskip("onnxscript", reason="needs the package onnxscript")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import optkit  # noqa: E402
from optkit.errors import PassError, UsageError  # noqa: E402


class _Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.Conv2d(width, 6, 3, stride=2, padding=1),
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


def _made(width=8, seed=0):
    torch.manual_seed(seed)
    return _Net(width)


@pytest.fixture
def x():
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def _session(module, x, *passes, **options):
    return optkit.training(module, {"recipe": 1, "passes": list(passes)}, example=(x,), **options)


def _numbers(t):
    return t.detach().double().numpy()


def _softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_outputs_by_divergence_and_by_squares(x):
    student, teacher = _made(), _made(seed=1)
    a, b = student(x), teacher(x)
    p, q = _softmax(_numbers(b) / 3), _softmax(_numbers(a) / 3)
    session = _session(student, x, {"distil": {"temperature": 3.0, "weight": 0.7}}, teacher=teacher)
    expected = 0.3 * 2.0 + 0.7 * 9 * (p * (np.log(p) - np.log(q))).sum(-1).mean()
    assert session.loss(torch.tensor(2.0), (x,), a).item() == pytest.approx(expected, rel=1e-5)
    session = _session(student, x, {"distil": {"loss": "mse", "weight": 2.0}}, teacher=teacher)
    expected = 2 * np.square(_numbers(a) - _numbers(b)).mean()
    assert session.loss(torch.tensor(2.0), (x,), a).item() == pytest.approx(expected, rel=1e-5)


def test_the_teacher_is_a_copy_that_nothing_changes(x):
    student, teacher = _made(), _made(seed=1).train()
    before = copy.deepcopy(teacher.state_dict())
    session = _session(student, x, {"distil": {}}, teacher=teacher)
    outputs = student(x)
    session.loss(outputs.sum(), (x,), outputs).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert teacher.training
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert len(session.parameters()) == len(list(student.parameters()))


def test_without_a_teacher_it_is_the_module_before_the_passes_behind(x):
    module = _made(width=32)
    before = copy.deepcopy(module).eval()
    session = _session(module, x, {"distil": {"loss": "mse", "weight": 1.0}}, {"prune-structured": {}})
    assert module.first.out_channels == 16
    outputs = module(x)
    expected = np.square(_numbers(outputs) - _numbers(before(x))).mean()
    assert session.loss(torch.tensor(5.0), (x,), outputs).item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_written_into_the_same_tensor_is_another_batch(x):
    student, teacher = _made(), _made(seed=1).eval()
    session = _session(student, x, {"distil": {"loss": "mse", "weight": 1.0}}, teacher=teacher)
    buffer = x.clone()
    for _ in range(2):
        outputs = student(buffer)
        expected = np.square(_numbers(outputs) - _numbers(teacher(buffer))).mean()
        assert session.loss(torch.tensor(0.0), (buffer,), outputs).item() == pytest.approx(expected, rel=1e-5)
        buffer.mul_(-2.0)


def test_the_average_of_itself_follows_slowly(x):
    module = _made()
    session = _session(
        module, x, {"distil": {"teacher": "average", "decay": 0.9, "loss": "mse", "weight": 1.0}}
    )
    mean = {n: _numbers(p) for n, p in module.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1)
        session.step()
        mean = {n: 0.9 * mean[n] + 0.1 * _numbers(p) for n, p in module.named_parameters()}
    twin = copy.deepcopy(module).double()
    twin.load_state_dict({n: torch.as_tensor(v) for n, v in mean.items()})
    outputs = module(x)
    expected = np.square(_numbers(outputs) - _numbers(twin(x.double()))).mean()
    assert session.loss(torch.tensor(0.0), (x,), outputs).item() == pytest.approx(expected, rel=1e-4)
    state = session.state_dict()
    again = _session(
        _made(), x, {"distil": {"teacher": "average", "decay": 0.9, "loss": "mse", "weight": 1.0}}
    )
    again.module.load_state_dict(module.state_dict())
    again.load_state_dict(state)
    assert again.loss(torch.tensor(0.0), (x,), outputs).item() == pytest.approx(expected, rel=1e-4)


def test_assistants_come_first_the_smallest_of_them_at_the_start(x):
    student, teacher, large, small = (_made(seed=s).eval() for s in range(4))
    options = {"distil": {"loss": "mse", "weight": 1.0, "progressive": True}}
    session = _session(student, x, options, teacher=teacher, assistants=[large, small], steps=6)
    outputs = student(x)
    for step, expected in enumerate([small, small, large, large, teacher, teacher]):
        distance = np.square(_numbers(outputs) - _numbers(expected(x))).mean()
        assert session.loss(torch.tensor(0.0), (x,), outputs).item() == pytest.approx(distance, rel=1e-5), (
            step
        )
        session.step()
    with pytest.raises(UsageError, match="needs assistants"):
        _session(student, x, options, teacher=teacher)


def _maps(module, x, *layers):
    found = {}
    for name in layers:
        module.get_submodule(name).register_forward_hook(
            lambda m, i, o, n=name: found.__setitem__(n, _numbers(o))
        )
    module(x)
    return [found[n] for n in layers]


def test_features_through_a_learned_projection(x):
    student, teacher = _made(width=4), _made(width=8, seed=1).eval()
    session = _session(student, x, {"distil-features": {"weight": 0.5}}, teacher=teacher)
    (projection,) = (p for p in session.parameters() if p.shape == (8, 4, 1, 1))
    a1, a2 = _maps(copy.deepcopy(student), x, "first", "second")
    b1, b2 = _maps(copy.deepcopy(teacher), x, "first", "second")
    projected = np.einsum("oi,nihw->nohw", _numbers(projection)[:, :, 0, 0], a1)
    terms = [np.square(p - b).mean() / np.square(b).mean() for p, b in ((projected, b1), (a2, b2))]
    outputs = student(x)
    loss = session.loss(torch.tensor(1.0), (x,), outputs)
    assert loss.item() == pytest.approx(1.0 + 0.5 * np.mean(terms), rel=1e-5)
    loss.backward()
    assert projection.grad is not None
    changes = session.finish().changes["distil-features"]
    assert [c.node for c in changes] == ["first", "second"]
    assert not student.first._forward_hooks


def test_attention_and_similarity(x):
    student, teacher = _made(width=4), _made(width=8, seed=1).eval()
    (a,), (b,) = _maps(copy.deepcopy(student), x, "first"), _maps(copy.deepcopy(teacher), x, "first")

    def unit(z):
        return z / np.linalg.norm(z, axis=1, keepdims=True)

    maps = [unit(np.square(z).mean(1).reshape(len(z), -1)) for z in (a, b)]
    grams = [unit(z.reshape(len(z), -1) @ z.reshape(len(z), -1).T) for z in (a, b)]
    for kind, expected in (
        ("attention", np.square(maps[0] - maps[1]).sum(1).mean()),
        ("similarity", np.square(grams[0] - grams[1]).mean()),
    ):
        options = {"distil-features": {"kind": kind, "layers": ["first"]}}
        session = _session(student, x, options, teacher=teacher)
        loss = session.loss(torch.tensor(0.0), (x,), student(x)).item()
        assert loss == pytest.approx(expected, rel=1e-4), kind


def test_two_passes_share_a_teacher(x):
    student, teacher = _made(width=4), _made(width=8, seed=1).eval()
    passes = [{"distil-features": {"kind": k, "layers": ["first"]}} for k in ("attention", "similarity")]
    one, other = (_session(student, x, p, teacher=teacher) for p in passes)
    both = _session(student, x, *passes, teacher=teacher)
    losses = [s.loss(torch.tensor(0.0), (x,), student(x)).item() for s in (one, other, both)]
    assert losses[2] == pytest.approx(losses[0] + losses[1], rel=1e-5)


def test_named_inputs(x):
    student, teacher = _made(), _made(seed=1).eval()
    recipe = {"recipe": 1, "passes": [{"distil": {"loss": "mse", "weight": 1.0}}]}
    session = optkit.training(student, recipe, example={"x": x}, teacher=teacher)
    outputs = student(x=x)
    expected = np.square(_numbers(outputs) - _numbers(teacher(x))).mean()
    assert session.loss(torch.tensor(0.0), {"x": x}, outputs).item() == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_learned_is_refused(x):
    student, other = _made(), nn.Sequential(nn.Flatten(), nn.Linear(108, 7))
    with pytest.raises(UsageError, match="the teacher is the student itself"):
        _session(student, x, {"distil": {}}, teacher=student)
    session = _session(student, x, {"distil": {}}, teacher=other)
    with pytest.raises(PassError, match=r"gives \[4, 5\], its teacher \[4, 7\]"):
        session.loss(torch.tensor(0.0), (x,), student(x))
    with pytest.raises(PassError, match="distil-features: no layer of the module and its teacher"):
        _session(student, x, {"distil-features": {}}, teacher=other)
    with pytest.raises(PassError, match=r"Sequential has no layer 'nowhere'"):
        _session(student, x, {"distil-features": {"layers": ["first=nowhere"]}}, teacher=other)
    with pytest.raises(PassError, match="cannot be compared"):
        _session(student, x, {"distil-features": {"layers": ["first=second"]}}, teacher=_made())
