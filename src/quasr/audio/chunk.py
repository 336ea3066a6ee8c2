"""Cuts long audio into pieces: by its cut plan, or by the rule of the official `qwen-asr` package.

The official rule: near each nominal cut (the limit), the 100 ms window with the smallest sum of |x| is looked for, and
the cut is at the smallest |x| in it. Such pieces do not overlap: together they are the input, sample for sample.
Planned pieces leave out silence (`quasr.audio.plan`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quasr.audio.plan import CutPlan
from quasr.audio.vad import WINDOW
from quasr.errors import OptionError
from quasr.types import SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from quasr.audio.plan import PlanOptions, Span
    from quasr.audio.vad import Detector

OFFICIAL_SECONDS = 1200.0
"""The model's limit: no longer piece can be decoded, and the official package cuts there."""

SEARCH_SECONDS = 5.0
QUIET_WINDOW = SAMPLE_RATE // 10


@dataclass(frozen=True, slots=True)
class Piece:
    """`samples` (n,) at 16 kHz, the first of them `start` seconds into the audio."""

    start: float
    samples: NDArray[np.float32]

    @property
    def end(self) -> float:
        """Seconds into the audio after the last sample; by the official rule exactly the `start` of the next piece."""
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


def speech_pieces(blocks: Iterable[NDArray[np.float32]], detector: Detector, options: PlanOptions) -> Iterator[Piece]:
    """The planned pieces of a stream of blocks (n,) at 16 kHz, each as soon as it is decided, in constant memory.

    Where nothing is found, the loudest stretch of `options.longest` is the one piece: a detector's word alone is not
    enough to return nothing.
    """
    cutter, held, loudest = CutPlan(options), _Held(), _Loudest(round(options.longest * SAMPLE_RATE))
    found = False
    for block in blocks:
        held.add(block)
        if not found:
            loudest.add(block)
        for span in cutter.feed(detector.feed(block)):
            found = True
            yield held.piece(span)
        held.forget(cutter.keep * WINDOW)
    for span in [*cutter.feed(detector.finish()), *cutter.finish()]:
        found = True
        yield held.piece(span)
    if not found and (piece := loudest.best()):
        yield piece


class _Held:
    """The end of a stream, from sample `begin` on."""

    def __init__(self) -> None:
        self._begin = 0
        self._samples = np.empty(0, np.float32)

    def add(self, block: NDArray[np.float32]) -> None:
        self._samples = np.concatenate([self._samples, block])

    def forget(self, before: int) -> None:
        self._samples = self._samples[max(0, before - self._begin) :]
        self._begin = max(self._begin, before)

    def piece(self, span: Span) -> Piece:
        start = span.start * WINDOW
        return Piece(start / SAMPLE_RATE, self._samples[start - self._begin : span.end * WINDOW - self._begin])


class _Loudest:
    """The loudest of a stream's stretches of `size` samples, end to end."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._begin = 0
        self._held: NDArray[np.float32] = np.empty(0, np.float32)
        self._best: tuple[float, Piece] | None = None

    def add(self, block: NDArray[np.float32]) -> None:
        self._held = np.concatenate([self._held, block])
        while self._held.size >= self._size:
            self._compare(self._held[: self._size])
            self._held = self._held[self._size :]
            self._begin += self._size

    def best(self) -> Piece | None:
        """None for a stream without samples."""
        if self._held.size:
            self._compare(self._held)
        return self._best and self._best[1]

    def _compare(self, samples: NDArray[np.float32]) -> None:
        energy = float(np.square(samples, dtype=np.float64).sum())
        if self._best is None or energy > self._best[0]:
            self._best = energy, Piece(self._begin / SAMPLE_RATE, samples.copy())


def _in_samples(limit_seconds: float, search_seconds: float) -> tuple[int, int]:
    if not 1 <= limit_seconds * SAMPLE_RATE < math.inf:
        raise OptionError(f"a piece must last at least one sample and not for ever: {limit_seconds} s will not do")
    if not 0 <= search_seconds < math.inf:
        raise OptionError(f"the search for a quiet place cannot last {search_seconds} s")
    limit = round(limit_seconds * SAMPLE_RATE)
    return limit, min(round(search_seconds * SAMPLE_RATE), limit // 2)
