"""What torch cannot trace as it is: repaired for the time of tracing, the same numbers at every size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optkit.errors import ModelError
from optkit.exporting.durations import repeat
from optkit.exporting.export import export
from optkit.exporting.repairs import repaired
from optkit.frontend import proved, read

nn = torch.nn
pytestmark = pytest.mark.needs("torch", "onnxscript")


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.net = kind(4, 6, **options)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize(
    ("kind", "options", "first", "bias"),
    [
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}, True, True),
        (nn.LSTM, {"num_layers": 2}, False, False),
        (nn.GRU, {"num_layers": 2}, True, False),
        (nn.GRU, {"bidirectional": True}, False, True),
        (nn.RNN, {"nonlinearity": "relu"}, True, True),
        (nn.RNN, {"bidirectional": True}, False, False),
    ],
)
def test_recurrent_layers_stay_one_operator_of_any_length(kind, options, first, bias):
    axes = {"x": {0: "batch", 1: "time"} if first else {0: "time", 1: "batch"}}
    module = Recurrent(kind, batch_first=first, bias=bias, **options)
    loaded = read(module, inputs=torch.randn(3, 5, 4), dynamic=axes)
    ops = [n.op_type for n in loaded.model.graph]
    assert ops.count(kind.__name__) == options.get("num_layers", 1)
    assert "time" in loaded.notes[-1]


def test_recurrent_layers_are_torch_s_own_again_afterwards():
    net, x = Recurrent(nn.LSTM), torch.randn(5, 3, 4)
    before = net(x)[0]
    read(net, inputs=x)
    after = net(x)[0]
    assert torch.equal(before, after)
    assert "lstm" not in vars(torch._VF)


class Masked(nn.Module):
    def forward(self, q, k, v, mask):
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_a_row_that_may_look_at_nothing_gives_zeros():
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask[1, :, :2] = False
    exported = export(Masked(), (q, k, v, mask), name="masked")
    proved(exported)
    assert (exported.eager(exported.tensors)["output"][1, :, :2] == 0).all()
    ops = [n.op_type for n in exported.model.graph]
    assert "IsNaN" not in ops
    assert ops.count("ReduceMax") == 1


def test_masks_of_numbers_are_left_alone():
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    exported = export(Masked(), (q, k, v, torch.zeros(3, 3)), name="masked")
    assert "ReduceMax" not in [n.op_type for n in exported.model.graph]


class Rows(nn.Module):
    def forward(self, x):
        return x / len(x)


def test_len_keeps_the_axis_free():
    loaded = read(Rows(), inputs=torch.randn(3, 4), dynamic=["batch"])
    assert "also batch 1 and batch 4" in loaded.notes[-1]
    assert "len" not in globals()


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("room", torch.tensor(2))

    def forward(self, x):
        if x.shape[0] > self.room:
            return x[: -self.room]
        return x


def test_integers_in_buffers_are_numbers_while_tracing():
    module = Padded()
    read(module, inputs=torch.randn(6, 4))
    assert torch.equal(module.room, torch.tensor(2))
    with pytest.raises(RuntimeError), repaired(module):
        raise RuntimeError
    assert isinstance(module.room, torch.Tensor)


class Products(nn.Module):
    def forward(self, x):
        square = x[:, :9].reshape(-1, 3, 3) + 3 * torch.eye(3)
        return torch.cumprod(x, 1), torch.linalg.inv(square), torch.linalg.inv(square[:, :2, :2])


def test_running_products_and_small_inverses_are_written_out():
    x = torch.randn(2, 10)
    x[0, 3], x[1, 5] = 0.0, -2.0
    exported = export(Products(), x, ["batch"], name="products")
    assert "also batch 1 and batch 3" in proved(exported).notes[-1]


class Sorted(nn.Module):
    def forward(self, x):
        return torch.sort(x, dim=0, stable=True)[1], torch.argsort(x, dim=-1, stable=True, descending=True)


def test_a_stable_sort_keeps_equal_elements_in_order():
    x = torch.randint(0, 3, (4, 24)).float()
    exported = export(Sorted(), x, name="sorted")
    proved(exported)
    expected = np.argsort(-x.numpy(), axis=-1, kind="stable")
    assert (exported.eager(exported.tensors)["output_1"] == expected).all()


class Codec(nn.Module):
    """How neural codecs pad: kernel, stride and padding are tensors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 4, 3)
        for name, value in (("kernel_size", 4), ("stride", 3), ("padding_total", 1)):
            self.register_buffer(name, torch.tensor(value))

    def _get_extra_padding_for_conv1d(self, x):
        frames = (x.shape[-1] - self.kernel_size + self.padding_total) / self.stride + 1
        frames = torch.ceil(frames).to(torch.int64) - 1
        return frames * self.stride + self.kernel_size - self.padding_total - x.shape[-1]

    def forward(self, x):
        return self.conv(nn.functional.pad(x, (1, self._get_extra_padding_for_conv1d(x))))


def test_padding_of_codecs_follows_the_length():
    loaded = read(Codec(), inputs=torch.randn(2, 2, 12), dynamic=["batch", "samples=x:2"])
    assert "samples 13" in loaded.notes[-1]
    assert "samples 24" in loaded.notes[-1]


@pytest.mark.parametrize(
    ("pool", "kernel"),
    [
        (nn.AvgPool2d(9, ceil_mode=True), [4, 5]),
        (nn.MaxPool2d(9, ceil_mode=True), [4, 5]),
        (nn.AvgPool2d((2, 9), (2, 9), ceil_mode=True), [2, 5]),
        (nn.AvgPool2d(3, ceil_mode=True), [3, 3]),
        (nn.AvgPool2d(9, padding=4, ceil_mode=True), [9, 9]),
    ],
)
def test_a_window_is_no_larger_than_what_it_pools(pool, kernel):
    exported = export(pool, torch.randn(2, 3, 4, 5), ["batch"], name="pool")
    assert "also batch 1 and batch 3" in proved(exported).notes[-1]
    (found,) = (n for n in exported.model.graph if n.op_type.endswith("Pool"))
    assert list(found.attributes["kernel_shape"].as_ints()) == kernel


class Joined(nn.Module):
    """As a model of images and text takes its images apart and puts them together."""

    def forward(self, x):
        rows = list(x)
        assert isinstance(rows, list)
        assert isinstance(list("ab"), list)
        return torch.cat(rows, dim=0) * 2


def test_rows_that_are_put_together_again_keep_the_axis_free():
    loaded = read(Joined(), inputs=torch.randn(2, 3, 4), dynamic=["batch"])
    assert "also batch 1 and batch 3" in loaded.notes[-1]
    assert torch.cat.__module__ != "optkit.exporting.rows"
    assert "list" not in globals()


class Stacked(nn.Module):
    def forward(self, x):
        return torch.stack([row * 2 for row in list(x)]) + torch.cat(list(x), dim=1).sum()


def test_rows_that_are_used_one_by_one_are_as_many_as_the_example_has():
    assert read(Stacked(), inputs=torch.randn(2, 3, 4)).notes[-1].startswith("computes the same")
    with pytest.raises(ModelError, match="batch"):
        read(Stacked(), inputs=torch.randn(2, 3, 4), dynamic=["batch"])


@pytest.mark.needs("transformers")
def test_state_space_layers_are_one_loop_of_any_length():
    from transformers import MambaConfig, MambaModel
    from transformers.models.mamba import modeling_mamba

    before = dict(vars(modeling_mamba))
    small = MambaConfig(vocab_size=20, hidden_size=8, state_size=4, num_hidden_layers=1)
    inputs = {"input_ids": torch.randint(0, 20, (2, 6)), "use_cache": False}
    loaded = read(MambaModel(small).eval(), inputs=inputs, dynamic=["batch", "sequence"])
    assert "also batch 1, sequence 7 and batch 3, sequence 12" in loaded.notes[-1]
    assert [n.op_type for n in loaded.model.graph].count("Scan") == 1
    assert {k: v for k, v in vars(modeling_mamba).items() if before.get(k) is not v} == {}


@pytest.mark.needs("transformers")
@pytest.mark.parametrize(
    ("durations", "speed"),
    [([[2, 0, 3], [1, 1, 0]], 1.0), ([[0, 0, 0], [0, 0, 0]], 1.0), ([[0, 0, 0], [1, 2, 1]], 1.0), ([[2, 1, 3], [1, 4, 0]], 1.5)],
)  # fmt: skip
def test_repeating_by_counting_is_what_the_loop_does(durations, speed):
    from transformers.models.fastspeech2_conformer.modeling_fastspeech2_conformer import length_regulator

    x, counts = torch.randn(2, 3, 4), torch.tensor(durations)
    assert torch.equal(repeat(x, counts, speed), length_regulator(x, counts.clone(), speed))


def _vilt(**more):
    from transformers import ViltConfig, ViltForQuestionAnswering

    torch.manual_seed(0)
    small = ViltConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8, vocab_size=90,
        max_position_embeddings=16, num_labels=3, initializer_range=0.5, **more,
    )  # fmt: skip
    module = ViltForQuestionAnswering(small).eval()
    for embedding in (module.vilt.embeddings.position_embeddings, module.vilt.embeddings.cls_token):
        torch.nn.init.normal_(embedding)
    # The second image is 24 by 16, padded to 32 by 32.
    mask = torch.ones(2, 32, 32, dtype=torch.int64)
    mask[1, 24:], mask[1, :, 16:] = 0, 0
    return module, {
        "input_ids": torch.randint(3, 90, (2, 6)),
        "pixel_values": torch.randn(2, 3, 32, 32),
        "pixel_mask": mask,
    }


@pytest.mark.needs("transformers")
def test_patches_in_their_place_give_what_patches_in_any_order_give():
    module, inputs = _vilt()
    eager = module(**inputs).logits
    with repaired(module):
        ours = module(**inputs).logits
    assert torch.allclose(ours, eager, atol=1e-4)
    assert not torch.allclose(eager[0], eager[1], atol=0.1)
    assert "visual_embed" not in vars(module.vilt.embeddings)
    loaded = read(module, inputs=inputs, dynamic={name: {0: "batch"} for name in inputs})
    assert "also batch 1 and batch 3" in loaded.notes[-1]


@pytest.mark.needs("transformers")
def test_where_the_draw_decides_which_patches_count_nothing_is_repaired():
    module, inputs = _vilt(max_image_length=9)
    with pytest.raises(ModelError, match="modeling_vilt"):
        read(module, inputs=inputs)
