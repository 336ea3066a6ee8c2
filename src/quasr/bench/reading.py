"""How fast threads read memory: `python -m quasr.bench.reading THREADS`, in a process of its own, without torch.

A decode step that reads every weight once, and does nothing else, would be as fast. One thread that reads from many
pages by turns is faster than one that reads in order, and numpy only reads in order: so C reads, where it can.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int64, c_void_p
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from quasr.errors import QuasrError
from quasr.native import library

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

SIZE = 1 << 28
"""Bytes, several times what caches hold."""

TRIALS = 6


@dataclass(frozen=True, slots=True)
class Reading:
    """Bytes a second, and how they were read."""

    speed: float
    method: str


def measure_reading(threads: int, size: int = SIZE) -> Reading:
    """The best of TRIALS, each thread reading its own part."""
    read, how = _reader()
    parts = np.array_split(np.ones(size // 4, np.float32), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(TRIALS):
            started = time.perf_counter()
            list(pool.map(read, parts))
            seconds.append(time.perf_counter() - started)
    return Reading(size / min(seconds), f"{size >> 20} MiB by {threads} threads, {how}")


def _reader() -> tuple[Callable[[NDArray[np.float32]], object], str]:
    """What reads an array, and its name. Sums take numpy longer than reading; finding the largest does not."""
    try:
        function = library.load().quasr_read
    except QuasrError as error:
        return np.max, f"each in order, for want of C ({error})"
    function.argtypes = (c_void_p, c_int64)
    return lambda part: function(part.ctypes.data, part.nbytes), "each in sixteen places by turns"


def measure_elsewhere(threads: int) -> Reading:
    """As `measure_reading`, in another process, so that this one's peak of memory stays what it is."""
    command = [sys.executable, "-m", "quasr.bench.reading", str(threads)]
    return Reading(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main(arguments: Sequence[str]) -> int:
    """Writes a Reading as JSON."""
    sys.stdout.write(json.dumps(asdict(measure_reading(int(arguments[0])))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
