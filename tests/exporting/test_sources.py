"""Where modules come from: factories, exported programs, TorchScript, folders of Hugging Face, and checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from optkit.errors import UsageError
from optkit.exporting.sources import load_weights, open_source
from optkit.frontend import is_torch, load, read

nn = torch.nn
pytestmark = pytest.mark.needs("torch", "onnxscript")

FACTORIES = """
import torch

def network():
    torch.manual_seed(3)
    return torch.nn.Linear(4, 2), (torch.randn(2, 4),)

def needy(size):
    return network()

def broken():
    return 1 / 0

def alone():
    return network()[0]

pair = (torch.nn.Linear(4, 2), torch.zeros(1, 4), ["batch"])
number = 7
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_networks", None)


def test_a_factory_is_called_and_its_inputs_taken(factories):
    loaded = read("my_networks:network", dynamic=["batch"])
    assert loaded.name == "network"
    assert [str(v) for v in loaded.model.graph.inputs[0].shape] == ["batch", "4"]
    assert str(factories) not in sys.path


def test_a_tuple_brings_its_free_axes():
    found = open_source((nn.Linear(4, 2), torch.zeros(1, 4), ["batch"]))
    assert found.dynamic == ["batch"]
    assert found.name == "Linear"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_networks:missing", "has no 'missing'"),
        ("my_networks:needy", "needs arguments: size"),
        ("my_networks:broken", r"my_networks\.py:\d+: ZeroDivisionError"),
        ("my_networks:number", "int is no function"),
        ("no_networks:network", "cannot import no_networks"),
        ("my_networks:alone", "needs example inputs"),
    ],
)
def test_a_factory_that_does_not_serve_says_why(factories, name, message):
    with pytest.raises(UsageError, match=message):
        read(name)


def program(path: Path) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    free = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(net, (torch.randn(3, 4),), dynamic_shapes=free), path)
    return net


def test_an_exported_program_keeps_its_free_axes(tmp_path):
    program(tmp_path / "net.pt2")
    loaded = read(tmp_path / "net.pt2")
    assert [str(d) for d in loaded.model.graph.inputs[0].shape] == ["batch", "4"]
    assert "also batch 1 and batch 4" in loaded.notes[-1]


def test_an_exported_program_has_decided_its_axes(tmp_path):
    program(tmp_path / "net.pt2")
    with pytest.raises(UsageError, match="decided when it was exported"):
        read(tmp_path / "net.pt2", dynamic=["batch"])


def test_a_broken_program_is_named(tmp_path):
    (tmp_path / "net.pt2").write_bytes(b"PK nothing")
    with pytest.raises(UsageError, match="is not an exported program"):
        load(tmp_path / "net.pt2")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["pt", "jit"])
def test_torchscript_is_imported_with_inputs(tmp_path, kind):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh()).eval()
    torch.jit.trace(net, torch.randn(2, 4)).save(tmp_path / f"net.{kind}")
    loaded = read(tmp_path / f"net.{kind}", inputs=torch.randn(2, 4), dynamic=["batch"])
    assert "also batch 1 and batch 3" in loaded.notes[-1]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_without_inputs_says_what_to_do(tmp_path):
    torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4)).save(tmp_path / "net.pt")
    with pytest.raises(UsageError, match="does not say what its inputs are") as caught:
        read(tmp_path / "net.pt")
    assert "torch.export.save" in str(caught.value.hint)


def test_weights_alone_are_no_network(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="holds weights, and no network") as caught:
        load(tmp_path / "w.pt")
    assert "--weights" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.ckpt"])
def test_a_pickled_module_is_refused_unread(tmp_path, name):
    torch.save(nn.Linear(2, 2), tmp_path / name)
    with pytest.raises(UsageError, match="pickles can run any code"):
        load(tmp_path / name)


@pytest.mark.needs("safetensors")
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_checkpoint_goes_into_the_module(tmp_path, kind):
    trained, fresh = nn.Linear(4, 2), nn.Linear(4, 2)
    path = tmp_path / f"w.{kind}"
    if kind == "pt":
        torch.save({"model": {f"module.{k}": v for k, v in trained.state_dict().items()}}, path)
    else:
        from safetensors.torch import save_file

        save_file(trained.state_dict(), path)
    model = read(fresh, inputs=torch.randn(1, 4), weights=path).model
    weights = {v.const_value.numpy().tobytes() for v in model.graph.initializers.values()}
    assert trained.bias.detach().numpy().tobytes() in weights


def test_weights_are_found_beside_the_state_of_an_optimizer(tmp_path):
    trained, fresh = nn.Linear(4, 2), nn.Linear(4, 2)
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, "weights": trained.state_dict()}, tmp_path / "w.pt")
    assert load_weights(fresh, tmp_path / "w.pt") == ()
    assert torch.equal(fresh.weight, trained.weight)


def test_a_checkpoint_that_does_not_fit_lists_what(tmp_path):
    torch.save(nn.Linear(3, 2, bias=False).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"bias is missing; weight is \[2, 3\], not \[2, 4\]"):
        load_weights(nn.Linear(4, 2), tmp_path / "w.pt")


def test_what_a_checkpoint_has_too_much_is_said(tmp_path):
    torch.save({**nn.Linear(4, 2).state_dict(), "pooler.bias": torch.zeros(1)}, tmp_path / "w.pt")
    loaded = read(nn.Linear(4, 2), inputs=torch.randn(1, 4), weights=tmp_path / "w.pt")
    assert "w.pt holds 1 tensors that the module has no place for: pooler.bias" in loaded.notes


def test_a_checkpoint_with_code_is_refused(tmp_path):
    torch.save(nn.Linear(4, 2), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="cannot be read without running code"):
        load_weights(nn.Linear(4, 2), tmp_path / "w.pt")


@pytest.mark.needs("transformers", "safetensors")
def test_a_hugging_face_folder_is_read_from_disk(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    small = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=64
    )  # fmt: skip
    net = BertForSequenceClassification(small).eval()
    net.save_pretrained(tmp_path / "bert")
    loaded = read(tmp_path / "bert")
    names = [v.name for v in loaded.model.graph.inputs]
    assert names == ["input_ids", "attention_mask", "token_type_ids"]
    assert "its example inputs were drawn at random" in loaded.notes[0]
    assert [str(d) for d in loaded.model.graph.inputs[0].shape] == ["batch", "sequence"]
    assert any(
        "bert.encoder.layer.0" in n.metadata_props.get("optkit.module", "") for n in loaded.model.graph
    )


@pytest.mark.needs("transformers", "safetensors")
def test_weights_that_a_folder_lacks_are_not_drawn_at_random(tmp_path):
    from transformers import BertConfig, BertModel

    small = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(small).save_pretrained(tmp_path / "bert")
    config = tmp_path / "bert" / "config.json"
    config.write_text(config.read_text().replace('"BertModel"', '"BertForSequenceClassification"'))
    with pytest.raises(
        UsageError, match=r"no weights for classifier\.bias, classifier\.weight of BertForSeq"
    ):
        load(tmp_path / "bert")


def test_a_folder_without_weights_says_so(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"no \.safetensors"):
        load(tmp_path)


def test_inputs_are_for_modules(tmp_path):
    with pytest.raises(UsageError, match="a graph has its own"):
        read(b"", inputs=np.zeros(1))


@pytest.mark.parametrize(
    ("source", "expected"),
    [("a.b:c", True), ("m.pt2", True), ("m.onnx", False), ("c:/m.onnx", False), (b"", False), (nn.ReLU(), True), ((nn.ReLU(), 1), True)],
)  # fmt: skip
def test_what_is_for_torch(source, expected):
    assert is_torch(source) is expected
