"""How fast a device's memory is: what a perfect decode step, which reads every weight once, would be bound by."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quasr.bench.job import Bandwidth

if TYPE_CHECKING:
    from collections.abc import Callable

CUDA_BYTES = 1 << 30
CPU_BYTES = 1 << 28
TRIALS = 10


def measure_bandwidth(device: torch.device) -> Bandwidth:
    """The best of TRIALS. On CUDA a copy, whose reads and writes both count; on a CPU reading a sum's terms."""
    if device.type == "cuda":
        return Bandwidth(_cuda(device), "copy of 1 GiB, read and written", torch.cuda.get_device_name(device))
    return Bandwidth(_cpu(), f"sum over 256 MiB with {torch.get_num_threads()} threads", processor())


def _cuda(device: torch.device) -> float:
    source = torch.empty(CUDA_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize(device)

    return 2 * CUDA_BYTES / _best(copy)


def _cpu() -> float:
    numbers = torch.ones(CPU_BYTES // 4)
    return CPU_BYTES / _best(numbers.sum)


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
