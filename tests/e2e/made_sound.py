"""Sound files that tests make for themselves."""

from __future__ import annotations

import wave
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

RATE = 16_000


def sound(seconds: float, seed: int = 0) -> NDArray[np.float64]:
    """(n,) samples of a tone that glides through noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(0, 0.05, len(time))
    return 0.3 * np.sin(2 * np.pi * (200 + 150 * time) * time) + noise


def write_wav(path: Path, seconds: float, seed: int = 0) -> Path:
    """It as a 16-bit mono wav."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(sound(seconds, seed), -1, 1) * 32767).astype("<i2").tobytes())
    return path
