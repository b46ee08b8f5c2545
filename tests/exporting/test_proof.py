"""What counts as proved: every free axis at sizes of its own, and numbers that rounding explains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optkit.errors import ModelError, UsageError
from optkit.exporting.difference import difference
from optkit.frontend import read

nn = torch.nn
pytestmark = pytest.mark.needs("torch", "onnxscript")


class Swapped(nn.Module):
    """Traced, it takes one axis for the other; at equal sizes nobody sees it."""

    def forward(self, x):
        n = x.shape[2] if torch.compiler.is_compiling() else x.shape[3]
        return x.sum(3, keepdim=True) * torch.ones(n)


def test_axes_of_one_size_are_told_apart():
    with pytest.raises(ModelError, match=r"output 'output' at batch 1, height 9, width 10 came out as"):
        read(Swapped(), inputs=torch.randn(2, 1, 8, 8), dynamic=["batch", "height", "width"])


class Square(nn.Module):
    """Takes squares alone, of even sides."""

    def forward(self, x):
        assert x.shape[2] == x.shape[3], "not a square"
        assert x.shape[2] % 4 == 0, "not a multiple of four"
        return x.mean((2, 3))


def test_axes_that_must_move_together_do():
    free = {"x": {0: "batch", 2: "side", 3: "side"}}
    loaded = read(Square(), inputs=torch.randn(2, 1, 8, 8), dynamic=free)
    assert "also batch 3, side 16" in loaded.notes[-1]


class Fixed(nn.Module):
    def forward(self, x):
        if not torch.compiler.is_compiling() and x.shape[3] != 8:
            raise ValueError("eight columns are wanted")
        return x * 2


def test_an_axis_that_the_module_never_takes_at_another_size_is_not_free():
    with pytest.raises(
        UsageError, match="runs at no other size of width, so that free axes cannot"
    ) as caught:
        read(Fixed(), inputs=torch.randn(2, 1, 8, 8), dynamic=["batch", "height", "width"])
    assert "eight columns are wanted" in str(caught.value)
    assert "test_proof.py:" in str(caught.value)


class Overflows(nn.Module):
    """In float32 beyond its range, in float64 not: no licence for other numbers."""

    def forward(self, x):
        big = (x * 1e30) * (x * 1e30)
        return torch.stack([big, x * (3.0 if torch.compiler.is_compiling() else 2.0)])


def test_overflow_in_float32_excuses_nothing():
    with pytest.raises(ModelError, match="differs from eager by"):
        read(Overflows(), inputs=torch.rand(4) + 1)


class Draws(nn.Module):
    def __init__(self, all_of_it):
        super().__init__()
        self.all_of_it = all_of_it

    def forward(self, x):
        noisy = x + torch.randn_like(x)
        return noisy if self.all_of_it else (x * 2, noisy)


@pytest.mark.parametrize(("all_of_it", "said", "last"), [(False, "not all of its", "computes the same"), (True, "none of its", "runs")])  # fmt: skip
def test_outputs_that_are_random_are_not_said_to_be_the_same(all_of_it, said, last):
    loaded = read(Draws(all_of_it), inputs=torch.randn(2, 4))
    assert any(said in note for note in loaded.notes)
    assert loaded.notes[-1].startswith(last)


@pytest.mark.parametrize(
    ("found", "expected", "apart"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.2], [1.0, 2.0], 0.1),
        ([np.nan, 2.0], [np.nan, 2.0], 0.0),
        ([1.0, np.inf], [1.0, 2.0], np.inf),
        ([1, 2, 3, 5], [1, 2, 3, 4], 0.25),
        ([], [], 0.0),
        ([1.0], [1.0, 2.0], np.inf),
    ],
)
def test_differences_are_relative_to_the_largest_value(found, expected, apart):
    kind = np.int64 if all(isinstance(v, int) for v in expected) and expected else np.float32
    got = difference(np.array(found, kind), np.array(expected, kind))
    assert got == pytest.approx(apart)
