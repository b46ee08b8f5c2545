"""Training through rounding: the formulas against float64, what is trained against what is deployed."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the package torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import optkit  # noqa: E402
from optkit.backends import BACKENDS  # noqa: E402
from optkit.data import CalibrationData  # noqa: E402
from optkit.errors import PassError, UnknownNameError  # noqa: E402
from optkit.formats import FORMATS  # noqa: E402
from optkit.passes.base import Context  # noqa: E402
from optkit.passes.quantization import aware  # noqa: E402
from optkit.passes.quantization.fake import FakeQuantize, OnGrid, QuantizedLayer  # noqa: E402
from optkit.passes.quantization.learned import rounded, rounded_folded  # noqa: E402
from optkit.pipeline import run_passes  # noqa: E402
from optkit.recipe import Recipe  # noqa: E402
from optkit.reference import ReferenceSession  # noqa: E402
from optkit.targets import target  # noqa: E402
from optkit.training_export import draft, loaded  # noqa: E402


def _recipe(**options):
    return {"recipe": 1, "imports": ["cleanup"], "passes": [{"quantize-aware": options}]}


def _input(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class _Pictures(nn.Module):
    """Plain, depthwise, grouped and transposed convolutions, a residual, a concatenation, pools and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8, affine=False)
        self.point = nn.Conv2d(8, 8, 1)
        self.group = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(12, 4, 2, 2)
        self.last = nn.Conv2d(12, 16, 3, dilation=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.norm1(self.stem(x)))
        y = F.relu6(self.norm2(self.depth(x)))
        x = F.dropout(F.relu(x + self.point(y)), 0.1, self.training)
        up = self.up(F.relu(self.group(x)))
        x = F.relu(self.last(torch.cat([x, up], 1)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class _Tokens(nn.Module):
    """Linear layers on three axes, attention in float between them, one of the layers used twice."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
        self.norm = nn.LayerNorm(16)

    def block(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.out(torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v)
        return self.block(self.block(x))


class _Signal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 3, padding="same")
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean(2))


MODULES = {
    "pictures": (_Pictures, (4, 3, 8, 8)),
    "tokens": (_Tokens, (2, 5, 16)),
    "signal": (_Signal, (4, 4, 16)),
}


def _made(kind, seed=0):
    make, shape = MODULES[kind]
    torch.manual_seed(seed)
    module = make()
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return module, _input(*shape)


def _train(session, module, x, steps, rate=1e-2):
    optimizer = torch.optim.SGD(session.parameters(), lr=rate)
    module.train()
    torch.manual_seed(5)
    for _ in range(steps):
        outputs = module(x)
        loss = session.loss(outputs.square().mean(), (x,), outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step()


@pytest.mark.parametrize(
    ("kind", "bits", "share"),
    # Of the multiply-accumulates; the transposed convolution, and attention between activations, stay in float.
    [("pictures", 8, 0.94), ("tokens", 8, 0.7), ("signal", 4, 0.99)],
)
def test_what_was_trained_is_what_is_deployed(kind, bits, share, tmp_path):
    module, x = _made(kind)
    session = optkit.training(module, _recipe(weight_bits=bits, outer_bits=bits), example=(x,), steps=4)
    _train(session, module, x, 4)
    done = session.finish()
    other = _input(3, *x.shape[1:], seed=7)
    with torch.no_grad():
        eager = module(other).numpy()
    graph = loaded(done.export())
    name = str(graph.graph.inputs[0].name)
    # Nothing but the pairs themselves: float32 sums in another order may fall on the other side of a tie.
    (exact,) = ReferenceSession(graph, optimize=False).run({name: other.numpy()}).values()
    step = float(eager.max() - eager.min()) / 255
    assert np.mean(np.abs(exact - eager)) < 0.05 * step
    artifact, report = done.compile(target="cpu", backend="onnxruntime", out=tmp_path / "out")
    with artifact.session() as deployed:
        (found,) = deployed.run({name: other.numpy()}).values()
    assert np.max(np.abs(found - eager)) <= step
    assert report.manifest.achieved.formats["int8"] > share
    weights = [
        v.const_value.numpy() for v in graph.graph.initializers.values() if str(v.name).endswith("integers")
    ]
    assert weights
    # Of pictures the depthwise convolution keeps 8 bits everywhere.
    width = min(bits, 7) if target("cpu").saturates and kind != "pictures" else bits
    assert max(np.abs(w).max() for w in weights if w.dtype == np.int8) == 2 ** (width - 1) - 1


def _pairs(model):
    """What every operator reads through a DequantizeLinear, and what is stored through a QuantizeLinear."""
    found = []
    for node in model.graph:
        through = [
            i for i, v in enumerate(node.inputs)
            if v is not None and v.producer() is not None and v.producer().op_type == "DequantizeLinear"
        ]  # fmt: skip
        if through and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            found.append((node.op_type, tuple(through)))
    return sorted(found), sum(n.op_type == "QuantizeLinear" for n in model.graph)


@pytest.mark.parametrize("kind", ["pictures", "signal"])
def test_pairs_lie_where_static_quantization_puts_them(kind):
    module, x = _made(kind)
    context = Context(
        target=target("cpu"),
        placements=BACKENDS["onnxruntime"].placements,
        data=CalibrationData([{"x": x.numpy()}]),
    )
    static = loaded(draft(module.eval(), (x,), ("batch",)))
    passes = Recipe.load({"recipe": 1, "imports": ["cleanup"], "passes": ["quantize-static"]}).passes
    run_passes(static, passes, context)
    session = optkit.training(module, _recipe(), example=(x,), steps=1)
    aware = loaded(session.finish().export())
    run_passes(aware, Recipe.load("cleanup").passes, context)
    assert _pairs(aware) == _pairs(static)


def _round_in_float64(x, t, zero, low, high, grad, axis=None):
    """Eq. 1 to 3 of the paper, and the chain rule for the logarithm of the step; sums over what shares a step."""
    x, t, grad = (a.detach().double().numpy() for a in (x, t, grad))
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = -1
    s = np.exp(t).reshape(shape) if axis is not None else np.exp(t)
    v = x / s
    q = np.clip(np.round(v), low - zero, high - zero)
    inside = (np.round(v) >= low - zero) & (np.round(v) <= high - zero)
    each = grad * np.where(inside, np.round(v) - v, q)
    others = tuple(i for i in range(x.ndim) if i != axis)
    total = each.sum(others) if axis is not None else each.sum()
    count = x.size // t.size
    return q * s, grad * inside, total * np.exp(t) / math.sqrt(count * high)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("zero", "low", "high", "axis"),
    [
        (128, 0, 255, None),
        (3, 0, 255, None),
        (254, 0, 255, None),
        (255, 0, 255, None),
        (0, -7, 7, 0),
        (0, -127, 127, 1),
    ],
)
def test_rounding_and_its_gradients_are_those_of_the_paper(zero, low, high, axis, dtype):
    x = _input(4, 6, 5).to(dtype).mul_(3.0).requires_grad_()
    steps = 1 if axis is None else x.shape[axis]
    # Small enough that some values lie outside of the grid, on both sides.
    t = torch.log(torch.linspace(0.01, 0.03, steps, dtype=dtype) * (255 / (high - low)) ** 0.8)
    t = (t[0] if axis is None else t).clone().requires_grad_()
    grad = _input(4, 6, 5, seed=2).to(dtype)
    y = rounded(x, t, zero, low, high, axis)
    y.backward(grad)
    expected = _round_in_float64(x, t, zero, low, high, grad, axis)
    # x / s up to 300, so that the error of rounding, half a step, has nine bits less than the type.
    close = 1e3 * torch.finfo(dtype).eps
    np.testing.assert_allclose(y.detach(), expected[0], rtol=close, atol=close)
    np.testing.assert_array_equal(x.grad, expected[1].astype(x.grad.numpy().dtype))
    np.testing.assert_allclose(t.grad, expected[2], rtol=close, atol=close)
    outside = np.mean(expected[1] == 0)
    assert 0 < outside < 0.9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("zero", "high"), [(0, 255), (1, 255), (0, 7), (0, 6), (-0, 15)])
def test_rounding_what_a_relu_would_give_is_a_relu_and_rounding(zero, high, dtype):
    # Around 0, ties at both sides of the upper end, and everything in between.
    ends = [high - zero + d for d in (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 9.0)]
    values = torch.tensor([-3.0, -0.5, -0.25, -0.0, 0.0, 0.25, 0.5, 0.75, 1.5, 2.5, *ends]).to(dtype) / 8
    grad = _input(len(values), seed=2).to(dtype)
    found = []
    for rectified in (True, False):
        x, t = values.clone().requires_grad_(), torch.tensor([math.log(1 / 8)], dtype=dtype).requires_grad_()
        y = rounded(x if rectified else x.relu(), t, zero, 0, high, None, rectified=rectified)
        y.backward(grad)
        found.append((y.detach(), x.grad, t.grad))
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=0, atol=0)
    # What is not above 0 is left out of the one sum, and cancels in the other.
    close = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(found[0][2], found[1][2], rtol=close, atol=close)
    assert torch.count_nonzero(found[0][1]) not in (0, len(values))


def test_a_tie_at_the_end_of_the_grid_is_inside_where_it_rounds_to_the_end():
    # Ties go to even: 6.5 to 6, within the grid, and 7.5 to 8, outside of it.
    x = torch.tensor([-8.5, -7.5, -6.5, 6.5, 7.5, 8.5], requires_grad=True)
    y = rounded(x, torch.zeros(()), 0, -7, 7, None)
    y.sum().backward()
    assert y.tolist() == [-7, -7, -6, 6, 7, 7]
    assert x.grad.tolist() == [0, 0, 1, 1, 0, 0]


def test_what_reads_a_rounded_value_may_change_it_in_place():
    x = _input(4, 6).requires_grad_()
    t = torch.tensor(-3.0, requires_grad=True)
    y = rounded(x * 1, t, 128, 0, 255, None)
    y.backward(torch.ones_like(y))
    grads = x.grad.clone(), t.grad.clone()
    x.grad = t.grad = None
    before = x * 1
    y = rounded(before, t, 128, 0, 255, None)
    before.relu_()
    y += 1.0
    y.backward(torch.ones_like(y))
    torch.testing.assert_close((x.grad, t.grad), grads, rtol=0, atol=0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_folded_rounding_is_rounding_of_the_folded_weights_divided_again(affine, axis):
    w = _input(4, 6, 3).double().requires_grad_()
    n = w.shape[axis]
    std = torch.linspace(0.5, 2.0, n).double()
    # A channel may be turned around.
    gamma = (torch.linspace(0.4, 1.6, n).double() * torch.tensor([1.0, -1.0]).repeat(3)[:n]).requires_grad_()
    t = torch.linspace(-3.0, -2.0, n).double().requires_grad_()
    grad = _input(4, 6, 3, seed=2).double()
    y = rounded_folded(w, t, gamma if affine else None, std, 7, axis)
    y.backward(grad)

    shape = [1, 1, 1]
    shape[axis] = n
    g = gamma.detach().numpy() if affine else np.ones(n)
    f = (g / std.numpy()).reshape(shape)
    plain, above = w.detach().numpy(), grad.numpy()
    q, gu, gt = _round_in_float64(torch.tensor(plain * f), t, 0, -7, 7, torch.tensor(above / f), axis)
    np.testing.assert_allclose(y.detach(), q / f, rtol=1e-12)
    np.testing.assert_allclose(w.grad, gu * f, rtol=1e-12)
    np.testing.assert_allclose(t.grad, gt, rtol=1e-9)
    if affine:
        # Through the product with f, and through the division by it.
        each = (gu * plain - above * q / f**2).sum(tuple(i for i in range(3) if i != axis))
        np.testing.assert_allclose(gamma.grad, each / std.numpy(), rtol=1e-9)


def test_a_channel_that_its_norm_has_switched_off_stays_finite():
    w, t = _input(2, 8).requires_grad_(), torch.zeros(2, requires_grad=True)
    gamma = torch.tensor([0.0, 1.0], requires_grad=True)
    y = rounded_folded(w, t, gamma, torch.ones(2), 127, 0)
    y.backward(torch.tensor([[0.0], [1.0]]).expand(2, 8))
    assert torch.count_nonzero(y[0]) == 0
    for grad in (w.grad, t.grad, gamma.grad):
        assert torch.isfinite(grad).all()
    assert float(gamma.grad[0]) == 0


@torch.no_grad()
def test_a_range_is_that_of_what_was_seen():
    quantizer = FakeQuantize(FORMATS["u8"])
    x = torch.linspace(-1.0, 3.0, 4001)
    assert quantizer(x) is x
    assert quantizer.observed()
    # u8 from -1 to 3: the step is 4 / 255, and 0 lies on the grid.
    assert float(quantizer.scale) == pytest.approx(4 / 255, rel=0.02)
    assert float(quantizer.zero) == pytest.approx(64, abs=1)
    assert float(quantizer(torch.zeros(()))) == 0
    inside = x[(x > -0.97) & (x < 2.95)]
    assert float((quantizer(inside) - inside).abs().max()) <= float(quantizer.scale) / 2 * 1.001
    other = FakeQuantize(FORMATS["u8"])
    other(-x)
    assert other.observed()
    assert not torch.equal(other(x), quantizer(x))
    other.load_state_dict(quantizer.state_dict())
    torch.testing.assert_close(other(x), quantizer(x), rtol=0, atol=0)
    broken = FakeQuantize(FORMATS["u8"])
    broken(torch.tensor([1.0, float("nan")]))
    assert not broken.observed()


def _layer_with_norm():
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return layer, norm


def _folded(layer, norm):
    """Weights and bias of the layer with its norm, in float64."""
    factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).double()
    weight = layer.weight.double() * factor[:, None, None, None]
    bias = (layer.bias.double() - norm.running_mean.double()) * factor + norm.bias.double()
    return weight.detach(), bias.detach()


def test_in_training_the_norm_goes_on_learning_from_the_rounded_layer():
    layer, norm = _layer_with_norm()
    reference, learned = copy.deepcopy(layer).double(), copy.deepcopy(norm).double()
    weight, _ = _folded(layer, norm)
    step = weight.abs().flatten(1).amax(1) / 127
    factor = weight / layer.weight.double()
    quantized = QuantizedLayer(layer, norm, 8).train()
    x = _input(8, 3, 6, 6)
    # The folded weights are what is rounded; the norm takes its statistics of what they give, unfolded again.
    rounded = (weight / step[:, None, None, None]).round() * step[:, None, None, None]
    with torch.no_grad():
        reference.weight.copy_(rounded / factor)
        expected = learned.train()(reference(x.double()))
        torch.testing.assert_close(quantized(x).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_mean.double(), learned.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), learned.running_var, rtol=1e-4, atol=1e-5)


def test_a_settled_norm_is_folded_and_stands_still():
    layer, norm = _layer_with_norm()
    weight, bias = _folded(layer, norm)
    quantized = QuantizedLayer(layer, norm, 8).train()
    quantized.settle()
    before = norm.running_mean.clone()
    step = (weight.abs().flatten(1).amax(1) / 127)[:, None, None, None]
    x = _input(2, 3, 6, 6)
    with torch.no_grad():
        expected = F.conv2d(x.double(), (weight / step).round() * step, bias, padding=1)
        torch.testing.assert_close(quantized.train()(x).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_mean, before, rtol=0, atol=0)
    quantized.store()
    assert int(quantized.integers.abs().max()) == 127
    with torch.no_grad():
        torch.testing.assert_close(quantized(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_norm_that_its_owner_froze_stays_frozen():
    layer, norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3).eval()
    quantized = QuantizedLayer(layer, norm, 8)
    quantized.train()
    before = norm.running_mean.clone()
    quantized(torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert quantized.training and not norm.training
    assert torch.equal(norm.running_mean, before)
    # In evaluation as a whole, nothing says that the norm is frozen.
    assert QuantizedLayer(nn.Conv2d(2, 3, 3).eval(), nn.BatchNorm2d(3).eval(), 8).train().norm.training


def test_ranges_norms_and_layers_freeze_when_they_are_due():
    module, x = _made("signal")
    recipe = _recipe(freeze_ranges=0.5, freeze_batch_norm=0.25, freeze_layers=0.4)
    session = optkit.training(module, recipe, example=(x,), steps=10)
    optimizer = torch.optim.SGD(session.parameters(), lr=0.1, momentum=0.9)
    layers = [m for m in module.modules() if isinstance(m, QuantizedLayer)]
    assert len(layers) == 3
    watched = {
        "range": layers[0].log_scale, "mean": layers[0].norm.running_mean,
        "first": layers[0].weight, "second": layers[1].weight, "last": layers[2].weight,
    }  # fmt: skip
    moved = {name: [] for name in watched}
    module.train()
    for step in range(1, 11):
        before = {name: t.detach().clone() for name, t in watched.items()}
        outputs = module(x)
        session.loss(outputs.square().mean(), (x,), outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step()
        for name, t in watched.items():
            if not torch.equal(t.detach(), before[name]):
                moved[name].append(step)
    # A share of ten steps each; what is frozen at a step was still moved by it, and by none after it.
    assert moved["range"][-1] == 5
    assert moved["mean"] == list(range(1, 4))
    assert moved["first"] == list(range(1, 7))
    assert moved["second"] == list(range(1, 9))
    assert moved["last"] == list(range(1, 11))


def test_a_module_gives_a_loss_as_before_and_its_class_its_name():
    module, x = _made("tokens")
    kind = type(module)
    optkit.training(module, _recipe(), example=(x,), steps=1)
    assert isinstance(module, kind)
    assert type(module).__name__ == "_Tokens"
    # Keyword arguments as before.
    with torch.no_grad():
        torch.testing.assert_close(module(x=x), module(x), rtol=0, atol=0)


class _Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        if x.sum() > 0:
            return self.a(x)
        return x


class _Fickle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x) if self.training else self.b(x)


class _Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.a(x[..., None].expand(-1, -1, 4)).sum(2)


def test_what_cannot_be_quantized_says_why():
    x = _input(2, 8)
    with pytest.raises(
        PassError, match=r"_Branching cannot be traced: .*test_quantize_aware\.py:\d+"
    ) as caught:
        optkit.training(_Branching(), _recipe(), example=(x,))
    assert "decide by the module's settings" in str(caught.value.hint)
    with pytest.raises(PassError, match="_Fickle does other things in training than in evaluation"):
        optkit.training(_Fickle(), _recipe(), example=(x,))
    with pytest.raises(PassError, match=r"nothing in _Padded can be quantized: .*it pads by circular"):
        optkit.training(_Padded(), _recipe(), example=(x,))
    with pytest.raises(PassError, match="nothing in Sequential can be quantized"):
        optkit.training(nn.Sequential(nn.Linear(8, 8)), _recipe(ignore=["*"]), example=(x,))
    with pytest.raises(PassError, match="infinite or NaN on the example inputs"):
        optkit.training(nn.Sequential(nn.Linear(8, 8)), _recipe(), example=(x * float("inf"),))
    with pytest.raises(UnknownNameError, match="unknown placement 'nowhere'"):
        optkit.training(nn.Sequential(nn.Linear(8, 8)), _recipe(placement="nowhere"), example=(x,))


def test_layers_that_are_named_stay_in_float():
    module, x = _made("signal")
    session = optkit.training(module, _recipe(ignore=["b"]), example=(x,), steps=1)
    assert isinstance(module.a, QuantizedLayer)
    assert type(module.b) is nn.Conv1d
    assert [c.node for c in session.finish().changes["quantize-aware"]] == ["a", "head"]


class _Branched(nn.Module):
    """Two inputs, a layer used twice in the middle, and two results, of which one is read by a further layer."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.middle = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 8)
        self.near, self.far, self.end = (nn.Linear(8, 4) for _ in range(3))

    def forward(self, a, b):
        x = F.relu(self.left(a)) * torch.sigmoid(self.right(b))
        x = F.relu(self.middle(F.relu(self.middle(x))))
        return self.near(x), self.end(F.relu(self.far(x)).repeat(1, 2))


@pytest.mark.parametrize("outer", [8, 4])
def test_layers_without_one_before_or_behind_them_have_their_own_width(outer):
    module = _Branched()
    recipe = _recipe(weight_bits=4, outer_bits=outer)
    inputs = (_input(3, 6), _input(3, 5))
    session = optkit.training(module, recipe, example=inputs, steps=1, target="x86-vnni")
    bits = {p: m.bits for p, m in module.named_modules() if isinstance(m, QuantizedLayer)}
    assert bits == {"left": outer, "right": outer, "middle": 4, "far": 4, "near": outer, "end": outer}
    said = {c.node: c.detail for c in session.finish().changes["quantize-aware"]}
    assert said["end"] == f"weights in {outer} bits, activations in 8 bits"
    largest = {p: int(getattr(module, p).integers.abs().max()) for p in bits}
    assert largest == {p: 2 ** (b - 1) - 1 for p, b in bits.items()}


@pytest.mark.parametrize(("where", "width"), [("x86-vnni", 8), ("x86-avx2", 7)])
def test_weights_have_seven_bits_where_products_saturate_and_are_not_depthwise(where, width):
    module, x = _made("pictures")
    session = optkit.training(module, _recipe(), example=(x,), steps=1, target=where)
    bits = {p: m.bits for p, m in module.named_modules() if isinstance(m, QuantizedLayer)}
    assert bits.pop("depth") == 8
    assert set(bits.values()) == {width}
    said = {c.node: c.detail for c in session.finish().changes["quantize-aware"]}
    assert said["stem"] == f"weights in {width} bits, activations in 8 bits"
    assert int(module.stem.integers.abs().max()) == 2 ** (width - 1) - 1


def test_weights_without_activations_in_integers_do_not_saturate():
    module, x = _made("signal")
    optkit.training(module, _recipe(activation_bits=None), example=(x,), steps=1, target="x86-avx2")
    assert {m.bits for m in module.modules() if isinstance(m, QuantizedLayer)} == {8}


def test_weights_alone():
    module, x = _made("signal")
    session = optkit.training(module, _recipe(activation_bits=None), example=(x,), steps=1)
    graph = loaded(session.finish().export())
    assert not any(n.op_type == "QuantizeLinear" for n in graph.graph)
    assert sum(n.op_type == "DequantizeLinear" for n in graph.graph) == 3


class _Rectified(nn.Module):
    """ReLUs as modules, functions and methods, in place, shared, and read by others; pools of what is rounded already."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
        self.norm, self.relu, self.own = nn.BatchNorm2d(8), nn.ReLU(), nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(self.own(self.norm(self.a(x))), 2)
        x = F.relu(self.b(x), inplace=True)
        y = self.relu(self.c(x)) + x
        z = self.d(y)
        y = z.relu() * 0.5 + torch.sigmoid(z) + self.relu(y)
        return self.head(F.max_pool2d(y, 2).mean((2, 3)))


def _fitted(x, hooked=None):
    module, _ = _made("pictures")
    torch.manual_seed(3)
    module = _Rectified()
    session = optkit.training(module, _recipe(), example=(x,), steps=5)
    if hooked is not None:
        module.get_submodule(hooked[0]).register_forward_hook(lambda *a: hooked[1].append(a[2].min().item()))
    _train(session, module, x, 5)
    return session, module


def test_activations_and_second_roundings_that_quantizers_spare_change_no_number(monkeypatch):
    x = _input(4, 3, 8, 8)
    session, module = _fitted(x)
    grids = [m for m in module.modules() if isinstance(m, FakeQuantize)]
    assert sum(g.rectifies for g in grids) == 3
    assert sum(isinstance(m, OnGrid) for m in module.modules()) == 1
    seen: list[float] = []
    _, hooked = _fitted(x, ("own", seen))
    assert len(seen) == 5
    assert min(seen) == 0
    monkeypatch.setattr(aware._Found, "_absorb", lambda *_: None)
    monkeypatch.setattr(aware._Found, "_spare", lambda *_: None)
    plain_session, plain = _fitted(x)
    assert not any(m.rectifies for m in plain.modules() if isinstance(m, FakeQuantize))
    expected = dict(plain.named_parameters())
    for other in (module, hooked):
        for name, value in other.named_parameters():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    graphs = [loaded(s.finish().export()) for s in (session, plain_session)]
    assert [n.op_type for n in graphs[0].graph] == [n.op_type for n in graphs[1].graph]


def test_a_relu_in_place_whose_input_others_read_stays():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            y = self.a(x)
            return self.b(F.relu(y, inplace=True)) + y.sum(1, keepdim=True)

    module, x = Shared(), _input(4, 4)
    with torch.no_grad():
        expected = module(x)
    session = optkit.training(module, _recipe(), example=(x,), steps=1)
    assert not any(m.rectifies for m in module.modules() if isinstance(m, FakeQuantize))
    session.finish()
    with torch.no_grad():
        # Sums of rectified values: of others, they would be far off.
        torch.testing.assert_close(module(x), expected, rtol=0, atol=0.1)


def test_the_range_of_what_comes_in_stays_as_observed_and_asks_for_no_gradient():
    module, x = _made("signal")
    session = optkit.training(module, _recipe(), example=(x,), steps=3)
    grids = {n: m for n, m in module.named_modules() if isinstance(m, FakeQuantize)}
    before = {n: float(m.scale.detach()) for n, m in grids.items()}
    assert [n for n, m in grids.items() if not m.log_scale.requires_grad] == ["optkit.grid_x"]
    assert all(p is not grids["optkit.grid_x"].log_scale for p in session.parameters())
    seen = []
    module.a.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    _train(session, module, x, 2, rate=1.0)
    assert seen == [False, False]
    moved = {n for n, m in grids.items() if float(m.scale.detach()) != before[n]}
    assert "optkit.grid_x" not in moved
    assert moved
