"""Architecture search, held against brute force, NumPy's decompositions and modules changed by hand."""

from __future__ import annotations

import contextlib
import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the package torch")
pytest.importorskip("onnxscript", reason="needs the package onnxscript")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import optkit  # noqa: E402
from optkit import training_start  # noqa: E402
from optkit.errors import BackendUnavailableError, LimitMissedError, PassError  # noqa: E402
from optkit.graph import count_parameters  # noqa: E402
from optkit.passes.architecture.evolve import Judged, evolve  # noqa: E402
from optkit.passes.architecture.space import Convolution, Depth, Form, Width  # noqa: E402
from optkit.passes.architecture.twin import centre, separable  # noqa: E402


def _conv(i, o, k=3, **options):
    return nn.Sequential(
        nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(o), nn.ReLU()
    )


class _Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.a, self.b = _conv(width, inner), _conv(inner, width)

    def forward(self, x):
        return x + self.b(self.a(x))


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.wide = _conv(3, 32, 5), _Block(32, 48), _conv(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.wide(self.block(self.stem(x))).mean((2, 3)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def counted(monkeypatch):
    """Speed by the number of weights, in place of a clock."""

    @contextlib.contextmanager
    def race(batch, context, engine, whole):
        full = count_parameters(whole)
        yield lambda model: SimpleNamespace(ratio=full / count_parameters(model))

    monkeypatch.setattr(training_start, "_race", race)


def _batches(n=3):
    return [(torch.randn(8, 3, 12, 12),) for _ in range(n)]


def _searched(module, *, batches=None, **options):
    given = {"search-architecture": {"trials": 4, "tune": 4, "multiple": 8, **options}}
    recipe = {"recipe": 1, "passes": [given]}
    return optkit.training(module, recipe, example=batches or _batches())


def _space(module, **options):
    """The choices of a search."""
    from optkit.passes.architecture import work

    seen = []

    def made(*arguments, **more):
        seen.append(space(*arguments, **more))
        raise PassError("seen")

    space = work.space
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "space", made)
        with pytest.raises(PassError, match="seen"):
            _searched(module, **options)
    return seen[0]


def test_the_evolution_finds_what_brute_force_finds():
    sizes = (4, 3, 3, 2, 2)
    cost = [np.linspace(1, 0.2, n) for n in sizes]
    worth = np.random.default_rng(0).uniform(0.2, 1, len(sizes))

    def judge(genome):
        speed = len(sizes) / sum(c[g] for c, g in zip(cost, genome, strict=True))
        close = 1 - sum(w * (g / (n - 1)) ** 2 for w, g, n in zip(worth, genome, sizes, strict=True)) / 5
        return Judged(genome=genome, speedup=speed, closeness=close if speed >= 1.5 else None)

    everything = [judge(g) for g in itertools.product(*map(range, sizes))]
    best = max(j.closeness for j in everything if j.closeness is not None)
    kinds = ("a", "a", "b", "b", "c")
    found = evolve(kinds, sizes, lambda g: g, judge, trials=70, population=8, seed=0)
    assert len(found) == len({j.genome for j in found}) == 70
    assert found[0].closeness == best
    assert found == sorted(found, key=lambda j: j.rank, reverse=True)
    again = evolve(kinds, sizes, lambda g: g, judge, trials=70, population=8, seed=0)
    assert found == again


def test_what_is_fast_enough_comes_before_what_is_faster_than_the_others():
    near, far, good = Judged(genome=(1,), speedup=1.9), Judged(genome=(2,), speedup=1.2), None
    good = Judged(genome=(3,), speedup=2.0, closeness=-1.0)
    assert max((near, far, good), key=lambda j: j.rank) is good
    assert max((near, far), key=lambda j: j.rank) is near


def test_the_evolution_ends_where_all_genomes_were_tried():
    found = evolve(
        ("a", "a"),
        (2, 2),
        lambda g: g,
        lambda g: Judged(genome=g, speedup=1.0),
        trials=50,
        population=4,
        seed=0,
    )
    assert sorted(j.genome for j in found) == [(0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("stride", [1, 2])
def test_the_centre_of_a_kernel_is_the_kernel_with_its_border_at_zero(stride):
    layer = nn.Conv2d(4, 6, (5, 3), stride, padding=(2, 1), groups=2)
    with torch.no_grad():
        made = centre(layer, (3, 1))
        small = made(x := torch.randn(2, 4, 11, 9))
        layer.weight[:, :, [0, 4], :] = 0
        layer.weight[:, :, :, [0, 2]] = 0
        torch.testing.assert_close(small, layer(x))


def test_a_separable_convolution_is_exact_where_the_plain_one_is_such_a_product():
    layer = nn.Conv2d(4, 6, 3, 2, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("oi,ixy->oixy", torch.randn(6, 4), torch.randn(4, 3, 3)))
        made = separable(layer)
        x = torch.randn(2, 4, 9, 9)
        torch.testing.assert_close(made(x), layer(x), atol=1e-5, rtol=1e-5)
    assert [c.groups for c in made] == [4, 1]


def test_a_separable_convolution_is_as_near_as_any_of_rank_one():
    layer = nn.Conv1d(3, 7, 5, padding=2, bias=False)
    with torch.no_grad():
        depth, point = separable(layer)
        nearest = (point.weight[:, :, 0, None] * depth.weight[:, 0]).double()
        missing = (nearest - layer.weight).square().sum((0, 2)).numpy()
    for index in range(3):
        values = np.linalg.svd(layer.weight[:, index].detach().numpy().astype(np.float64), compute_uv=False)
        assert missing[index] == pytest.approx(np.square(values[1:]).sum(), rel=1e-5)


def test_the_choices_are_the_widths_blocks_and_convolutions_that_may_change(counted):
    found = _space(_Net()).choices
    widths = {c.name: c.options for c in found if isinstance(c, Width)}
    assert set(widths) == {"stem.0.weight", "block.a.0.weight", "wide.0.weight"}
    assert widths["block.a.0.weight"] == (48, 40, 32, 16, 8)
    # a and b of the block change the width; wide does not, nor does the block.
    assert [c.name for c in found if isinstance(c, Depth)] == ["block", "wide"]
    forms = {c.name: [str(f) for f in c.options] for c in found if isinstance(c, Convolution)}
    assert forms["stem.0"] == ["5x5", "3x3", "separable 5x5", "1x1"]
    assert forms["block.a.0"] == forms["wide.0"] == ["3x3", "separable 3x3", "1x1"]


def test_targets_and_choices_narrow_what_may_change(counted):
    found = _space(_Net(), choices=["width", "kernel"], targets=["block*"]).choices
    # The stem's channels are the block's too: they carry the residual.
    assert [c.name for c in found] == ["stem.0.weight", "block.a.0.weight", "block.a.0", "block.b.0"]
    assert found[-1].options == (Form(kernel=(3, 3)), Form(kernel=(1, 1)))


def test_changes_inside_of_a_block_that_is_left_out_are_no_other_architecture(counted):
    found = _space(_Net())
    at = {c.name: i for i, c in enumerate(found.choices)}
    genome = [1] * len(found.choices)
    genome[at["wide"]] = 0
    repaired = found.repaired(tuple(genome))
    assert repaired[at["block.a.0.weight"]] == repaired[at["block.a.0"]] == repaired[at["block.b.0"]] == 0
    assert repaired[at["block"]] == repaired[at["stem.0.weight"]] == repaired[at["wide.0"]] == 1


def test_units_on_both_sides_of_a_block_left_out_are_the_same_ones(counted):
    from optkit.passes.architecture.twin import become

    fresh = _Net().eval()
    found = _space(copy.deepcopy(fresh))
    module = copy.deepcopy(fresh)
    at = {c.name: i for i, c in enumerate(found.choices)}
    genome = [0] * len(found.choices)
    genome[at["wide"]], genome[at["stem.0.weight"]] = 1, 2
    batch = _batches(1)[0]
    assert become(found, tuple(genome), module, batch) is None
    gone = found.choices[at["stem.0.weight"]].gone(2)
    value = next(v for v in found.found.weights if v.name == "stem.0.weight")
    stays = [
        i
        for i, u in enumerate(found.found.labels.roots(found.found.axes[value][0]).tolist())
        if u not in gone
    ]
    with torch.no_grad():
        # By hand: the units that go are 0 wherever they are made, and the block is not there.
        y = fresh.stem(batch[0])
        mask = torch.zeros(32)
        mask[stays] = 1
        y = y * mask[None, :, None, None]
        y = (y + fresh.block.b(fresh.block.a(y))) * mask[None, :, None, None]
        expected = fresh.head(y.mean((2, 3)))
        torch.testing.assert_close(module(batch[0]), expected, atol=1e-5, rtol=1e-4)


def test_the_module_takes_the_architecture_and_the_weights_that_were_judged(counted):
    module = _Net().eval()
    before = sum(p.numel() for p in module.parameters())
    batches = _batches()
    wanted = copy.deepcopy(module)(batches[-1][0]).detach()
    session = _searched(module, batches=batches, speedup=2.0)
    after = sum(p.numel() for p in module.parameters())
    assert before / after > 1.9
    assert all(p.requires_grad for p in session.parameters())
    changes = session.finish().changes["search-architecture"]
    explained = float(changes[0].detail.split("x, ")[1].split(" ")[0])
    with torch.no_grad():
        missed = F.mse_loss(module.eval()(batches[-1][0]), wanted) / wanted.var(correction=0)
    assert 1 - float(missed) == pytest.approx(explained, abs=2e-3)


def test_the_same_seed_finds_the_same_and_random_numbers_stay_as_they_were(counted):
    module, batches = _Net().eval(), _batches()
    state, found = torch.get_rng_state(), []
    for _ in range(2):
        twin = copy.deepcopy(module)
        _searched(twin, batches=batches, trials=2)
        found.append(twin.state_dict())
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_the_speed_is_that_of_compiled_graphs_timed_in_turn():
    module = _Net().eval()
    session = _searched(module, speedup=1.2, trials=2, choices=["width"])
    changes = session.finish().changes["search-architecture"]
    assert all(c.node.endswith(".weight") and "units (" in c.detail for c in changes)
    assert float(changes[0].detail.split("(")[1].split("x")[0]) >= 1.2


def test_a_speed_that_no_architecture_has_is_a_missed_limit_that_says_how_far_it_got(counted):
    with pytest.raises(
        LimitMissedError, match=r"search-architecture: 500x was asked for, and the fastest of \d+ .* reaches"
    ):
        _searched(_Net(), speedup=500, trials=2)


def test_outputs_that_are_too_far_away_are_a_missed_limit(counted):
    with pytest.raises(
        LimitMissedError, match=r"explains -?\d\.\d+ of the variance of the outputs, and 1 was asked for"
    ):
        _searched(_Net(), closeness=1.0, trials=1)


def test_a_module_without_choices_is_refused(counted):
    with pytest.raises(PassError, match="nothing to choose: Linear has no depth or kernel"):
        optkit.training(
            nn.Linear(4, 4),
            {"recipe": 1, "passes": [{"search-architecture": {"choices": ["depth", "kernel"]}}]},
            example=torch.randn(2, 4),
        )


def test_a_target_that_is_not_this_machine_is_refused_before_anything_is_built():
    with pytest.raises(BackendUnavailableError, match="h100"):
        optkit.training(
            _Net(),
            {"recipe": 1, "passes": ["search-architecture"]},
            example=_batches(),
            target="h100",
            backend="onnxruntime",
        )


class _Peeks(nn.Module):
    """Reads a weight of its convolution by name, so that this one must stay what it is."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(F.conv2d(x, self.conv.weight, self.conv.bias, padding=1).mean((2, 3)))


def test_an_architecture_that_the_code_of_the_module_cannot_follow_is_not_taken(counted):
    with pytest.raises(
        LimitMissedError, match="none of 1 architectures runs: 'Sequential' object has no attribute 'weight'"
    ):
        _searched(_Peeks(), choices=["separable"], trials=3)
