"""Accesses and races of kernels, by the sanitizer where it is installed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from optkit.cli.app import main
from optkit.errors import BackendUnavailableError
from optkit.kernels import KERNELS
from optkit.kernels.numerics import launch, sanitize
from optkit.workbench import memory

HOPPER = (9, 0)
checked = pytest.mark.needs("triton", "torch", "ttsem")


def norm(**constants):
    kernel = KERNELS["layer-norm"]()
    one = launch(kernel, kernel.small[1], HOPPER, 9)
    program = one.program
    return dataclasses.replace(
        one, program=dataclasses.replace(program, constants={**program.constants, **constants})
    )


@checked
def test_no_kernel_reads_or_writes_outside_its_tensors_or_races():
    found = memory((), HOPPER)
    assert {m.kernel for m in found} == set(KERNELS)
    for m in found:
        assert (m.fault, m.unjudged) == ("", ""), m
        # Matrix units of float32 cut its fraction to ten bits, which the interpreter does not do.
        kernel = KERNELS[m.kernel]()
        assert m.steps <= kernel.allowed(m.problem) or m.problem["format"] == "fp32", m


@checked
def test_rows_of_another_length_are_read_and_written_outside():
    (verdict,) = sanitize([norm(COLUMNS=128, BLOCK=128)], HOPPER)
    assert "norm" in verdict.fault
    assert verdict.outputs == []


@checked
def test_blocks_that_write_the_same_place_race():
    kernel = KERNELS["rotary-write"]()
    one = launch(kernel, kernel.small[0], HOPPER, 40)
    assert sanitize([one], HOPPER)[0].fault == ""
    inputs = list(one.inputs)
    inputs[4] = np.full_like(inputs[4], inputs[4].flat[0])  # the slot of every token
    (verdict,) = sanitize([dataclasses.replace(one, inputs=inputs)], HOPPER)
    assert verdict.fault


@checked
def test_the_command_reports_accesses(capsys):
    assert main(["kernels", "check", "layer-norm", "-t", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["memory"]
    assert found
    assert all(m["fault"] == "" for m in found)


@pytest.mark.needs("triton")
def test_without_the_sanitizer_the_line_that_installs_it_is_told(monkeypatch):
    monkeypatch.setattr("optkit.kernels.numerics.sanitizer", lambda: False)
    with pytest.raises(BackendUnavailableError) as caught:
        sanitize([norm()], HOPPER)
    assert "pip install ttsem" in caught.value.hint


@pytest.mark.needs("triton", "torch")
def test_without_the_sanitizer_the_command_says_what_was_not_checked(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr("optkit.kernels.numerics.sanitizer", lambda: False)
    assert main(["kernels", "check", "softmax", "-t", "h100"]) == 0
    assert "accesses and races were not checked" in capsys.readouterr().err
