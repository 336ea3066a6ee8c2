"""How fast threads read memory: `python -m quasr.bench.reading THREADS`, in a process of its own, without torch.

A decode step that reads every weight once, and does nothing else, would be as fast. Sums take longer than reading on
one or two threads, so it is the largest number that is looked for.
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZE = 1 << 28
"""Bytes, several times what caches hold."""

TRIALS = 6


def read_speed(threads: int, size: int = SIZE) -> float:
    """Bytes a second, the best of TRIALS, each thread reading its own part."""
    parts = np.array_split(np.ones(size // 4, np.float32), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(TRIALS):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds.append(time.perf_counter() - started)
    return size / min(seconds)


def read_speed_elsewhere(threads: int) -> float:
    """As `read_speed`, in another process, so that this one's peak of memory stays what it is."""
    command = [sys.executable, "-m", "quasr.bench.reading", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(arguments: Sequence[str]) -> int:
    """Writes bytes a second."""
    sys.stdout.write(f"{read_speed(int(arguments[0])):.0f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
