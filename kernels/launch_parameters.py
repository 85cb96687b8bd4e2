"""How the main kernel is launched on each architecture: a small table, measured by bench/tune.py.

launch_parameters.json names architectures ("sm_90", "gfx942"), families ("sm", "gfx") or "default";
the most exact name counts, and what an entry leaves out is as below. Host only.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).with_name("launch_parameters.json")


CAPS = ("maxnreg", "maxnreg_one", "maxnreg_random", "maxnreg_int8")  # registers of a thread


class LaunchParameters(NamedTuple):
    """One launch of the main kernel. The defaults give each of 128 threads 8 elements."""

    block: int = 1024  # elements that a program has in registers at a time
    num_warps: int = 4  # of 32 lanes; AMD's have 64
    blocks_per_program: int = 1  # one after the other
    maxnreg: int = 64  # on NVIDIA, for several dtypes in one launch; 0 leaves it to ptxas
    maxnreg_one: int = 0  # the same for a single dtype
    maxnreg_random: int = 0  # for stochastic rounding alone
    maxnreg_int8: int = 0  # for 8-bit moments
    exact: bool = False  # IEEE division and square root in float32, else 2 ULP off at most
    plain: bool = False  # no hyper-parameters but those of kernels/update.py's shorter way
    load_cache: str = ""  # PTX cache operators: "", ".ca", ".cg"
    store_cache: str = ""  # "", ".wb", ".cg", ".cs", ".wt"
    eviction: str = ""  # of both: "", "evict_first", "evict_last"
    prefetch: int = 0  # KiB of elements between their prefetch into L2 and their use; 0: none
    overlap: bool = False  # whether programs begin before the schedule has ended: from sm_90 on

    @property
    def elements(self) -> int:
        """Elements of a program."""
        return self.block * self.blocks_per_program

    def uncapped(self) -> LaunchParameters:
        """The same with as many registers as ptxas likes."""
        caps: dict[str, Any] = dict.fromkeys(CAPS, 0)
        return self._replace(**caps)


def architecture(device: torch.device) -> str:
    """Name of a device's architecture, such as "sm_90" or "gfx942"; "" if it has none."""
    if device.type != "cuda":
        return ""
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def launch_parameters(name: str) -> LaunchParameters:
    """Launch parameters of an architecture, or those of its family, or the default."""
    entries = json.loads(FILE.read_text(encoding="utf-8"))
    family = name.split("_")[0] if "_" in name else name.rstrip("0123456789abcdef")
    for key in (name, family, "default"):
        if key in entries:
            return LaunchParameters(**entries[key])
    return LaunchParameters()
