"""What compiled kernels know of a GPU: limits of its architecture, and the number formats that it multiplies in."""

from __future__ import annotations

from dataclasses import dataclass

_KIB = 2**10

Capability = tuple[int, int]
"""An architecture: CUDA's compute capability, ``(9, 0)``; for AMD's the two halves of LLVM's number, ``gfx942`` is ``(94, 2)``."""
GFX942: Capability = (94, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Limits that decide how many blocks run at a time.

    Attributes:
        arch: As ``ptxas`` or LLVM writes it; with an ``a`` where kernels use instructions of this architecture alone.
        shared: Bytes of shared memory that one block may ask for.
        shared_unit: Bytes of shared memory of a multiprocessor.
        threads: Of a multiprocessor.
        blocks: Of a multiprocessor.
        registers: Of a multiprocessor, 32 bits each.
        lanes: Threads that run in step: a warp of NVIDIA's, a wave of AMD's.
    """

    arch: str
    shared: int
    shared_unit: int
    threads: int
    blocks: int
    registers: int = 65536
    lanes: int = 32


# Opt-in shared memory of a block and shared memory of a multiprocessor, KiB; threads, blocks and registers of a
# multiprocessor: NVIDIA CCCL 13.3, cuda/__device/arch_traits.h. AMD's: LLVM's AMDGPUUsage and "AMD Instinct MI300 ISA",
# 2024, sections 3.6 and 3.7: 4 units of 8 waves and 512 registers of 64 lanes, 64 KiB that the waves of a block share.
ARCHITECTURES: dict[Capability, Architecture] = {
    (7, 5): Architecture(arch="sm_75", shared=64 * _KIB, shared_unit=64 * _KIB, threads=1024, blocks=16),
    (8, 0): Architecture(arch="sm_80", shared=163 * _KIB, shared_unit=164 * _KIB, threads=2048, blocks=32),
    (8, 6): Architecture(arch="sm_86", shared=99 * _KIB, shared_unit=100 * _KIB, threads=1536, blocks=16),
    (8, 7): Architecture(arch="sm_87", shared=163 * _KIB, shared_unit=164 * _KIB, threads=1536, blocks=16),
    (8, 9): Architecture(arch="sm_89", shared=99 * _KIB, shared_unit=100 * _KIB, threads=1536, blocks=24),
    (9, 0): Architecture(arch="sm_90a", shared=227 * _KIB, shared_unit=228 * _KIB, threads=2048, blocks=32),
    (10, 0): Architecture(arch="sm_100a", shared=227 * _KIB, shared_unit=228 * _KIB, threads=2048, blocks=32),
    (12, 0): Architecture(arch="sm_120", shared=99 * _KIB, shared_unit=100 * _KIB, threads=1536, blocks=24),
    (12, 1): Architecture(arch="sm_121", shared=99 * _KIB, shared_unit=100 * _KIB, threads=1536, blocks=24),
    GFX942: Architecture(
        arch="gfx942", shared=64 * _KIB, shared_unit=64 * _KIB, threads=2048, blocks=16, registers=131072, lanes=64
    ),
}  # fmt: skip


def is_amd(capability: Capability) -> bool:
    """Whether the architecture is one of AMD's."""
    return capability == GFX942


def code_kind(arch: str) -> str:
    """The ending of files with machine code for an architecture."""
    return "hsaco" if arch.startswith("gfx") else "cubin"


def formats(capability: Capability) -> frozenset[str]:
    """Number formats with matrix instructions, or that weights may be stored in."""
    found = {"fp32", "fp16", "int8", "w8a16"}
    if capability >= (8, 0):
        found |= {"bf16", "w4a16"}
    if is_amd(capability):
        # Its floats of 8 bits have another bias, no negative zero and no infinity: no pass writes them.
        return frozenset(found)
    if capability >= (8, 9):
        found |= {"fp8"}
    if capability >= (10, 0):
        found |= {"nvfp4", "mxfp4", "mxfp8"}
    return frozenset(found)
