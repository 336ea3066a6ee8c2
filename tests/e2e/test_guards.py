"""The guards around the demo model: sound that is hard on a recogniser, and clean speech that must not be touched."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soxr
import torch

import quasr
from quasr.audio.decode import stream
from quasr.audio.fetch import FetchLimits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from quasr.audio.source import AudioInput

RATE = 16_000
DEMO = Path(str(files("quasr"))) / "demo"
PUBLIC = Path(__file__).resolve().parents[2] / "../shared/speech/public"
CONTEXT = "Kwasar, Eleonore, Fourier and the quiet garden"

pytestmark = pytest.mark.skipif(not (DEMO / "model").is_dir(), reason="the demo model is not in this checkout")


@pytest.fixture(scope="module")
def transcriber() -> Iterator[quasr.Transcriber]:
    torch.set_num_threads(1)
    with quasr.load("demo", device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def sample() -> NDArray[np.float32]:
    return np.concatenate(list(stream(str(DEMO / "sample.flac"), FetchLimits())))


SPOKEN = re.findall(r"\w+", (DEMO / "sample.txt").read_text(encoding="utf-8").lower())


def words(result: quasr.Transcript) -> list[str]:
    return re.findall(r"\w+", result.text.lower())


def noise(seconds: float, level: float) -> NDArray[np.float32]:
    return np.random.default_rng(5).normal(0, level, round(seconds * RATE)).astype(np.float32)


@pytest.mark.slow
def test_a_word_forty_times_is_stopped_tried_again_and_told(
    transcriber: quasr.Transcriber, sample: NDArray[np.float32]
) -> None:
    word = sample[round(1.5 * RATE) : round(2.2 * RATE)]
    result = transcriber.transcribe((np.tile(word, 40), RATE))
    (notice,) = result.warnings
    assert (notice.code, notice.start, notice.end) == ("repetition", 0.0, 28.0)
    assert notice.retry_helped is not None
    # 28 s may take 396 tokens; two tries, of which the second is in two parts, are stopped far sooner together.
    assert result.timings.tokens < 300
    assert {"text", "the"} <= set(words(result))
    assert "".join(segment.text for segment in result.segments) == result.text


@pytest.mark.parametrize("level", [0.0, 0.001, 0.1])
def test_the_context_is_not_heard_in_silence_and_noise(transcriber: quasr.Transcriber, level: float) -> None:
    result = transcriber.transcribe((noise(3.0, level), RATE), context=CONTEXT)
    echoed = set(words(result)) & set(re.findall(r"\w+", CONTEXT.lower()))
    assert not echoed or "context_echo" in {notice.code for notice in result.warnings}
    assert len(words(result)) <= 3


def test_a_click_has_no_text(transcriber: quasr.Transcriber) -> None:
    click = np.zeros(RATE // 10, np.float32)
    click[800:810] = 1.0
    result = transcriber.transcribe((click, RATE))
    assert (result.text, result.warnings) == ("", ())


def on_one_channel(samples: NDArray[np.float32]) -> AudioInput:
    return np.stack([samples * 2, np.zeros_like(samples)], axis=1), RATE


def by_telephone(samples: NDArray[np.float32]) -> AudioInput:
    return soxr.resample(samples, RATE, 8000).astype(np.float32), 8000


@pytest.mark.parametrize("spoil", [on_one_channel, by_telephone])
def test_poor_sound_that_is_good_enough(
    transcriber: quasr.Transcriber, sample: NDArray[np.float32], spoil: object
) -> None:
    result = transcriber.transcribe(spoil(sample))  # type: ignore[operator]
    assert words(result) == SPOKEN
    assert result.warnings == ()


def test_clipped_sound_still_has_words(transcriber: quasr.Transcriber, sample: NDArray[np.float32]) -> None:
    peak = float(np.abs(sample).max())
    result = transcriber.transcribe((np.clip(sample, -peak / 8, peak / 8) * 8, RATE))
    assert len(set(words(result)) & set(SPOKEN)) >= len(set(SPOKEN)) // 2


@pytest.mark.slow
@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the clips of ../shared/speech/public are not on this machine")
def test_clean_clips_trip_nothing_and_keep_their_text(transcriber: quasr.Transcriber) -> None:
    rows = [json.loads(line) for line in (PUBLIC / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    english = [row for row in rows if row["subset"] in ("librispeech", "ljspeech")]
    clips = [str(PUBLIC / row["path"]) for row in sorted(english, key=lambda row: row["seconds"])[:40]]
    guarded = list(transcriber.transcribe_batch(clips, context=CONTEXT, batch_size=4))
    free = list(transcriber.transcribe_batch(clips, context=CONTEXT, batch_size=4, guards=False))
    for one, other in zip(guarded, free, strict=True):
        assert isinstance(one, quasr.Transcript)
        assert isinstance(other, quasr.Transcript)
        assert one.warnings == ()
        assert one.text == other.text
