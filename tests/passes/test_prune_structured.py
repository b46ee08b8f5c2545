"""Structured pruning of torch modules, held against the unpruned module with the lost weights at 0."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the package torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import optkit  # noqa: E402
from optkit.errors import PassError, UsageError  # noqa: E402


def _conv(i, o, k=3, **options):
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(o))


class _Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = _conv(3, 16), _conv(16, 24), _conv(24, 16), _conv(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        x = F.relu(x + self.c(x))
        return self.head(x.mean((2, 3)))


class _Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = _conv(3, 8), _conv(8, 12), _conv(20, 16)
        self.head = nn.Linear(36, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.a(x))], 1)
        x = torch.cat([F.relu(self.b(x)), x], 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class _Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = _conv(3, 16), _conv(16, 24, groups=4), _conv(24, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head((x + self.b(F.relu(self.a(x)))).mean((2, 3)))


class _Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.up, self.depth, self.down = (
            _conv(3, 8), _conv(8, 32, 1), _conv(32, 32, groups=32), _conv(32, 8, 1),
        )  # fmt: skip
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.hardswish(self.stem(x))
        y = F.relu6(self.depth(F.relu6(self.up(x))))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return self.head((x + self.down(y)).mean((2, 3)))


class _Multiplied(nn.Module):
    """A depthwise convolution with two outputs a channel."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class _UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = _conv(3, 8), _conv(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.c, self.out = _conv(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.b(F.max_pool2d(a, 2)))
        y = F.relu(self.c(torch.cat([a, self.up(b)], 1)))
        return self.out(F.interpolate(y, scale_factor=2.0))


class _Shuffle(nn.Module):
    """Halves of the channels, one of them changed, as in C2f and ShuffleNet."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = _conv(3, 16, 1), _conv(8, 8), _conv(24, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        left, right = self.a(x).chunk(2, 1)
        return self.head(self.c(torch.cat([left, right, F.silu(self.b(right))], 1)).mean((2, 3)))


class _Attention(nn.Module):
    """Heads in four linear layers; keys and values may have fewer."""

    def __init__(self, width=16, heads=4, kv_heads=4):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, 8
        self.q = nn.Linear(width, heads * 8)
        self.k, self.v = nn.Linear(width, kv_heads * 8), nn.Linear(width, kv_heads * 8)
        self.out = nn.Linear(heads * 8, width)

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(n, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(n, t, self.kv_heads, self.head_dim).transpose(1, 2)
        each = self.heads // self.kv_heads
        k, v = (y[:, :, None].expand(-1, -1, each, -1, -1).flatten(1, 2) for y in (k, v))
        y = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        return self.out(y.transpose(1, 2).reshape(n, t, self.heads * self.head_dim))


class _Encoder(nn.Module):
    def __init__(self, kv_heads=4):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = _Attention(kv_heads=kv_heads)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x[:, 0])


class _Fused(nn.Module):
    """Queries, keys and values of one linear layer, and torch's own attention."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(16, 96), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, self.num_heads * 8)
        return self.head(x + self.proj(y))


class _Merged(nn.Module):
    """Heads merged into the batch, as fairseq had it."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.embed_dim = 4, 8, 32
        self.q, self.k, self.v, self.out = (nn.Linear(*s) for s in ((16, 32), (16, 32), (16, 32), (32, 16)))
        self.head = nn.Linear(16, 3)

    def _split(self, x):
        n, t, _ = x.shape
        x = x.view(n, t, self.num_heads, self.head_dim).transpose(1, 2)
        return x.reshape(n * self.num_heads, -1, self.head_dim)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self._split(self.q(x)), self._split(self.k(x)), self._split(self.v(x))
        y = torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1)
        y = torch.bmm(y.view(n, self.num_heads, t, t).view(n * self.num_heads, t, t), v)
        y = y.view(n, self.num_heads, t, self.head_dim).transpose(1, 2).reshape(n, t, self.embed_dim)
        return self.head(x + self.out(y))


class _Gated(nn.Module):
    """A gated feed-forward part, once as two layers and once as halves of one."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self.both, self.out = nn.Linear(8, 32), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        a, b = self.both(x).chunk(2, -1)
        return x + self.out(F.silu(a) * b)


class _Bank(nn.Module):
    """Weights of four experts."""

    def __init__(self, outs, ins):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, outs, ins))


class _Experts(nn.Module):
    """A feed-forward part whose weights are chosen for each token."""

    def __init__(self):
        super().__init__()
        self.up, self.down = _Bank(24, 8), _Bank(8, 24)

    def forward(self, x):
        chosen = x[..., :4].argmax(-1)
        y = F.relu(self.up.weight[chosen] @ x[..., None])
        return x + (self.down.weight[chosen] @ y)[..., 0]


class _Temporal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding=2, dilation=2)
        self.norm, self.prelu = nn.BatchNorm1d(16), nn.PReLU(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.prelu(self.norm(self.a(x)))
        return self.head((x + F.relu(self.b(x))).amax(2))


class _Flattened(nn.Module):
    """A linear layer on all positions of a picture: channels are blocks of its inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.hidden, self.head = nn.Linear(12 * 4, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.b(F.relu(self.a(x)))), 4)
        return self.head(F.relu(self.hidden(x.flatten(1))))


_PICTURE = (2, 3, 8, 8)
# Module, shape of the input, and for some weights the shape that half of the units leaves.
CASES = {
    "residual": (_Residual, _PICTURE, {"stem.0": (8, 3, 3, 3), "a.0": (12, 8, 3, 3), "c.0": (8, 8, 1, 1)}),
    "dense": (_Dense, _PICTURE, {"stem.0": (4, 3, 3, 3), "b.0": (8, 10, 3, 3), "head": (5, 18)}),
    "grouped": (_Grouped, _PICTURE, {"a.0": (12, 2, 3, 3), "b.0": (8, 12, 1, 1)}),
    "depthwise": (_Depthwise, _PICTURE, {"depth.0": (16, 1, 3, 3), "squeeze": (4, 16, 1, 1)}),
    "multiplied": (_Multiplied, _PICTURE, {"a": (4, 3, 3, 3), "b": (8, 1, 3, 3), "c": (4, 8, 1, 1)}),
    "unet": (_UNet, _PICTURE, {"up": (8, 4, 2, 2), "c.0": (4, 8, 3, 3)}),
    "shuffle": (_Shuffle, _PICTURE, {"a.0": (8, 3, 1, 1), "b.0": (4, 4, 3, 3)}),
    "encoder": (_Encoder, (2, 5), {"attention.q": (16, 16), "attention.out": (16, 16), "up": (16, 16)}),
    "grouped heads": (
        lambda: _Encoder(kv_heads=2), (2, 5),
        {"attention.q": (16, 16), "attention.k": (8, 16), "attention.out": (16, 16)},
    ),
    "fused heads": (_Fused, (2, 5, 16), {"qkv": (48, 16), "proj": (16, 16)}),
    "heads in the batch": (_Merged, (2, 5, 16), {"q": (16, 16), "v": (16, 16), "out": (16, 16)}),
    "gated": (_Gated, (2, 5, 8), {"gate": (12, 8), "down": (8, 12), "both": (16, 8), "out": (8, 8)}),
    "experts": (_Experts, (2, 5, 8), {"up": (4, 12, 8), "down": (4, 8, 12)}),
    "temporal": (_Temporal, (2, 4, 12), {"a": (8, 4, 3), "b": (8, 8, 3)}),
    "flattened": (_Flattened, _PICTURE, {"b": (6, 4, 3, 3), "hidden": (8, 24)}),
}  # fmt: skip


def _random(make, seed=0):
    """A module with values everywhere, none of them twice in a tensor."""
    torch.manual_seed(seed)
    module = make()
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            steps = torch.randperm(tensor.numel()).reshape(tensor.shape) / tensor.numel()
            tensor.data.copy_((0.1 + 0.5 * steps) * torch.where(torch.rand_like(tensor) < 0.5, -1.0, 1.0))
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.abs_().add_(0.5)
    return module.eval()


def _input(shape, seed=1):
    torch.manual_seed(seed)
    return torch.randint(0, 20, shape) if len(shape) == 2 else torch.randn(shape)


def _prune(module, x, **options):
    settings = {"multiple": 1, "ratio": 0.5, **options}
    recipe = {"recipe": 1, "passes": [{"prune-structured": settings}]}
    return optkit.training(module, recipe, example=(x,) if isinstance(x, torch.Tensor) else x)


def _masked(before, after):
    """``before`` with all weights at 0 that ``after`` lacks, found by their values."""
    masked, kept = copy.deepcopy(before), dict(after.named_parameters()) | dict(after.named_buffers())
    for name, tensor in [*masked.named_parameters(), *masked.named_buffers()]:
        if not tensor.is_floating_point() or name.endswith("running_var"):
            continue
        there = torch.isin(tensor.data, kept[name].detach())
        stays = torch.ones_like(there)
        for axis in range(tensor.ndim):
            others = tuple(i for i in range(tensor.ndim) if i != axis)
            line = there.any(others) if others else there
            assert line.sum() == kept[name].shape[axis], name
            stays &= line.reshape([-1 if i == axis else 1 for i in range(tensor.ndim)])
        tensor.data.mul_(stays)
    return masked


def _knows_its_sizes(module):
    """What the layer says of itself holds for its tensors: a fresh one made from it has the same."""
    if isinstance(module, nn.BatchNorm2d):
        assert module.num_features == len(module.weight) == len(module.running_var)
    elif isinstance(module, nn.Linear):
        assert (module.out_features, module.in_features) == module.weight.shape
    else:
        i, o = module.in_channels, module.out_channels
        fresh = type(module)(i, o, module.kernel_size, groups=module.groups)
        assert fresh.weight.shape == module.weight.shape


@pytest.mark.parametrize("case", CASES)
def test_a_pruned_module_computes_what_the_masked_one_does(case):
    make, shape, expected = CASES[case]
    before, x = _random(make), _input(shape)
    after = copy.deepcopy(before)
    session = _prune(after, x)
    session.finish()
    shapes = {path: tuple(after.get_submodule(path).weight.shape) for path in expected}
    assert shapes == expected
    for module in after.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            _knows_its_sizes(module)
    other = _input((3, *shape[1:]), seed=2)
    with torch.no_grad():
        masked = _masked(before, after)
        for feed in (x, other):
            torch.testing.assert_close(after(feed), masked(feed), rtol=1e-4, atol=1e-4)
        # The mask is not empty, and what it hides mattered.
        assert not torch.allclose(masked(x), before(x), rtol=1e-2, atol=1e-2)


class _Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(F.relu(self.norm(self.a(x))))


def _by_magnitude(module, x, loss):
    a, b = (p.detach().double().numpy() for p in (module.a.weight, module.b.weight))
    return (a**2).sum(1) + (b**2).sum(0)


def _by_norm_scale(module, x, loss):
    return module.norm.weight.detach().abs().numpy()


def _by_taylor(module, x, loss):
    twin = copy.deepcopy(module).double()
    loss(twin(x.double()), 0).backward()
    named = {n: (p * p.grad).detach().numpy() for n, p in twin.named_parameters()}
    score = named["a.weight"].sum(1) ** 2 + named["b.weight"].sum(0) ** 2
    return score + sum(named[n] ** 2 for n in ("a.bias", "norm.weight", "norm.bias"))


def _by_wanda(module, x, loss):
    with torch.no_grad():
        hidden = F.relu(module.norm(module.a(x))).double().numpy()
    return np.abs(module.b.weight.detach().double().numpy()).sum(0) * np.sqrt((hidden**2).sum(0))


@pytest.mark.parametrize(
    ("criterion", "reference"),
    [
        ("magnitude", _by_magnitude),
        ("norm-scale", _by_norm_scale),
        ("taylor", _by_taylor),
        ("wanda", _by_wanda),
    ],
)
def test_the_least_important_units_go(criterion, reference):
    before, x = _random(_Small, seed=3), _input((7, 5, 1))[..., 0]
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])

    def loss(outputs, index):
        assert index == 0
        return F.cross_entropy(outputs, labels)

    after = copy.deepcopy(before)
    recipe = {"recipe": 1, "passes": [{"prune-structured": {"criterion": criterion, "multiple": 1}}]}
    optkit.training(after, recipe, example=(x,), loss=loss)
    stay = np.sort(np.argsort(reference(before, x, loss))[4:])
    torch.testing.assert_close(after.a.weight, before.a.weight[stay], rtol=0, atol=0)
    torch.testing.assert_close(after.b.weight, before.b.weight[:, stay], rtol=0, atol=0)
    torch.testing.assert_close(after.norm.running_var, before.norm.running_var[stay], rtol=0, atol=0)


def test_gradients_are_asked_for_where_the_criterion_needs_them():
    with pytest.raises(UsageError, match="prune-structured: the criterion taylor needs gradients") as caught:
        _prune(_random(_Small), torch.randn(2, 5), criterion="taylor")
    assert "loss=" in str(caught.value.hint)


class _Stubborn(nn.Module):
    """Its second hidden layer is viewed by a number in the code."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        y = F.relu(self.b(F.relu(self.a(x))))
        return self.c(F.relu(y.view(-1, 3, 4)).flatten(1))


def test_what_the_code_of_the_module_ties_down_stays_whole(caplog):
    before, x = _random(_Stubborn), torch.randn(2, 4)
    after = copy.deepcopy(before)
    _prune(after, x)
    assert [m.weight.shape[0] for m in (after.a, after.b)] == [4, 12]
    assert "b.weight stays whole" in caplog.text
    torch.testing.assert_close(after(x), _masked(before, after)(x))


def test_a_module_that_cannot_follow_at_all_is_an_error_and_stays_as_it_was():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(F.relu(self.a(x)).view(-1, 8))

    module, x = _random(Stubborn), torch.randn(2, 4)
    before = module(x)
    with pytest.raises(PassError, match=r"pruned 0 of 1 groups: Stubborn cannot follow"):
        _prune(module, x)
    assert module.a.out_features == 8
    torch.testing.assert_close(module(x), before, rtol=0, atol=0)


def test_attention_of_torch_itself_stays_whole():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return x + self.down(F.relu(self.up(x)))

    module = _random(Encoder)
    _prune(module, torch.randn(2, 4, 8))
    assert module.up.weight.shape == (8, 8)
    assert module.attention.in_proj_weight.shape == (24, 8)


def test_the_pruned_module_trains_and_is_compiled_as_it_is(tmp_path):
    module, x = _random(_Residual), _input(_PICTURE)
    session = _prune(module, x)
    optimizer = torch.optim.SGD(session.parameters(), lr=0.1)
    module.train()
    for _ in range(3):
        optimizer.zero_grad()
        outputs = module(x)
        session.loss(outputs.square().mean(), (x,), outputs).backward()
        optimizer.step()
        session.step()
    done = session.finish()
    assert done.changes["prune-structured"][0].node == "stem.0.weight"
    artifact, _ = done.compile(target="cpu", backend="onnxruntime", out=tmp_path / "out")
    with artifact.session() as deployed, torch.no_grad():
        (found,) = deployed.run({deployed.inputs[0].name: x.numpy()}).values()
        np.testing.assert_allclose(found, module(x).numpy(), rtol=1e-3, atol=1e-4)


class _Cached(nn.Module):
    """A step of a decoder: it takes a cache and gives it back first, longer by what it appended."""

    def __init__(self):
        super().__init__()
        self.inside, self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, cache):
        cache.append(torch.cat([cache.pop(), self.inside(x)], 1))
        seen = cache[0].sum(1, keepdim=True)
        return cache, seen + self.down(F.relu(self.up(seen)))


@pytest.mark.parametrize("named", [False, True])
def test_caches_nested_in_the_inputs_are_given_to_the_graph_and_stay_as_they_are(named):
    before = _random(_Cached)
    x, cache = torch.randn(2, 1, 4), [torch.randn(2, 3, 8)]
    was, after = cache[0], copy.deepcopy(before)
    example = {"x": x, "cache": cache} if named else (x, cache)
    _prune(after, example)
    assert after.up.weight.shape[0] == 8
    assert cache[0] is was
    with torch.no_grad():
        expected = _masked(before, after)(x, [was.clone()])
        torch.testing.assert_close(after(x, [was.clone()]), expected, rtol=1e-4, atol=1e-5)


class _Turned(nn.Module):
    """A linear layer as GPT-2 has it: inputs first, and the width of the outputs as a number of its own."""

    def __init__(self, i, o):
        super().__init__()
        self.nf, self.weight, self.bias = o, nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.randn(o))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.reshape(*x.shape[:-1], self.nf)


def test_layers_of_somebody_elses_that_keep_their_width_are_told():
    before = _random(lambda: nn.Sequential(_Turned(4, 16), nn.GELU(), _Turned(16, 6)))
    after, x = copy.deepcopy(before), torch.randn(2, 3, 4)
    _prune(after, x)
    assert (after[0].nf, after[0].weight.shape, after[2].nf) == (8, (4, 8), 6)
    with torch.no_grad():
        torch.testing.assert_close(after(x), _masked(before, after)(x), rtol=1e-4, atol=1e-5)


class _Halved(nn.Module):
    """A block that checks what comes in by ``channels``, which another module takes to be what it gives."""

    def __init__(self, i, o):
        super().__init__()
        self.channels, self.out_channels = i, o
        self.conv = nn.Conv2d(i, o, 3, stride=2, padding=1)

    def forward(self, x):
        assert x.shape[1] == self.channels
        return self.conv(x)


class _Given(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.channels, self.conv = o, nn.Conv2d(i, o, 1)

    def forward(self, x):
        y = self.conv(x)
        assert y.shape[1] == self.channels
        return y


class _Norms(nn.Module):
    """Norms that know how many channels, and groups of them, they have."""

    def __init__(self):
        super().__init__()
        self.a, self.groups = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16)
        self.b, self.each = nn.Conv2d(16, 8, 3), nn.InstanceNorm2d(8, affine=True)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(F.relu(self.each(self.b(F.relu(self.groups(self.a(x)))))))


@pytest.mark.parametrize("block", [_Halved, _Given])
def test_numbers_of_channels_are_those_of_what_comes_in_where_the_module_means_so(block):
    # Inputs and outputs of the whole stay: the block can lose what comes in, or what it gives.
    make = {
        _Halved: lambda: nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), _Halved(16, 16)),
        _Given: lambda: nn.Sequential(_Given(16, 16), nn.ReLU(), nn.Conv2d(16, 16, 1)),
    }
    before, x = _random(make[block]), _input((2, 16, 6, 6))
    after = copy.deepcopy(before)
    _prune(after, x)
    (changed,) = (m for m in after if isinstance(m, block))
    assert changed.conv.weight.shape[:2] == ((16, 8) if block is _Halved else (8, 16))
    assert changed.channels == 8
    with torch.no_grad():
        torch.testing.assert_close(after(x), _masked(before, after)(x), rtol=1e-4, atol=1e-4)


def test_norms_over_groups_and_single_channels_are_told():
    before, x = _random(_Norms), _input(_PICTURE)
    after = copy.deepcopy(before)
    _prune(after, x)
    assert (after.groups.num_channels, after.groups.num_groups) == (8, 2)
    assert after.each.num_features == 4
    with torch.no_grad():
        torch.testing.assert_close(after(x), _masked(before, after)(x), rtol=1e-4, atol=1e-4)


def test_what_a_module_says_without_words_is_told_by_its_line(caplog):
    class Sure(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = F.relu(self.a(x))
            if x.shape[1] != 8:
                raise AssertionError
            return self.c(F.relu(self.b(x)))

    module = _random(Sure)
    _prune(module, torch.randn(2, 4))
    assert (module.a.out_features, module.b.out_features) == (8, 4)
    assert "a.weight stays whole: AssertionError at test_prune_structured.py:" in caplog.text
    assert ": raise AssertionError" in caplog.text
