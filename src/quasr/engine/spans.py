"""Seconds that the device spends on each stage, measured without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quasr.engine.base import EngineStats

Stage = Literal["encode_seconds", "prefill_seconds", "generate_seconds"]


class Spans:
    """Adds up stages in `stats`. On a GPU they are pairs of events, which `collect` reads once they have passed."""

    def __init__(self, stats: EngineStats, device: torch.device) -> None:
        self._stats = stats
        self._on_gpu = device.type == "cuda"
        self._open: deque[tuple[Stage, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Counts what is queued inside it."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._open.append((stage, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._add(stage, time.perf_counter() - started)

    def collect(self) -> None:
        """Takes what the device has finished into the stats."""
        while self._open and self._open[0][2].query():
            stage, begin, end = self._open.popleft()
            self._add(stage, begin.elapsed_time(end) / 1000)

    def _add(self, stage: Stage, seconds: float) -> None:
        setattr(self._stats, stage, getattr(self._stats, stage) + seconds)
