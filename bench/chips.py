"""What a kernel can reach on a chip by published numbers: programs that fit, and TB/s at most."""

from __future__ import annotations

from typing import NamedTuple

PARTITIONS = (
    4  # of a multiprocessor (NVIDIA) or compute unit (AMD), each with a quarter of its warps
)
REGISTERS = 512  # of a lane of a partition, for all of its warps; both vendors give them in eights
REACHED = 0.9  # of the published bandwidth: a copy on an H200 moves 4.3 of 4.8 TB/s


class Chip(NamedTuple):
    """One GPU of an architecture.

    NVIDIA: CUDA C++ Programming Guide, table of technical specifications by compute capability, and
    the data sheets of A100 80GB, H200 and B200 SXM (its clock: hmc-tech.com). AMD: CDNA 3 white
    paper and MI300X data sheet; waves and registers as llvm-calc-occupancy has them.
    """

    name: str
    units: int  # multiprocessors, or compute units
    lanes: int  # of a unit that are issued an instruction in each clock
    ghz: float
    tbs: float  # published memory bandwidth
    warp: int  # lanes
    warps: int  # at most in a unit
    programs: int  # at most in a unit
    shared: int  # bytes of a unit
    reserved: int  # of these, for each program


CHIPS = {
    "sm_80": Chip("A100", 108, 128, 1.41, 2.0, 32, 64, 32, 164 * 1024, 1024),
    "sm_90": Chip("H200", 132, 128, 1.98, 4.8, 32, 64, 32, 228 * 1024, 1024),
    "sm_100": Chip("B200", 148, 128, 1.98, 7.7, 32, 64, 32, 228 * 1024, 1024),
    # a wave of 64 takes one of 4 SIMDs of 16 lanes for 4 clocks
    "gfx942": Chip("MI300X", 304, 64, 2.1, 5.3, 64, 32, 32, 64 * 1024, 0),
}


def programs_of_unit(chip: Chip, registers: int, shared: int, num_warps: int) -> int:
    """Programs that a unit runs at a time: `registers` of a thread, `shared` bytes of a program."""
    given = -(-max(registers, 1) // 8) * 8
    warps = PARTITIONS * min(REGISTERS // given, chip.warps // PARTITIONS)
    by_shared = chip.shared // (shared + chip.reserved) if shared + chip.reserved else chip.programs
    return min(warps // num_warps, by_shared, chip.programs)


def issue_share(chip: Chip, instructions: float, bytes_moved: float, tbs: float) -> float:
    """Part of all issue slots that elements take at that bandwidth; beyond 1 it is not reached.

    `instructions` and `bytes_moved` are those of an element.
    """
    budget = chip.units * chip.lanes * chip.ghz / (tbs * 1e3)  # instructions in the time of a byte
    return instructions / (budget * bytes_moved)


def predicted_tbs(chip: Chip, instructions: float, bytes_moved: float, tbs: float) -> float:
    """TB/s where memory gives `tbs`: that, or what the issue slots let through."""
    return tbs / max(1.0, issue_share(chip, instructions, bytes_moved, tbs))
