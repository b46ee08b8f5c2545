"""Python loops over what tensors hold become loops of the graph; held against the module in eager mode at other sizes."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from optkit.errors import ModelError
from optkit.exporting.export import export
from optkit.frontend import read
from optkit.graph import walk

nn = torch.nn
pytestmark = pytest.mark.needs("torch", "onnxscript")


def _overlap(boxes):
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    return shared / (area[:, None] + area[None] - shared)


def _suppress(boxes, scores, threshold):
    order, overlap = scores.argsort(descending=True), _overlap(boxes)
    keep = []
    while order.numel() > 0:
        best = order[0]
        keep.append(best)
        rest = order[1:]
        order = rest[overlap[best][rest] <= threshold]
    return torch.stack(keep)


class Detector(nn.Module):
    """The suppression of textbooks, in a function beside the module, with a threshold of the module's."""

    def __init__(self, threshold=0.3):
        super().__init__()
        self.threshold = threshold
        self.head = nn.Linear(4, 3)

    def forward(self, boxes, scores):
        kept = _suppress(boxes, scores, self.threshold)
        return boxes[kept], self.head(boxes[kept])


class Halved(nn.Module):
    """How often the data says, on a tensor whose shape stays, with a limit of the module's."""

    def __init__(self):
        super().__init__()
        self.limit, self.out = 1.0, nn.Linear(4, 2)

    def forward(self, x):
        steps = torch.zeros((), dtype=torch.int64)
        while x.abs().max() > self.limit:
            x = x * 0.5
            steps = steps + 1
        return self.out(x), steps


class Counted(nn.Module):
    """As many terms as a tensor says."""

    def forward(self, x, n):
        total = torch.zeros_like(x)
        for i in range(int(n)):
            total = total + x**i
        return total


class Branching(nn.Module):
    """Two loops, one with a branch."""

    def forward(self, x):
        while x.sum() > 10:
            x = x - 1 if x[0].sum() > x[1].sum() else x - 2
            if x.max() > 9:
                x = x / 2
        x = x.tanh()
        while x.sum() < 1:
            x = x + 0.5
        return x * 2


def _boxes(count, seed):
    random = np.random.default_rng(seed)
    corner, size = random.uniform(0, 6, (count, 2)), random.uniform(1, 4, (count, 2))
    scores = random.permutation(count) / count
    return torch.tensor(np.hstack([corner, corner + size]), dtype=torch.float32), torch.tensor(
        scores, dtype=torch.float32
    )


def _session(loaded):
    import onnx_ir as ir

    return onnxruntime.InferenceSession(
        ir.to_proto(loaded.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )


def _agree(module, session, inputs):
    names = [i.name for i in session.get_inputs()]
    with torch.no_grad():
        wanted = module(*inputs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    found = session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)
    return found


def test_the_suppression_of_textbooks_keeps_the_boxes_that_it_keeps_in_eager_mode():
    module = Detector().eval()
    loaded = read(module, inputs=_boxes(12, 0), dynamic={"boxes": {0: "n"}, "scores": {0: "n"}})
    assert "Loop" in {n.op_type for n in loaded.model.graph}
    session = _session(loaded)
    counts = [
        len(_agree(module, session, _boxes(n, seed))[0]) for n, seed in ((12, 1), (30, 2), (3, 3), (1, 4))
    ]
    assert len(set(counts)) > 2


def test_what_keeps_its_shape_keeps_it_for_the_layers_behind():
    module = Halved().eval()
    session = _session(read(module, inputs=torch.randn(3, 4) * 9, dynamic={"x": {0: "batch"}}))
    steps = [
        int(_agree(module, session, [torch.full((n, 4), size)])[1])
        for n, size in ((3, 9.0), (5, 100.0), (1, 0.5))
    ]
    assert steps == [4, 7, 0]


def test_a_loop_is_as_long_as_a_tensor_says():
    module = Counted().eval()
    session = _session(read(module, inputs=(torch.rand(3), torch.tensor(2))))
    for n in (0, 1, 5):
        _agree(module, session, (torch.rand(3), torch.tensor(n)))


def test_several_loops_and_branches_in_them():
    module = Branching().eval()
    session = _session(read(module, inputs=torch.rand(2, 3) * 20))
    for seed in range(4):
        torch.manual_seed(seed)
        _agree(module, session, [torch.rand(2, 3) * 30])


def test_functions_are_the_user_s_again_afterwards():
    before = _suppress.__code__
    found = export(Detector().eval(), _boxes(12, 0))
    assert found.rung == "static, with loops compiled"
    assert _suppress.__code__ is before
    assert not [name for name in _suppress.__globals__ if name.startswith("loop_")]


def test_nodes_of_a_loop_know_their_line():
    loaded = read(Halved().eval(), inputs=torch.randn(3, 4) * 9)
    (loop,) = [n for n in loaded.model.graph if n.op_type == "Loop"]
    assert loop.metadata_props["optkit.source"].startswith("exporting/test_loops.py:")
    assert {n.op_type for n in walk(loaded.model)} >= {"Loop", "Mul", "Greater"}


class Leaving(nn.Module):
    def forward(self, x):
        while x.sum() > 0:
            x = x - 1
            if x.max() < 0.5:
                return x
        return x + 1


class Asking(nn.Module):
    def weigh(self, x):
        return x * 0.5

    def forward(self, x):
        while x.sum() > 1:
            x = self.weigh(x)
        return x


class Listing(nn.Module):
    def forward(self, x, found=()):
        found = list(found)
        while x.sum() > 0:
            found.append(float(x.sum()))
            x = x - 1
        return torch.tensor(found)


@pytest.mark.parametrize("module", [Leaving(), Asking(), Listing()], ids=lambda m: type(m).__name__)
def test_what_cannot_be_compiled_is_refused_with_the_line_at_which_tracing_stopped(module):
    with pytest.raises(ModelError, match=r"cannot be traced: .*test_loops\.py:\d+"):
        export(module.eval(), torch.rand(2, 3))
