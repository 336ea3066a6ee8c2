"""Cuts long audio into pieces at its quietest moments, by the rule of the official `qwen-asr` package.

Near each nominal cut (the limit), the 100 ms window with the smallest sum of |x| is looked for, and the cut is at
the smallest |x| in it. Pieces do not overlap: together they are the input, sample for sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quasr.errors import OptionError
from quasr.types import SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

SEARCH_SECONDS = 5.0
QUIET_WINDOW = SAMPLE_RATE // 10


@dataclass(frozen=True, slots=True)
class Piece:
    """`samples` (n,) at 16 kHz, the first of them `start` seconds into the audio."""

    start: float
    samples: NDArray[np.float32]

    @property
    def end(self) -> float:
        """Seconds into the audio after the last sample; exactly the `start` of the next piece."""
        return (round(self.start * SAMPLE_RATE) + len(self.samples)) / SAMPLE_RATE


def pieces(
    blocks: Iterable[NDArray[np.float32]], limit_seconds: float, search_seconds: float = SEARCH_SECONDS
) -> Iterator[Piece]:
    """Pieces of a stream of blocks (n,) at 16 kHz, each made as soon as its cut can be known.

    No piece is longer than `limit_seconds` + `search_seconds`. The search is at most half the limit, so that short
    limits do not give pieces of nothing. Memory: about one such piece and one block.
    Raises OptionError for a limit under one sample or a negative search.
    """
    limit, search = _in_samples(limit_seconds, search_seconds)
    begin, held, size = 0, [], 0
    for block in blocks:
        held.append(block)
        size += block.size
        if size < limit + search:
            continue
        buffer = np.concatenate(held)
        while buffer.size >= limit + search:
            cut = cut_position(buffer, limit, search)
            yield Piece(begin / SAMPLE_RATE, buffer[:cut])
            begin, buffer = begin + cut, buffer[cut:]
        held, size = [buffer], buffer.size
    if size:
        yield from _last_pieces(np.concatenate(held), begin, limit, search)


def _last_pieces(buffer: NDArray[np.float32], begin: int, limit: int, search: int) -> Iterator[Piece]:
    while buffer.size > limit:
        cut = cut_position(buffer, limit, search)
        yield Piece(begin / SAMPLE_RATE, buffer[:cut])
        begin, buffer = begin + cut, buffer[cut:]
    yield Piece(begin / SAMPLE_RATE, buffer)


def cut_position(samples: NDArray[np.float32], limit: int, search: int) -> int:
    """Where to cut `samples` (n,), n > `limit`, within `search` samples of `limit`: an index from 1 to n.

    Of equally quiet windows and samples the first is taken.
    """
    left = max(0, limit - search)
    level = np.abs(samples[left : limit + search])
    if level.size <= QUIET_WINDOW:
        return limit
    # Float64, for the sums of two silent windows to be equal: then the first one wins.
    total = np.concatenate([[0.0], np.cumsum(level, dtype=np.float64)])
    quietest = int(np.argmin(total[QUIET_WINDOW:] - total[:-QUIET_WINDOW]))
    return max(1, left + quietest + int(np.argmin(level[quietest : quietest + QUIET_WINDOW])))


def _in_samples(limit_seconds: float, search_seconds: float) -> tuple[int, int]:
    if not 1 <= limit_seconds * SAMPLE_RATE < math.inf:
        raise OptionError(f"a piece must last at least one sample and not for ever: {limit_seconds} s will not do")
    if not 0 <= search_seconds < math.inf:
        raise OptionError(f"the search for a quiet place cannot last {search_seconds} s")
    limit = round(limit_seconds * SAMPLE_RATE)
    return limit, min(round(search_seconds * SAMPLE_RATE), limit // 2)
