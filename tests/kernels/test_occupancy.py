"""Occupancy against NVIDIA's own header, compiled here."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from optkit.kernels.occupancy import occupancy
from optkit.targets.gpu import ARCHITECTURES, is_amd

_PROGRAM = r"""
#include <cstdio>
#include <cstring>
#include "cuda_occupancy.h"
int main() {
  int major, minor, shared_unit, shared, threads, registers, warps, used, blocks;
  while (scanf("%d %d %d %d %d %d %d %d %d", &major, &minor, &shared_unit, &shared, &threads, &blocks, &registers, &warps, &used) == 9) {
    cudaOccDeviceProp p; memset(&p, 0, sizeof p);
    p.computeMajor = major; p.computeMinor = minor; p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = threads; p.regsPerBlock = 65536; p.regsPerMultiprocessor = 65536; p.warpSize = 32;
    p.sharedMemPerBlock = 48 * 1024; p.sharedMemPerMultiprocessor = shared_unit; p.numSms = 1;
    p.sharedMemPerBlockOptin = shared; p.reservedSharedMemPerBlock = major >= 8 ? 1024 : 0;
    cudaOccFuncAttributes a; memset(&a, 0, sizeof a);
    a.maxThreadsPerBlock = 1024; a.numRegs = registers; a.sharedSizeBytes = 0;
    a.partitionedGCConfig = PARTITIONED_GC_OFF; a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    a.maxDynamicSharedSizeBytes = used;
    cudaOccDeviceState s; memset(&s, 0, sizeof s); s.carveoutConfig = SHAREDMEM_CARVEOUT_DEFAULT;
    cudaOccResult r; memset(&r, 0, sizeof r);
    int e = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, warps * 32, used);
    printf("%d\n", e ? -e : r.activeBlocksPerMultiprocessor);
  }
}
"""
CASES = list(
    itertools.product(
        sorted(c for c in ARCHITECTURES if not is_amd(c)),
        (16, 24, 32, 40, 64, 96, 128, 168, 200, 255),
        (1, 2, 3, 4, 8, 12, 16, 32),
        (
            0,
            100,
            1024,
            8 << 10,
            33000,
            48 << 10,
            64 << 10,
            98304,
            99 << 10,
            100 << 10,
            163 << 10,
            227 << 10,
            228 << 10,
        ),
    )
)


@pytest.mark.needs("triton")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_blocks_are_those_of_the_header_of_nvidia(tmp_path):
    include = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    (tmp_path / "o.cpp").write_text(_PROGRAM)
    subprocess.run(["g++", "-O1", f"-I{include}", "-o", tmp_path / "o", tmp_path / "o.cpp"], check=True)
    lines = []
    for c, registers, warps, used in CASES:
        limits = ARCHITECTURES[c]
        lines.append(
            f"{c[0]} {c[1]} {limits.shared_unit} {limits.shared} {limits.threads} {limits.blocks} {registers} {warps} {used}"
        )
    done = subprocess.run(
        [tmp_path / "o"], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    expected = [int(line) for line in done.stdout.split()]
    assert len(expected) == len(CASES)
    found = [occupancy(ARCHITECTURES[c], c, registers=r, shared=s, warps=w).blocks for c, r, w, s in CASES]
    wrong = [(case, f, e) for case, f, e in zip(CASES, found, expected, strict=True) if f != e]
    assert not wrong, wrong[:5]


def test_the_limit_is_named():
    def limit(**use):
        return occupancy(ARCHITECTURES[9, 0], (9, 0), **use).limit

    assert limit(registers=255, shared=0, warps=4) == "registers"
    assert limit(registers=16, shared=200 << 10, warps=4) == "shared memory"
    assert limit(registers=16, shared=0, warps=8) == "warps"
    assert limit(registers=16, shared=0, warps=1) == "blocks"
