"""Which processor this is, and which rows of the table it is one of."""

from __future__ import annotations

import json
import platform
from dataclasses import replace

import pytest

from optkit.cli.app import main
from optkit.targets import TARGETS, cpu, host
from optkit.targets.host import described, detected, flags, level

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu avx2 fma bmi2 f16c avx512f avx512bw avx512dq avx512vl {}

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
NEOVERSE = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd asimdhp asimddp {}
CPU part\t: 0xd40
"""
HASWELL = "flags : avx2 fma bmi2 f16c"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (HASWELL, "x86-avx2"),
        (HASWELL.replace("fma ", ""), None),
        (HASWELL + " avx512f", "x86-avx2"),  # Knights Landing: AVX-512 without BW
        (HASWELL + " avx_vnni", "x86-vnni"),  # Alder Lake: no AVX-512
        (XEON.format(""), "x86-avx512"),
        (XEON.format("avx512_vnni"), "x86-vnni"),
        (XEON.format("avx512_vnni amx_int8 amx_tile"), "x86-vnni"),
        (XEON.format("avx512_vnni amx_int8 amx_bf16"), "x86-amx"),
        (NEOVERSE.format(""), "arm64-dot"),
        (NEOVERSE.format("i8mm bf16"), "arm64-i8mm"),
        ("Features : fp asimd", None),
        ("", None),
    ],
)
def test_a_processor_is_the_strongest_row_whose_instructions_it_has(text, name):
    have = flags(described(text))
    found = level((*cpu.X86, *cpu.ARM64), have)
    assert (found.name if found else None) == name
    unknown = replace(TARGETS["cpu"], saturates=False)
    here, *rows = detected(unknown, (*cpu.X86, *cpu.ARM64), have)
    assert [row.name for row in rows if row.runs_here] == [n for n in (name,) if n]
    assert here.runs_here
    assert here.saturates == (name in ("x86-avx2", "x86-avx512"))


@pytest.mark.parametrize(
    ("text", "has"),
    [
        (XEON.format("avx512_vnni"), False),
        (XEON.format("avx512_vnni avx512_bf16"), True),  # Cooper Lake, Zen 4
        (XEON.format("avx512_vnni amx_int8 amx_bf16"), True),
        (NEOVERSE.format("i8mm"), False),
        (NEOVERSE.format("i8mm bf16"), True),
    ],
)
def test_this_machine_has_bfloat16_where_it_has_instructions_for_it_and_its_level_need_not(text, has):
    here, *rows = detected(TARGETS["cpu"], (*cpu.X86, *cpu.ARM64), flags(described(text)))
    assert ("bf16" in here.formats) == has
    assert [row.name for row in rows if "bf16" in row.formats] == ["x86-amx"]


def test_those_without_vnni_saturate_and_no_other():
    assert {t.name for t in (*cpu.X86, *cpu.ARM64) if t.saturates} == {"x86-avx2", "x86-avx512"}
    for row in (*cpu.X86, *cpu.ARM64):
        assert row.source and row.features


def test_cpu_says_what_it_is():
    here = TARGETS["cpu"]
    assert platform.machine() in here.arch
    assert all(f in here.arch.split() for f in host.TOLD if f in host.features())
    assert sum(t.runs_here for t in (*cpu.X86, *cpu.ARM64)) == 0 or any(
        t.runs_here and t.formats <= here.formats and t.saturates == here.saturates for t in TARGETS.values()
    )
    assert host.cores() >= 1


def test_the_table_names_the_level_and_whether_it_saturates(capsys):
    assert main(["targets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["x86-avx2"]["saturates"] and not rows["x86-vnni"]["saturates"]
    assert not (rows["x86-avx2"]["runs_here"] and rows["x86-vnni"]["runs_here"])
