"""A program from a file is loaded without running what the file brings."""

from __future__ import annotations

import io
import os
import zipfile

import pytest
import torch

from optkit.errors import UsageError
from optkit.exporting.trust import load_program

nn = torch.nn
pytestmark = pytest.mark.needs("torch", "onnxscript")


class Half(nn.Module):
    """Has a size that is computed, a branch, and arithmetic on sizes."""

    def forward(self, x):
        y = x[:, : x.shape[1] // 2 + 1]
        z = torch.cond(y.sum() > 0, lambda t: t * 2, lambda t: t + 1, (y,))
        return z * torch.sym_max(x.shape[1], 3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "half.pt2"
    free = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    torch.export.save(torch.export.export(Half(), (torch.randn(2, 6),), dynamic_shapes=free), path)
    return path


def changed(plain, tmp_path, edit, more=()):
    path = tmp_path / "changed.pt2"
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
        for name in more:
            new.writestr(name, b"")
    return path


def replaced(old, new):
    def edit(name, data):
        assert "/models/" not in name or old in data
        return data.replace(old, new) if "/models/" in name else data

    return edit


def test_programs_with_sizes_branches_and_arithmetic_are_read(plain):
    program = load_program(plain)
    x = torch.randn(3, 9)
    assert torch.equal(program.module()(x), Half()(x))


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_pickled_objects_are_refused_unread(plain, tmp_path):
    mark, written = tmp_path / "mark", io.BytesIO()
    torch.save(((torch.randn(2, 6), Evil(mark)), {}), written)
    path = changed(plain, tmp_path, lambda n, d: written.getvalue() if "sample_inputs" in n else d)
    with pytest.raises(UsageError, match=r"holds pickled objects \(posix\.mkdir\), which can run any code"):
        load_program(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "target",
    ["torch.os.system", "torchx.os.system", "_operator.methodcaller", "torch.ops.load_library", "torch.ops.aten.add.__class__"],
)  # fmt: skip
def test_calls_of_what_is_no_operator_are_refused(plain, tmp_path, target):
    path = changed(plain, tmp_path, replaced(b"torch.ops.aten.sum.default", target.encode()))
    with pytest.raises(UsageError, match="holds a call of"):
        load_program(path)


@pytest.mark.parametrize(
    "code", ["__import__('os').mkdir('MARK') + ", "eval('1') + ", "().__class__.__name__ + ", "[1][0] + "]
)
def test_sizes_that_are_no_arithmetic_are_refused(plain, tmp_path, code):
    mark = tmp_path / "mark"
    text = code.replace("MARK", str(mark)).encode()
    path = changed(plain, tmp_path, replaced(b"Max(Integer(3)", text + b"Max(Integer(3)"))
    with pytest.raises(UsageError, match="holds the size"):
        load_program(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("half/data/aotinductor/model/a.so", "compiled libraries"),
        ("half/data/constants/custom_obj_0", "objects"),
        ("half/data/constants/opaque_obj_0", "pickles"),
        ("half/models/model.json", "files of the same name"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_with_more_than_tensors_are_refused(plain, tmp_path, place, what):
    with pytest.raises(UsageError, match=f"holds {what}"):
        load_program(changed(plain, tmp_path, lambda n, d: d, more=[place]))


def test_the_environment_is_as_it_was(plain, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    load_program(plain)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
