"""A session in a loop of the user's own: what it takes, what it refuses, that it never waits and that it comes back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import optkit
from optkit.errors import PassError, RecipeError, UsageError


class _Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.last, self.head = nn.Conv2d(width, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(F.relu(self.last(F.relu(self.norm(self.conv(x))))).mean((2, 3)))


@pytest.fixture
def x():
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


QAT = {"quantize-aware": {"freeze_layers": 0.5}}
GRADUAL = {"prune-weights": {"sparsity": 0.5, "end": 0.6, "every": 1}}
ALL = {
    "gradual": [GRADUAL],
    "lottery": [{"prune-weights": {"rewind": 0.1, "rounds": 1, "scope": "all"}}],
    "distil": [{"distil": {"teacher": "average"}}, {"distil-features": {"layers": ["conv"]}}],
    "everything": [{"distil": {}}, {"prune-structured": {}}, {"prune-weights": {"sparsity": 0.5}}, QAT],
}


def _session(module, x, passes=(GRADUAL,), steps=10, **options):
    return optkit.training(module, {"recipe": 1, "passes": list(passes)}, example=x, steps=steps, **options)


def _step(session, module, x, optimizer):
    outputs = module(x)
    loss = session.loss(outputs.square().mean(), (x,), outputs)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    session.step()
    return loss


class _Watch(TorchDispatchMode):
    """Lists operators for which a device has to be waited for."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "item",
            "is_nonzero",
            "nonzero",
            "equal",
        ):
            self.waits.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("passes", ALL)
def test_steps_never_wait_for_the_device(x, passes):
    module = _Net().train()
    session = _session(module, x, ALL[passes])
    optimizer = torch.optim.SGD(session.parameters(), lr=0.01)
    with _Watch() as watch:
        for _ in range(10):
            _step(session, module, x, optimizer)
    assert watch.waits == []
    session.finish()


def test_the_watch_sees_what_waits():
    with _Watch() as watch:
        torch.ones(()).item()
    assert watch.waits


@pytest.mark.parametrize("passes", ALL)
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(x, passes):
    def start(module):
        session = _session(module, x, ALL[passes])
        return session, torch.optim.SGD(session.parameters(), lr=0.05, momentum=0.9)

    torch.manual_seed(3)
    first = _Net().train()
    twin = copy.deepcopy(first)
    session, optimizer = start(first)
    torch.manual_seed(4)
    for _ in range(7):
        _step(session, first, x, optimizer)
    saved = copy.deepcopy((first.state_dict(), session.state_dict(), optimizer.state_dict()))
    expected = [_step(session, first, x, optimizer).item() for _ in range(3)]
    other, again = start(twin)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    assert [_step(other, twin, x, again).item() for _ in range(3)] == expected
    a, b = session.finish().module.state_dict(), other.finish().module.state_dict()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_a_checkpoint_of_another_recipe_is_refused(x):
    state = _session(_Net(), x).state_dict()
    with pytest.raises(UsageError, match="is of a session with prune-weights, this one has quantize-aware"):
        _session(_Net(), x, [QAT]).load_state_dict(state)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping", "batches"])
def test_examples_in_any_form(x, kind):
    example = {"tensor": x, "tuple": (x,), "mapping": {"x": x}, "batches": [x, (x,), {"x": x}]}[kind]
    module = _Net()
    _session(module, example, [{"prune-structured": {}}])
    assert module.conv.out_channels == 16


def test_steps_of_an_optimizer_count_by_themselves_but_not_those_left_out(x):
    module = _Net().train()
    session = _session(module, x)
    optimizer = torch.optim.SGD(session.parameters(), lr=0.01)
    handle = session.follow(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(module(x).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert session.steps == 2
    handle.remove()
    optimizer.step()
    assert session.steps == 2


def test_every_parameter_once_and_small_ones_do_not_decay(x):
    module = _Net()
    session = _session(module, x, [QAT, {"distil-features": {"layers": ["conv=last"]}}], teacher=_Net(16))
    found = session.parameters()
    assert len({id(p) for p in found}) == len(found)
    assert {id(p) for p in module.parameters()} < {id(p) for p in found}
    decayed, others = session.groups(0.1)
    assert [decayed["weight_decay"], others["weight_decay"]] == [0.1, 0.0]
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(found)


@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.*:DeprecationWarning"
)  # torch's own, in torch.compile
@pytest.mark.parametrize("passes", [QAT, GRADUAL], ids=["qat", "gradual"])
def test_a_compiled_module_trains_as_the_module_does(x, passes):
    torch.manual_seed(0)
    plain = _Net().train()
    other = copy.deepcopy(plain)
    losses = []
    for module, wrap in ((plain, lambda m: m), (other, lambda m: torch.compile(m, backend="aot_eager"))):
        session = _session(module, x, [passes], steps=4)
        called = wrap(module)
        optimizer = torch.optim.SGD(session.parameters(), lr=0.05)
        losses.append([_step(session, called, x, optimizer).item() for _ in range(4)])
        session.finish()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(plain(x), other(x), rtol=1e-3, atol=1e-3)


def test_a_session_ends_once(x):
    module = _Net()
    session = _session(module, x, [{"prune-structured": {}}])
    session.finish()
    for call in (session.finish, session.step, lambda: session.loss(torch.tensor(0.0), (x,), None)):
        with pytest.raises(UsageError, match="the session is finished"):
            call()


def test_parameters_that_were_replaced_behind_its_back_are_noticed(x):
    module = _Net()
    session = _session(module, x)
    module.head = nn.Linear(16, 4)
    with pytest.raises(UsageError, match="not those that the session was made with") as caught:
        session.loss(torch.tensor(0.0), (x,), module(x))
    assert "fully_shard" in str(caught.value.hint)
    with pytest.raises(UsageError, match="not those that"):
        session.finish()


def test_what_makes_no_sense_is_refused(x):
    with pytest.raises(RecipeError, match="no pass over a torch module"):
        optkit.training(_Net(), "int8-static", example=x)
    with pytest.raises(UsageError, match="steps: -1 is negative"):
        _session(_Net(), x, steps=-1)
    for example in ((), [], [()]):
        with pytest.raises(UsageError, match="no example inputs"):
            _session(_Net(), example)
    with pytest.raises(PassError, match=r"prune-structured: nothing would be pruned"):
        _session(_Net(16), x, [{"prune-structured": {}}])


def test_a_graph_and_a_recipe_for_modules_are_refused_before_any_work(tmp_path):
    with pytest.raises(
        RecipeError, match=r"quantize-aware: works on a PyTorch module, but x\.onnx is already a graph"
    ):
        optkit.compile(tmp_path / "x.onnx", recipe="int8-qat", out=tmp_path / "out")


def test_a_module_and_a_recipe_for_training_name_the_session(x, tmp_path):
    with pytest.raises(RecipeError, match="quantize-aware: trains a module") as caught:
        optkit.compile(_Net(), inputs=x, recipe="int8-qat", out=tmp_path / "out")
    assert "optkit.training" in str(caught.value.hint)


@pytest.mark.parametrize("wanted", [1.3, 1000.0])
def test_a_speed_up_is_reached_before_training_or_refused(wanted):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 768), nn.Linear(768, 768), nn.Linear(768, 8)

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    module, x = Wide(), torch.randn(4, 64)
    before = copy.deepcopy(module)
    passes = [{"prune-structured": {"speedup": wanted}}]
    if wanted > 100:
        with pytest.raises(optkit.errors.LimitMissedError, match="1000x was asked for"):
            _session(module, x, passes, backend="onnxruntime")
        torch.testing.assert_close(module(x), before(x), rtol=0, atol=0)
        return
    _session(module, x, passes, backend="onnxruntime")
    widths = [module.a.out_features, module.b.out_features]
    assert any(w < 768 for w in widths)
    assert all(w % 16 == 0 for w in widths)
