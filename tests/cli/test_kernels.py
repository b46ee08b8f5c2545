"""``optkit kernels``."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from optkit.cli.app import main
from optkit.kernels import KERNELS
from optkit.kernels.triton.matmul import Linear


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_list_names_all_and_needs_nothing(capsys):
    assert main(["kernels", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found] == list(KERNELS)
    assert all(row["what"] and row["source"] for row in found)
    assert main(["kernels", "list"]) == 0
    assert "optkit.AddRmsNorm" in capsys.readouterr().out


@pytest.mark.needs("triton", "torch")
def test_check_build_and_inspect_tell_that_nothing_ran_on_a_gpu(capsys):
    assert main(["kernels", "check", "rms-norm", "-t", "l4"]) == 0
    said = capsys.readouterr()
    assert "all pass" in said.out
    assert "nothing was run on a GPU" in said.err
    assert main(["kernels", "build", "rms-norm", "-t", "l4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(row["cached"] and row["passed"] and row["ran_on_device"] is False for row in found)
    assert main(["kernels", "inspect", "rms-norm", "-t", "l4"]) == 0
    said = capsys.readouterr()
    for word in ("multiples of 16: x", "cdiv(rows", "LDG.E.128", "blocks of", "not a measurement"):
        assert word in said.out
    assert "measured" not in said.out


@pytest.mark.needs("triton")
def test_a_failing_gate_is_named_and_is_exit_code_1(capsys, monkeypatch):
    from optkit.kernels.triton import norm

    monkeypatch.setattr(norm, "BLOCKS", {(8, 9): (8192, 1)})
    assert main(["kernels", "build", "layer-norm", "-t", "l4"]) == 1
    said = capsys.readouterr()
    assert "stack" in said.err


@pytest.mark.needs("triton", "torch")
def test_check_names_the_finalists_that_a_bundle_would_leave_out(capsys, monkeypatch):
    monkeypatch.setattr(Linear, "finalists", lambda self, *a: (p := self.program(*a), replace(p, stages=9)))
    assert main(["kernels", "check", "linear", "-t", "l4", "--json"]) == 0
    said = capsys.readouterr()
    told, _ = json.loads(said.out)["left_out"]
    assert (told["kernel"], told["target"], told["gate"]) == ("linear", "l4", "shared memory")
    assert "9 stages" in told["config"]
    line = f"left out: linear ({told['config']}) for l4: shared memory: {told['found']}"
    assert line in said.err
    assert main(["kernels", "check", "linear", "-t", "l4"]) == 0
    said = capsys.readouterr()
    assert line in said.err
    assert "1 of 2 finalists" in " ".join(said.err.split())


def test_unknown_kernels_and_targets_are_usage_errors(capsys):
    assert main(["kernels", "build", "rms-norn"]) == 2
    assert "rms-norm" in capsys.readouterr().err
    assert main(["kernels", "build", "rms-norm", "-t", "cpu"]) == 2
    assert main(["kernels"]) == 0


def test_formats_that_no_target_has_are_refused_before_anything_is_compiled(capsys, monkeypatch):
    monkeypatch.setattr("optkit.workbench.build", lambda *_, **__: pytest.fail("compiled"))
    assert main(["kernels", "build", "linear-fp8", "-t", "a100", "-t", "a10"]) == 2
    said = capsys.readouterr().err
    assert "linear-fp8 for a100: sm_80 has no fp8; linear-fp8 for a10: sm_86 has no fp8" in said


@pytest.mark.needs("triton")
def test_what_is_left_out_for_a_target_is_told(capsys):
    assert main(["kernels", "build", "rotary-write-quantized", "-t", "a100", "--json"]) == 0
    said = capsys.readouterr()
    assert [row["problem"]["stored"] for row in json.loads(said.out)] == ["int8"]
    assert "not built: rotary-write-quantized for a100: sm_80 has no fp8" in said.err


def test_without_triton_building_is_not_possible_here(capsys, monkeypatch):
    monkeypatch.setattr("optkit.kernels.build.installed", lambda: False)
    assert main(["kernels", "build", "rms-norm"]) == 4
    assert "pip install 'optkit[triton]'" in capsys.readouterr().err
