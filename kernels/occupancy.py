"""How many blocks of a kernel run on a multiprocessor at a time; equal to NVIDIA's ``cuda_occupancy.h`` and to what LLVM says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optkit.targets.gpu import ARCHITECTURES, Architecture, Capability, is_amd

# cuda_occupancy.h for compute capability 7.0 on: registers go to warps in steps of 256, in each of four partitions;
# shared memory goes to blocks in steps of 128 bytes, of 256 before 8.0, with one KiB for the system from 8.0 on.
_REGISTER_STEP, _PARTITIONS, _MOST_REGISTERS, _WARP = 256, 4, 255, 32
_RESERVED = 1024
# LLVM's AMDGPUBaseInfo for gfx942: each of four units has 512 registers a lane, given to waves in steps of 8, and shared memory
# is given to blocks in steps of 512 bytes. How many blocks there may be is about those of several waves.
_AMD_REGISTERS, _AMD_REGISTER_STEP, _AMD_SHARED_STEP = 512, 8, 512
# Beside them 800 of a whole wave, in steps of 16.
_AMD_SCALARS, _AMD_SCALAR_STEP = 800, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """Blocks of a kernel on one multiprocessor.

    Attributes:
        blocks: At a time; 0 where it cannot be launched.
        share: Of the warps that a multiprocessor holds.
        limit: What decides: ``registers``, ``shared memory``, ``warps`` or ``blocks``.
    """

    blocks: int
    share: float
    limit: str


def of_record(record: Mapping[str, Any]) -> Occupancy:
    """Of a compiled program; see ``optkit.kernels.triton.worker``."""
    major, minor = record["capability"]
    return occupancy(
        ARCHITECTURES[major, minor], (major, minor), registers=record["registers"], shared=record["shared"],
        warps=record["warps"], scalars=record.get("scalars", 0),
    )  # fmt: skip


def occupancy(
    limits: Architecture,
    capability: Capability,
    *,
    registers: int,
    shared: int,
    warps: int,
    scalars: int = 0,
) -> Occupancy:
    """Of a kernel with ``registers`` a thread and ``scalars`` a wave, ``shared`` bytes and ``warps`` a block."""
    held = limits.threads // limits.lanes
    if is_amd(capability):
        waves = min(
            _AMD_REGISTERS // _up(max(1, registers), _AMD_REGISTER_STEP),
            _AMD_SCALARS // _up(max(1, scalars), _AMD_SCALAR_STEP),
        )
        most = {
            "registers": waves * _PARTITIONS // warps,
            "shared memory": limits.shared_unit // _up(max(1, shared), _AMD_SHARED_STEP),
            "warps": held // warps,
            "blocks": limits.blocks if warps > 1 else held,
        }
    else:
        most = {
            "registers": _by_registers(limits.registers, registers, warps),
            "shared memory": _by_shared(limits, capability, shared),
            "warps": held // warps,
            "blocks": limits.blocks,
        }
    if warps * limits.lanes > 1024:
        most["warps"] = 0
    limit = min(most, key=lambda name: most[name])
    blocks = most[limit]
    return Occupancy(blocks=blocks, share=blocks * warps / held, limit=limit)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _by_registers(available: int, registers: int, warps: int) -> int:
    if registers == 0:
        return 1 << 30
    each = _up(registers * _WARP, _REGISTER_STEP)
    # The hardware's check assumes that all partitions get as many warps.
    if registers > _MOST_REGISTERS or each * _up(warps, _PARTITIONS) > available:
        return 0
    return available // _PARTITIONS // each * _PARTITIONS // warps


def _by_shared(limits: Architecture, capability: Capability, shared: int) -> int:
    if shared > limits.shared:
        return 0
    ampere = capability >= (8, 0)
    each = _up(shared + (_RESERVED if ampere else 0), 128 if ampere else 256)
    return limits.shared_unit // each if each else 1 << 30
