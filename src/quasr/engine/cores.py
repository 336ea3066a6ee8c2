"""How many threads of arithmetic pay on this machine."""

from __future__ import annotations

import os
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")


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


def _core(folder: Path) -> tuple[int, int]:
    """The number of the package and of the core in it."""
    package, core = (int((folder / name).read_text(encoding="ascii")) for name in ("physical_package_id", "core_id"))
    return package, core
