"""Instructions of many programs through one start of the disassembler, against one start a program."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from optkit.kernels import KERNELS
from optkit.kernels.build import build
from optkit.targets.gpu import GFX942

pytestmark = pytest.mark.needs("triton")

SPIN = bytes.fromhex("4779fc00fcffffffffff830300c00f00")  # BRA to itself on sm_90, which programs end with


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path))


def test_programs_in_a_row_have_the_instructions_that_each_has_alone():
    from optkit.kernels.triton.sass import tool

    kernels = [KERNELS[name]() for name in ("swiglu", "linear")]
    jobs = [
        (kernel.program(kernel.examples[0], capability), capability)
        for kernel in kernels
        for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
    ]
    for one in build(jobs):
        text = tool("nvdisasm", "--print-code", "--no-dataflow", str(one.code))
        names = re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
        assert len(names) > 100
        assert one.record["instructions"] == Counter(names), one.record["arch"]


@pytest.mark.parametrize(
    ("codes", "why"),
    [
        ([SPIN, b"\xff" * 16], "nvdisasm: .*Illegal instruction"),
        ([SPIN, b""], "not a whole number of instructions"),
        ([SPIN[:8], SPIN[:8]], "not a whole number of instructions"),
    ],
)
def test_bytes_that_are_no_instructions_are_refused(codes, why):
    from optkit.kernels.triton.sass import mixes

    assert mixes([SPIN, SPIN + SPIN], "sm_90a") == [{"BRA": 1}, {"BRA": 2}]
    with pytest.raises(RuntimeError, match=f"(?s){why}"):
        mixes(codes, "sm_90a")


def test_a_disassembler_that_leaves_instructions_out_is_not_believed(monkeypatch):
    from optkit.kernels.triton import sass

    whole = sass.tool
    monkeypatch.setattr(sass, "tool", lambda *words: whole(*words).rsplit("/*0010*/", 1)[0])
    with pytest.raises(RuntimeError, match="names 1 of 2 instructions for sm_90a"):
        sass.mixes([SPIN, SPIN], "sm_90a")


def test_a_disassembler_that_fails_is_the_reason_why_its_programs_are_refused(monkeypatch, tmp_path):
    from optkit.kernels.triton import worker

    def fail(codes, arch):
        raise RuntimeError(f"nvdisasm knows no {arch}")

    monkeypatch.setattr(worker, "mixes", fail)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    kernel = KERNELS["swiglu"]()
    jobs = [
        {
            "key": name,
            "program": kernel.program(kernel.examples[0], capability).record(),
            "capability": capability,
        }
        for name, capability in (("nvidia", (8, 9)), ("amd", GFX942))
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    worker.main(tmp_path)
    nvidia, amd = (json.loads((tmp_path / f"{name}.json").read_bytes()) for name in ("nvidia", "amd"))
    assert nvidia["error"] == "nvdisasm knows no sm_89"
    assert "error" not in amd and amd["instructions"]
