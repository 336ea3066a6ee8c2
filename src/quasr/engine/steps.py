"""Decode steps, many at a time: from CUDA graphs where the kernels allow it, one by one elsewhere."""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from typing import TYPE_CHECKING

import torch

from quasr.engine.streams import capture, finish_replays

if TYPE_CHECKING:
    from quasr.engine.fast import FastDecoder
    from quasr.kernels.state import CachePool, DecodeState

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows that a graph is captured for; fewer rows use the next one, whose other rows are idle."""


class Steps:
    """Runs `decoder.step`. A graph belongs to the tensors it was captured with: call `forget` before replacing them."""

    def __init__(self, decoder: FastDecoder, *, graphs: bool) -> None:
        self._decoder = decoder
        self._use_graphs = graphs
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._memory: torch.cuda._POOL_HANDLE | None = None

    def rows_for(self, busy: int) -> int:
        """How many rows the state must show where `busy` of them have clips."""
        return BUCKETS[bisect_left(BUCKETS, busy)] if self._use_graphs else busy

    def run(self, state: DecodeState, cache: CachePool, count: int) -> None:
        """`count` tokens for every row of `state`, queued and not waited for."""
        if not self._use_graphs:
            for _ in range(count):
                self._decoder.step(state, cache)
            return
        if state.rows not in self._graphs and count:
            # Kernels are compiled and libraries made ready by a plain step, which a capture forbids.
            self._decoder.step(state, cache)
            self._graphs[state.rows] = self._capture(state, cache)
            count -= 1
        for _ in range(count):
            self._graphs[state.rows].replay()

    def forget(self) -> None:
        """Drops all graphs, and the memory that they shared, when they have run."""
        if self._graphs:
            finish_replays()
        self._graphs.clear()
        self._memory = None

    def _capture(self, state: DecodeState, cache: CachePool) -> torch.cuda.CUDAGraph:
        if self._memory is None:
            # All graphs take their temporary memory from one pool: they never run at the same time. A pool without
            # graphs is gone, so each set of them has its own.
            self._memory = torch.cuda.graph_pool_handle()
        return capture(partial(self._decoder.step, state, cache), self._memory)[0]
