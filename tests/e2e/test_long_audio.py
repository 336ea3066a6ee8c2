"""Long audio: clips joined into one file against the clips alone, and memory against length."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest

import quasr
from quasr.audio.decode import load
from quasr.evaluation.score import score
from quasr.types import SAMPLE_RATE

if TYPE_CHECKING:
    from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
PUBLIC = HERE.parents[1] / "../shared/speech/public"
SUBSETS = ("librispeech", "speechocean762", "ljspeech", "digits")
GAP = 2.0
SECONDS = 300.0

pytestmark = pytest.mark.slow


class Clip(NamedTuple):
    samples: NDArray[np.float32]
    text: str
    start: float
    """Seconds into the joined audio."""

    @property
    def end(self) -> float:
        return self.start + len(self.samples) / SAMPLE_RATE


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """English clips of four corpora, evenly spaced in the manifest, about five minutes."""
    if not (PUBLIC / "manifest.jsonl").is_file():
        pytest.skip("the public test clips are not beside this checkout")
    lines = (PUBLIC / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["subset"] in SUBSETS]
    step = round(sum(row["seconds"] for row in rows) / SECONDS)
    found, at = [], GAP
    for row in rows[::step]:
        samples = load(PUBLIC / row["path"])
        found.append(Clip(samples, row["norm"], at))
        at = found[-1].end + GAP
    return found


@pytest.fixture(scope="module")
def transcriber() -> quasr.Transcriber:
    return quasr.load("demo", device="cpu")


@pytest.fixture(scope="module")
def joined(clips: list[Clip], transcriber: quasr.Transcriber) -> quasr.Transcript:
    """The clips with faint noise before, between and after them."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(0, 0.001, round(GAP * SAMPLE_RATE)).astype(np.float32) for _ in range(2 * len(clips) + 1)]
    parts[1::2] = [clip.samples for clip in clips]
    return transcriber.transcribe((np.concatenate(parts), SAMPLE_RATE))


def word_errors(reference: str, hypothesis: str) -> float:
    words = score(reference, hypothesis, "en").words
    assert words is not None
    assert words.units > 500
    return words.rate or 0.0


def test_error_rate_is_that_of_the_clips(
    clips: list[Clip], transcriber: quasr.Transcriber, joined: quasr.Transcript
) -> None:
    inputs = [(clip.samples, SAMPLE_RATE) for clip in clips]
    results = [result for result in transcriber.transcribe_batch(inputs) if isinstance(result, quasr.Transcript)]
    assert len(results) == len(clips)
    reference = " ".join(clip.text for clip in clips)
    alone = word_errors(reference, " ".join(result.text for result in results))
    assert word_errors(reference, joined.text) <= alone + 0.01
    assert alone < 0.5


def test_every_word_is_in_one_segment_and_times_go_on(clips: list[Clip], joined: quasr.Transcript) -> None:
    assert "".join(segment.text for segment in joined.segments) == joined.text
    assert joined.duration == pytest.approx(clips[-1].end + GAP, abs=0.001)
    assert all(segment.start < segment.end <= joined.duration for segment in joined.segments)
    assert all(before.end <= after.start for before, after in pairwise(joined.segments))
    # One short clip is taken for Chinese at first, which a guard sees and cures.
    assert all(notice.code == "language_flip" and notice.retry_helped for notice in joined.warnings)
    assert {segment.language for segment in joined.segments} == {"English"}


def test_segments_begin_and_end_with_the_clips(clips: list[Clip], joined: quasr.Transcript) -> None:
    """Boundaries of segments, whatever number of clips they hold, against the clips' own, their silences included."""
    starts, ends = np.array([clip.start for clip in clips]), np.array([clip.end for clip in clips])
    off = [np.abs(starts - segment.start).min() for segment in joined.segments]
    off += [np.abs(ends - segment.end).min() for segment in joined.segments]
    assert np.mean(np.array(off) <= 0.5) >= 0.95
    in_speech = [clip for clip in clips for segment in joined.segments if clip.start + 1 < segment.start < clip.end - 1]
    assert len(in_speech) <= 0.05 * len(clips)


def peak_and_segments(minutes: int) -> tuple[int, int, float]:
    command = [sys.executable, str(HERE / "long_audio_memory.py"), str(minutes), "energy"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    peak, segments, duration = done.stdout.split()
    return int(peak), int(segments), float(duration)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from Linux's /proc")
def test_memory_does_not_grow_with_length() -> None:
    short, _, _ = peak_and_segments(1)
    long, segments, duration = peak_and_segments(60)
    assert duration == 3600.0
    assert segments > 100
    assert long - short < 50e6
