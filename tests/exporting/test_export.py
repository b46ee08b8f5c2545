"""A module becomes a graph that computes the same, at every size, and whose nodes know where they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import optkit
from optkit.compilation import Compilation, available
from optkit.errors import DataError, ModelError, UsageError
from optkit.exporting.export import export
from optkit.frontend import proved, read
from optkit.graph import walk
from optkit.passes.base import Silent
from optkit.recipe import Recipe
from optkit.targets import target

nn = torch.nn
pytestmark = pytest.mark.needs("torch", "onnxscript")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(b, t, width))


class Net(nn.Module):
    """Words to classes; 32 positions at most."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(20, 16), nn.Parameter(torch.randn(32, 16))
        self.layers = nn.ModuleList([Layer()])
        self.head = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, ids):
        x = self.words(ids) + self.places[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(x.mean(1))}


def ids(batch=2, length=10):
    return torch.randint(0, 20, (batch, length))


def test_a_module_compiles_and_computes_the_same_at_sizes_that_were_never_traced(tmp_path):
    net, out = Net(), tmp_path / "artifact"
    artifact, report = optkit.compile(
        net, {"ids": ids()}, dynamic_shapes=["batch", "sequence"], target="cpu", recipe="fp32", out=out
    )
    assert net.training, "the module is left as it was"
    assert report.manifest.fidelity.inputs == "example inputs"
    assert report.manifest.versions["torch"] == torch.__version__
    net.eval()
    for batch, length in ((2, 10), (1, 1), (5, 32)):
        fed = ids(batch, length)
        found = artifact.run({"ids": fed.numpy()})
        # Sums of some tens of float32 products, in another order.
        np.testing.assert_allclose(found["logits"], net(fed)["logits"].detach().numpy(), atol=2e-6)


def test_what_was_compared_is_said(loaded):
    assert "exported in evaluation mode" in loaded.notes
    assert "also batch 1, sequence 11 and batch 3, sequence 20" in loaded.notes[-1]
    assert loaded.axes["sequence"] == (1, 32)
    shapes = [list(map(str, v.shape)) for v in (*loaded.model.graph.inputs, *loaded.model.graph.outputs)]
    assert shapes == [["batch", "sequence"], ["batch", "3"]]


def test_a_batch_beyond_what_the_module_takes_names_the_axis(tmp_path):
    long = [{"ids": np.zeros((1, 33), np.int64)}]
    with pytest.raises(DataError, match=r"'ids' has size 33 at axis 1, but 'sequence' is at most 32"):
        optkit.compile(
            Net(), inputs=ids(), dynamic_shapes=["batch", "sequence"], recipe="int8-static", data=long, out=tmp_path / "a"
        )  # fmt: skip
    assert not (tmp_path / "a").exists()


def test_a_shape_that_the_artifact_does_not_take_names_the_axis(tmp_path):
    artifact, _ = optkit.compile(
        Net(), inputs=ids(), dynamic_shapes=["batch"], recipe="fp32", out=tmp_path / "a"
    )
    with pytest.raises(DataError, match="'ids' has size 11 at axis 1, not 10"):
        artifact.run({"ids": np.zeros((2, 11), np.int64)})


@pytest.fixture(scope="module")
def loaded():
    torch.manual_seed(0)
    return read(Net(), inputs=(ids(),), dynamic=["batch,sequence"])


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8-static", "int8-static-all", "int8-dynamic"])
def test_every_node_knows_its_line_after_every_pass(recipe, loaded, tmp_path):
    fed = [{"ids": ids().numpy()} for _ in range(2)]
    work = Compilation(
        loaded, target("cpu"), available("onnxruntime"), optkit.data.CalibrationData(fed), None, seed=0, folder=tmp_path, progress=Silent()
    )  # fmt: skip
    model, _, _ = work.transform(Recipe.load(recipe))
    nodes = [n for n in walk(model) if n.op_type != "Constant"]
    lost = [f"{n.name} ({n.op_type})" for n in nodes if "optkit.source" not in n.metadata_props]
    assert not lost
    assert all("test_export.py:" in n.metadata_props["optkit.source"] for n in nodes)
    assert {n.metadata_props.get("optkit.module") for n in nodes} >= {
        "layers.0.norm",
        "layers.0.out",
        "head.3",
    }


class Baked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        return y + torch.zeros(int(y.detach().shape[1]) if not torch.compiler.is_compiling() else 6, 4)


def test_a_baked_size_names_node_and_line():
    with pytest.raises(
        ModelError, match=r"test_export\.py:\d+.* does not run at batch 1, sequence 7"
    ) as caught:
        read(Baked(), inputs=torch.randn(2, 6, 4), dynamic=["batch", "sequence"])
    assert "a size is baked in" in str(caught.value.hint)


class Broadcast(nn.Module):
    """What is baked is an output's size, with no node that would fail."""

    def forward(self, x):
        n = x.shape[1] if not torch.compiler.is_compiling() else 6
        return x.sum(1, keepdim=True) * torch.ones(n, 1)


def test_an_output_of_the_traced_size_names_the_constant():
    with pytest.raises(ModelError, match=r"came out as \[1, 6, 4\], eager gives \[1, 7, 4\]") as caught:
        read(Broadcast(), inputs=torch.randn(2, 6, 4), dynamic=["batch", "sequence"])
    assert "baked into the graph" in str(caught.value.hint)


class Different(nn.Module):
    def __init__(self):
        super().__init__()
        self.good, self.bad = nn.Linear(4, 4), Wrong()

    def forward(self, x):
        return self.bad(self.good(x)).relu()


class Wrong(nn.Module):
    def forward(self, x):
        return x * (2.0 if torch.compiler.is_compiling() else 2.1)


def test_other_numbers_name_the_first_layer_that_differs():
    with pytest.raises(ModelError, match=r"the first layer that differs is bad \(Wrong\)"):
        read(Different(), inputs=torch.randn(2, 4))


class Tiny(nn.Module):
    def forward(self, x):
        return x * (1e-12 if torch.compiler.is_compiling() else 2e-12)


def test_small_numbers_are_compared_too():
    with pytest.raises(ModelError, match="differs from eager"):
        read(Tiny(), inputs=torch.randn(2, 4))


def test_an_axis_that_the_module_itself_fixes_cannot_be_proved():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 24) if x.shape[1] == 6 else x.nope

    with pytest.raises((UsageError, ModelError), match=r"sequence|size of an axis"):
        read(Fixed(), inputs=torch.randn(2, 6, 4), dynamic=["sequence"])


def test_an_axis_of_one_stays_free():
    loaded = read(nn.Linear(4, 4), inputs=torch.randn(1, 4), dynamic=["batch"])
    assert [str(d) for d in loaded.model.graph.inputs[0].shape] == ["batch", "4"]
    assert "also batch 2 and batch 3" in loaded.notes[-1]


def test_weights_in_half_precision_become_float32():
    loaded = read(nn.Linear(4, 4).half(), inputs=torch.randn(2, 4).half())
    assert "float16; exported in float32" in loaded.notes[0]
    assert loaded.model.graph.inputs[0].dtype.name == "FLOAT"


def test_an_input_handed_through_keeps_both_names():
    class Through(nn.Module):
        def forward(self, x):
            return {"x": x, "y": x + 1}

    graph = proved(export(Through(), torch.randn(2), name="through")).model.graph
    assert [v.name for v in graph.inputs] == ["x"]
    assert [v.name for v in graph.outputs] == ["x.out", "y"]


def test_nodes_are_named_after_their_module(loaded):
    names = [str(n.name) for n in loaded.model.graph]
    assert len(set(names)) == len(names)
    assert any(name.startswith("layers.0.qkv/") for name in names)
    assert any(name.startswith("head.3/") for name in names)
