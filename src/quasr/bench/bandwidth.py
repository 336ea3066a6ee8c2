"""How fast a device's memory is: what a perfect decode step, which reads every weight once, would be bound by."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quasr.bench.job import Bandwidth
from quasr.bench.reading import measure_reading

if TYPE_CHECKING:
    from collections.abc import Callable

CUDA_BYTES = 1 << 30
TRIALS = 10


def measure_bandwidth(device: torch.device) -> Bandwidth:
    """The best of some trials. On CUDA a copy, whose reads and writes both count; on a CPU reading."""
    if device.type == "cuda":
        return Bandwidth(_cuda(device), "copy of 1 GiB, read and written", torch.cuda.get_device_name(device))
    reading = measure_reading(torch.get_num_threads())
    return Bandwidth(reading.speed, reading.method, processor())


def _cuda(device: torch.device) -> float:
    source = torch.empty(CUDA_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize(device)

    return 2 * CUDA_BYTES / _best(copy)


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def processor() -> str:
    """The CPU's name, as Linux tells it; elsewhere what Python knows."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
