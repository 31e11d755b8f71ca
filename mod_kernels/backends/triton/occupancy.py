"""Theoretical occupancy: how many warps of a kernel a multiprocessor holds, of those it could hold."""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 65536  # 32-bit registers a multiprocessor, for every capability here
_SCHEDULERS = 4  # each with a quarter of the registers
_REGISTER_UNIT = 256  # registers are given to a warp in such pieces
_SHARED_UNIT = 128
_SHARED_RESERVED = 1024  # bytes a program that the system keeps for itself


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds: warps, programs (thread blocks), bytes of shared memory."""

    warps: int
    programs: int
    shared: int


# Warps, shared memory and what of it is reserved: NVIDIA's libcudacxx/include/cuda/__device/arch_traits.h
# (github.com/NVIDIA/cccl, efee2cf6). Programs and the units above: cuda_occupancy.h of CUDA 13, which also has the
# formula below. The two differ in the programs of 12.0, 32 there and 24 here; it matters to programs of one warp.
LIMITS = {
    80: Limits(64, 32, 164 * 1024),
    86: Limits(48, 16, 100 * 1024),
    89: Limits(48, 24, 100 * 1024),
    90: Limits(64, 32, 228 * 1024),
    100: Limits(64, 32, 228 * 1024),
    120: Limits(48, 24, 100 * 1024),
}


def occupancy(capability: int, num_warps: int, registers: int, shared: int) -> float:
    """Warps that fit over warps that could: 0.0 where not one program fits.

    Programs that fit are the fewest of four numbers: the limit on programs; by warps; by registers, which a warp
    gets from its scheduler's quarter, ``32 * registers`` rounded up to 256; by shared memory, ``shared`` bytes and
    1 KB reserved, rounded up to 128.
    """
    limits = LIMITS[capability]
    registers_of_a_warp = _round_up(32 * registers, _REGISTER_UNIT)
    warps_by_registers = REGISTERS // _SCHEDULERS // registers_of_a_warp * _SCHEDULERS
    programs = min(
        limits.programs,
        limits.warps // num_warps,
        warps_by_registers // num_warps,
        limits.shared // _round_up(shared + _SHARED_RESERVED, _SHARED_UNIT),
    )
    return programs * num_warps / limits.warps


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
