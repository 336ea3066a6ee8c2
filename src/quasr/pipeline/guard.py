"""Guards: what is suspect about the text of one piece, how to try it again, and which of the two tries is better.

Nothing here runs the network. A suspect piece is decoded once more, alone: without the context where that was echoed,
in the file's language where it flipped, cut in two at its quietest place for the other faults.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from quasr.audio.chunk import Piece, cut_position
from quasr.audio.vad import WINDOW_SECONDS, detector
from quasr.pipeline.retry import SAME_WEIGHTS
from quasr.text.loops import loop_length
from quasr.text.parse import Parsed, parse_output
from quasr.text.repetition import fix_repetition
from quasr.types import SAMPLE_RATE, Notice

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from quasr.engine.base import ClipResult
    from quasr.pipeline.retry import Retry
    from quasr.text.tokenizer import Tokenizer
    from quasr.types import FinishReason, Segment

CONFIDENT = 0.8
"""Probability of speech from which the detector's word is taken for a fact."""

LIKELY = 0.5
"""Probability from which a window counts as speech, as in the cut plan."""

CONFIDENT_SECONDS = 0.5
"""So much confident speech holds a word; shorter cries and clicks may well have no text."""

DOUBTFUL_SECONDS = 0.2
"""Less speech than this holds no words: of 533 spoken clips the one with least has 0.42 s (`docs/log.md`)."""

UNSURE = -0.5
"""Mean log-probability of a text from which the detector is not asked: it would take more time than it is worth."""

SPEECH_RANGE = 15.0
"""dB that speech stands above the quiet fifth of its own piece: the energy detector alone takes steady noise for it."""

BAD_GUESS = -1.0
"""Mean log-probability under which Whisper, too, decodes anew."""

FEWEST_OTHERS = 4
MAJORITY = 0.75
"""A file has one language if at least four other pieces have text and three quarters of them agree."""

SHORTEST_HALF = 1.0
"""Seconds. Pieces under two of them are not cut in two but shifted."""

SHIFT_SECONDS = 0.25

_FAULTS = {
    "repetition": "the model repeated itself",
    "token_budget": "decoding stopped at its budget of {budget} tokens",
    "empty_on_speech": "there is speech but no text",
    "context_echo": "the text is only words of the context",
    "language_flip": "the language is not that of the other pieces",
    "doubtful_speech": "there are words where hardly anybody speaks",
}
_CUT_ANEW = frozenset({"repetition", "token_budget", "empty_on_speech"})
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_HEAD_ALONE = re.compile(r"language(\s+\w+)?")
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+")


@dataclass(frozen=True, slots=True)
class Part:
    """Text of the audio from `start` to `end` seconds. `tokens` and `logprobs` are without a loop's further copies."""

    start: float
    end: float
    language: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    repeats: bool

    @property
    def avg_logprob(self) -> float | None:
        """The mean over all tokens, the language head included; None without tokens."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else None


def read_result(tokenizer: Tokenizer, piece: Piece, result: ClipResult, language: str | None) -> Part:
    """Parses one clip's tokens. Of a loop one copy stays; a head that breaks off is no text. `language` is forced."""
    size = len(result.tokens) - (loop_length(result.tokens) if result.finish_reason == "loop" else 0)
    raw = tokenizer.decode(result.tokens[:size]).strip()
    parsed = Parsed("", "") if _HEAD_ALONE.fullmatch(raw) and not language else parse_output(raw, language)
    return Part(
        start=piece.start,
        end=piece.end,
        language=parsed.language,
        text=parsed.text,
        tokens=result.tokens[:size],
        logprobs=result.logprobs[:size],
        finish_reason=result.finish_reason,
        repeats=result.finish_reason == "loop" or fix_repetition(raw) != raw,
    )


@dataclass(frozen=True)
class Case:
    """What the text of a piece is judged by: its sound, the context and language that the model was given, and the
    language of the file's other pieces ("" where they do not agree).
    """

    piece: Piece
    context: str
    forced: str | None
    majority: str
    tokenizer: Tokenizer

    @cached_property
    def speech(self) -> bool:
        """Whether somebody certainly speaks. Asked only of suspect pieces, as it takes a detector's time."""
        return speaks(self.piece.samples)

    def faults(self, parts: Sequence[Part]) -> frozenset[str]:
        """The codes of the guards that one try trips."""
        tripped = {
            "repetition": any(part.repeats for part in parts),
            "token_budget": bool(budget_fault(parts)),
            "empty_on_speech": not _words(_text(parts)) and self.speech,
            "context_echo": self._echoes(parts),
            "language_flip": self._flips(parts),
        }
        return frozenset(code for code, true in tripped.items() if true)

    def _echoes(self, parts: Sequence[Part]) -> bool:
        words = _words(_text(parts))
        if not words or not words <= _words(self.context):
            return False
        return self.text_logprob(parts) < BAD_GUESS or not self.speech

    def _flips(self, parts: Sequence[Part]) -> bool:
        found = {part.language for part in parts if part.text and part.language}
        return bool(self.majority and not self.forced and found - {self.majority})

    def doubts(self, parts: Sequence[Part]) -> bool:
        """Whether an unsure text has next to no speech under it. Energy alone cannot tell music from speech."""
        if not _words(_text(parts)) or self.text_logprob(parts) >= UNSURE:
            return False
        name, probability = _heard(self.piece.samples)
        return name != "energy" and _seconds(probability >= LIKELY) < DOUBTFUL_SECONDS

    def text_logprob(self, parts: Iterable[Part]) -> float:
        """The mean over the tokens behind `<asr_text>`, so with and without a language head; minus infinity if none."""
        tag, found = self.tokenizer.special.asr_text, list[float]()
        for part in parts:
            found += part.logprobs[part.tokens.index(tag) + 1 if tag in part.tokens else 0 :]
        return sum(found) / len(found) if found else float("-inf")


def budget_fault(parts: Iterable[Part]) -> frozenset[str]:
    """What is told without guards, too: whether decoding stopped at the budget."""
    return frozenset({"token_budget"}) if any(part.finish_reason == "length" for part in parts) else frozenset()


def remedy(case: Case, faults: frozenset[str]) -> tuple[Case, tuple[Piece, ...]]:
    """How the second try differs from the first: what the model is given, and the pieces that it hears."""
    context = "" if "context_echo" in faults else case.context
    forced = case.majority if "language_flip" in faults else case.forced
    pieces = recut(case.piece) if faults & _CUT_ANEW else (case.piece,)
    return replace(case, context=context, forced=forced), pieces


def recut(piece: Piece) -> tuple[Piece, ...]:
    """Two pieces, cut at the quietest place of the middle half; a short piece is one, behind 0.25 s of silence."""
    size = len(piece.samples)
    if size < 2 * SHORTEST_HALF * SAMPLE_RATE:
        shift = round(SHIFT_SECONDS * SAMPLE_RATE)
        return (Piece(piece.start, np.concatenate([np.zeros(shift, np.float32), piece.samples])),)
    cut = cut_position(piece.samples, size // 2, size // 4)
    first = Piece(piece.start, piece.samples[:cut])
    return first, Piece(first.end, piece.samples[cut:])


@dataclass(frozen=True, slots=True)
class Verdict:
    """The better of two tries: its `parts`, and each fault that the first or the kept one has, with whether the
    second try cured it; None where there was no second try."""

    parts: tuple[Part, ...]
    faults: dict[str, bool | None]


def compare(case: Case, first: Sequence[Part], again: Case, second: Sequence[Part]) -> Verdict:
    """Keeps the try with fewer faults, of equals the likelier one, of equally likely ones the first.

    To force a language cures a flip by itself: it counts only where the forced text is at least as likely.
    """
    before, after = case.text_logprob(first), case.text_logprob(second)
    faults, left = case.faults(first), again.faults(second)
    if "language_flip" in faults and after < before:
        left |= {"language_flip"}
    better = (-len(left), after) > (-len(faults), before)
    kept = left if better else faults
    cured: dict[str, bool | None] = {code: code not in kept for code in _FAULTS if code in faults | kept}
    return Verdict(tuple(second if better else first), cured)


def majority_language(pieces: Counter[str]) -> str:
    """The language that so many pieces with text agree on; "" where they are too few or too divided."""
    counts = Counter({language: count for language, count in pieces.items() if language})
    if counts.total() < FEWEST_OTHERS:
        return ""
    language, count = counts.most_common(1)[0]
    return language if count >= MAJORITY * counts.total() else ""


def speaks(samples: NDArray[np.float32]) -> bool:
    """Whether (n,) samples at 16 kHz hold at least half a second of what is certainly speech."""
    return _seconds(_heard(samples)[1] >= CONFIDENT) >= CONFIDENT_SECONDS


def _heard(samples: NDArray[np.float32]) -> tuple[str, NDArray[np.float64]]:
    """The detector's name, and its probability of speech in each window of (n,) samples."""
    chosen = detector()
    activity = [chosen.feed(samples), chosen.finish()]
    probability = np.concatenate([part.probability for part in activity])
    if chosen.name == "energy":
        level = 20 * np.log10(np.maximum(np.concatenate([part.level for part in activity]), 1e-6))
        probability = np.where(level >= np.percentile(level, 20) + SPEECH_RANGE, probability, 0.0)
    return chosen.name, probability


def _seconds(windows: NDArray[np.bool_]) -> float:
    return int(np.count_nonzero(windows)) * WINDOW_SECONDS


def warning(
    code: str,
    piece: Piece | Segment,
    helped: bool | None = None,
    budget: int | None = None,
    retry: Retry = SAME_WEIGHTS,
) -> Notice:
    """The notice about a fault; `helped` None where there was no second try, `budget` in tokens."""
    where = f"from {piece.start:.1f} to {piece.end:.1f} s {_FAULTS[code].format(budget=budget)}"
    if helped is None:
        return Notice(code, f"{where}: check the text there", piece.start, piece.end)
    manner = {"same": "", "16-bit": " in 16 bits", "quantised": f" (still quantised: {retry.reason})"}[retry.weights]
    outcome = "cured it" if helped else "did no better"
    return Notice(code, f"{where}: a second try{manner} {outcome}", piece.start, piece.end, helped, retry.weights)


def late_flips(segments: Sequence[Segment], notices: Iterable[Notice]) -> list[Notice]:
    """Flips that only the whole file shows: their sound is gone, so there is no second try."""
    known = {notice.start for notice in notices if notice.code == "language_flip"}
    counts = Counter(segment.language for segment in segments if segment.text)
    flipped: list[Notice] = []
    for segment in segments:
        others = majority_language(counts - Counter([segment.language])) if segment.text else ""
        if others and segment.language and segment.language != others and segment.start not in known:
            flipped.append(warning("language_flip", segment))
    return flipped


def _text(parts: Iterable[Part]) -> str:
    return " ".join(part.text for part in parts)


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.casefold()))
