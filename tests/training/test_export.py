"""A trained module against the graph that is made of it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the package torch")

from torch import nn  # noqa: E402

from optkit.errors import ModelError  # noqa: E402
from optkit.formats import FORMATS  # noqa: E402
from optkit.passes.quantization.fake import FakeQuantize  # noqa: E402
from optkit.training_export import final  # noqa: E402


class _Ties(nn.Module):
    """A grid at the end; eager goes over to the next step where a graph goes back, and some steps beyond."""

    def __init__(self, beyond):
        super().__init__()
        self.grid = FakeQuantize(FORMATS["u8"])
        self.grid.observer = None
        with torch.no_grad():
            self.grid.log_scale.fill_(0.0)
        self.grid.store()
        self.beyond = beyond

    def forward(self, x):
        y = self.grid(x) if torch.compiler.is_exporting() else torch.floor(x + 0.5) + self.beyond
        return y.transpose(0, 1)


# Ties go to even in a graph: 0, 2, 2.
_X = torch.tensor([[0.5, 1.5, 2.5]])


def test_a_value_that_rounds_to_the_next_step_of_the_output_is_no_defect():
    graph = final(_Ties(0).eval(), (_X,), None)
    assert any(n.op_type == "DequantizeLinear" for n in graph.graph)


def test_two_steps_are():
    with pytest.raises(
        ModelError, match=r"output 'output' of the graph differs from the trained module by 2, more than one"
    ):
        final(_Ties(1).eval(), (_X,), None)
