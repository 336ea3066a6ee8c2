"""What of this machine's processor ONNX Runtime has to be told."""

from __future__ import annotations

import os
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")
FEATURES = Path("/proc/cpuinfo")

VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""Linux's names for instructions that sum products of uint8 and int8 in 32 bits."""


def physical_cores(topology: Path = TOPOLOGY) -> int:
    """Cores that this process may use, two threads of one core counted once; at least 1.

    A core's second thread adds nothing to matrix products: both share its multipliers. Where the system does not tell
    (`topology` is Linux's), every processor counts as a core.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    try:
        return len({_core(topology / f"cpu{index}" / "topology") for index in allowed})
    except (OSError, ValueError):
        return max(1, len(allowed))


def has_vnni(features: Path = FEATURES) -> bool:
    """Whether the processor has VNNI, as far as is known: `features` is Linux's, other systems count as without."""
    try:
        lines = features.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not VNNI.isdisjoint(flags)


def _core(folder: Path) -> tuple[int, int]:
    """The number of the package and of the core in it."""
    package, core = (int((folder / name).read_text(encoding="ascii")) for name in ("physical_package_id", "core_id"))
    return package, core
