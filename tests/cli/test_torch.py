"""PyTorch on the command line: from a factory and a program to an artifact."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytestmark = pytest.mark.needs("torch", "onnxscript")

NETWORK = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = torch.nn.Embedding(20, 16), torch.nn.Linear(16, 4)

    def forward(self, ids):
        return self.head(torch.relu(self.words(ids)).mean(1))

def network():
    torch.manual_seed(0)
    return Net(), (torch.randint(0, 20, (2, 6)),)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "cli_network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_factory_compiles_with_free_axes(optkit, here):
    ran = optkit("compile", "cli_network:network", "--dynamic", "batch,sequence", "-r", "fp32", "-o", "a")
    assert ran.code in (0, 3), ran.err  # whether so small a network gets faster is chance
    assert ran.out.strip() == "a"
    assert "also batch 1, sequence 7 and batch 3, sequence 12" in ran.err
    import torch
    from cli_network import network

    from optkit import load

    module, _ = network()
    for shape in ((1, 1), (4, 9)):
        ids = torch.randint(0, 20, shape)
        (found,) = load(here / "a").run({"ids": ids.numpy()}).values()
        # Sixteen products in float32.
        np.testing.assert_allclose(found, module.eval()(ids).detach().numpy(), atol=1e-6)


def test_inspect_shows_module_and_line(optkit, here):
    ran = optkit("inspect", "cli_network:network", "--nodes", "--json")
    assert ran.code == 0, ran.err
    nodes = json.loads(ran.out)["nodes_listed"]
    gather = next(n for n in nodes if n["op"] == "Gather")
    assert gather["module"] == "words"
    assert "cli_network.py:10" in gather["source"]


def test_quantize_takes_a_module(optkit, here):
    ran = optkit("quantize", "cli_network:network", "-p", "int8", "--calib", "random", "-o", "q.onnx")
    assert ran.code == 0, ran.err
    assert (here / "q.onnx").is_file()


def test_sizes_are_enough_for_a_module_without_inputs(optkit, here):
    (here / "cli_alone.py").write_text(NETWORK + "\ndef alone():\n    return Net()\n")
    ran = optkit("inspect", "cli_alone:alone", "--inputs", "ids=2x6:int64", "--json")
    assert ran.code == 0, ran.err
    ran = optkit("inspect", "cli_alone:alone", "--inputs", "2x6:int64", "--json")
    assert ran.code == 0, ran.err
    ran = optkit("inspect", "cli_alone:alone")
    assert ran.code == 2
    assert "--inputs x=1x3x224x224" in ran.err


def test_an_npz_is_one_example(optkit, here):
    np.savez(here / "one.npz", ids=np.zeros((3, 5), np.int64))
    ran = optkit("inspect", "cli_network:network", "--inputs", "one.npz", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["inputs"] == ["ids: int64[3, 5]"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("ids=2x", "NAME=SIZES is wanted"),
        ("ids=2x6:string", "string is not a type of inputs"),
        ("ids=2x6:int64,2x6", "either all inputs have a name"),
        ("nowhere.npz", "nowhere.npz"),
        ("broken.npz", "cannot be read"),
        ("words=2x6:int64", "it takes ids"),
    ],
)
def test_inputs_that_cannot_be_are_named(optkit, here, given, said):
    (here / "broken.npz").write_bytes(b"nothing")
    ran = optkit("inspect", "cli_network:network", "--inputs", given)
    assert ran.code == 2, ran.err
    assert said in ran.err


def test_what_cannot_be_quantized_is_named_as_it_was_given(optkit, here):
    (here / "cli_small.py").write_text(
        "import torch\n\ndef net():\n    return torch.nn.ReLU(), torch.ones(2, 3)\n"
    )
    ran = optkit("quantize", "cli_small:net", "-p", "int8-dyn", "-o", "q.onnx")
    assert ran.code == 1
    assert "hint: optkit inspect cli_small:net --why" in ran.err


def test_doctor_looks_at_modules_too(optkit, here):
    ran = optkit("doctor", "cli_network:network", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["ok"] is True


def test_an_axis_that_no_input_has_is_named(optkit, here):
    ran = optkit("compile", "cli_network:network", "--dynamic", "rows=idz:0", "-o", "a")
    assert ran.code == 2
    assert "unknown input 'idz'" in ran.err
    assert "did you mean 'ids'?" in ran.err
    assert not (here / "a").exists()
