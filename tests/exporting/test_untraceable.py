"""What cannot be exported names the line and a way out."""

from __future__ import annotations

import pytest
import torch

from optkit.errors import ModelError, UnsupportedOpError, UsageError
from optkit.frontend import read

nn = torch.nn
pytestmark = pytest.mark.needs("torch", "onnxscript")


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x


class Loop(nn.Module):
    def forward(self, x):
        left = x
        while left.numel():
            left = left[left > 0][1:]
            if left.sum() > 9:
                return left.mean()
        return left.sum()


@pytest.mark.parametrize(
    ("module", "code", "cause", "hint"),
    [
        (Branch(), "if x.sum() > 0:", "depends on the value of a tensor", "torch.where"),
        (Loop(), "if left.sum() > 9:", "depends on the value of a tensor", "torch.where"),
    ],
)
def test_control_flow_on_data_names_the_line_and_a_rewrite(module, code, cause, hint):
    with pytest.raises(ModelError, match=r"test_untraceable\.py:\d+") as caught:
        read(module, inputs=torch.randn(4))
    assert code in str(caught.value)
    assert cause in str(caught.value)
    assert hint in str(caught.value.hint)


def test_the_module_in_which_it_stops_is_named():
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Branch()))
    with pytest.raises(
        ModelError, match=r"cannot be traced: 1\.1 \(Branch\), .*test_untraceable\.py:\d+, `if"
    ):
        read(network, inputs=torch.randn(2, 4))
    broken = nn.ModuleDict({"head": nn.Linear(3, 3)})
    broken.forward = lambda x: broken["head"](x)
    with pytest.raises(UsageError, match=r"example inputs: head \(Linear\), .*test_untraceable\.py:\d+"):
        read(broken, inputs=torch.randn(2, 4))


def test_an_operator_that_onnx_lacks_names_its_line():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.airy_ai(x)

    with pytest.raises(UnsupportedOpError, match=r"airy_ai.*: 1\.0, exporting/test_untraceable\.py:\d+"):
        read(nn.Sequential(nn.ReLU(), nn.Sequential(Odd())), inputs=torch.rand(4))


def test_a_module_that_does_not_run_names_the_line():
    with pytest.raises(UsageError, match="does not run on the example inputs"):
        read(nn.Linear(3, 3), inputs=torch.randn(2, 4))


def test_inputs_that_do_not_fit_list_what_forward_takes():
    with pytest.raises(UsageError, match=r"inputs do not fit Branch\.forward") as caught:
        read(Branch(), inputs={"y": torch.randn(2)})
    assert "it takes x" in str(caught.value.hint)


@pytest.mark.parametrize("inputs", [None, (), 3, {"x": 3}])
def test_inputs_without_tensors_are_refused(inputs):
    with pytest.raises(UsageError):
        read(Branch(), inputs=inputs)
